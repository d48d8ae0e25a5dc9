"""What the formats of UNets share: how one is described, and the names of its transformers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.weights.mapping import Row


class Description(NamedTuple):
    """What a config or the tensors' names and shapes say of a UNet.

    Attributes:
      fields: keyword arguments of `UNet`.
      in_channels: of the latents, and of what is concatenated to them.
      context_dim: width of the context; None without one.
      linear_projections: around the transformers are dense layers, not 1x1 convolutions: the same
        computation, stored in another shape.
    """

    fields: dict[str, Any]
    in_channels: int
    context_dim: int | None
    linear_projections: bool


_BLOCK = (
    ("norm1", "norm1", "norm"),
    ("norm2", "norm2", "norm"),
    ("norm3", "norm3", "norm"),
    *(
        (f"{attention}/{ours}", f"{attention}.{theirs}", "dense")
        for attention in ("attn1", "attn2")
        for ours, theirs in (
            ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"),
        )
    ),
    ("ff/proj_in", "ff.net.0.proj", "dense"),
    ("ff/proj_out", "ff.net.2", "dense"),
)  # fmt: skip


def transformer_rows(linear_projections: bool) -> tuple[Row, ...]:
    """Rows of a `SpatialTransformer`, which diffusers names as CompVis' code does."""
    projection = "dense" if linear_projections else "dense_as_conv"
    return (
        ("norm", "norm", "norm"),
        ("proj_in", "proj_in", projection),
        ("block_{depth}", "transformer_blocks.{depth}", _BLOCK),
        ("proj_out", "proj_out", projection),
    )


def bindings(network: UNet) -> list[Mapping[str, int]]:
    """Values of the placeholders in the formats' tables.

    `up` counts levels from the lowest; `input`, `downsample`, `output` and `last` are the numbers
    that CompVis' code gives to a block, a level's downsampling, a block on the way up and the last
    of those on a level, in which the upsampling is at `place`.
    """
    levels, blocks = len(network.channel_multipliers), network.num_res_blocks + 1
    depths = network.transformer_depths

    def depth_of(level: int, block: int) -> int:
        middle = level == levels - 1 and block == 0  # is as deep as the last level
        return depths[level] if middle or level in network.attention_levels else 1

    return [
        {
            "level": level,
            "up": levels - 1 - level,
            "block": block,
            "depth": depth,
            "input": 1 + level * blocks + block,
            "downsample": (1 + level) * blocks,
            "output": (levels - 1 - level) * blocks + block,
            "last": (levels - level) * blocks - 1,
            "place": 2 if level in network.attention_levels else 1,
        }
        for level in range(levels)
        for block in range(blocks)
        for depth in range(depth_of(level, block))
    ]


def uniform(values: list[int]) -> int | tuple[int, ...]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else tuple(values)
