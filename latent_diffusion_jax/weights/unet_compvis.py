"""UNets in the files of CompVis' code: latent diffusion, Stable Diffusion.

Such a file holds tensors and no configuration, so the network is inferred from names and shapes;
but for the attention's heads, which leave no trace in them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights.compvis import check_not_empty
from latent_diffusion_jax.weights.mapping import Row
from latent_diffusion_jax.weights.messages import shown
from latent_diffusion_jax.weights.shapes import MAX_LEVELS, NUMBER
from latent_diffusion_jax.weights.unet_common import Description, transformer_rows, uniform

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # in the checkpoint of a whole model
NUM_GROUPS = 32  # fixed in their code

_RES_BLOCK = (
    ("norm_in", "in_layers.0", "norm"),
    ("conv_in", "in_layers.2", "conv"),
    ("embedding", "emb_layers.1", "dense"),
    ("norm_out", "out_layers.0", "norm"),
    ("conv_out", "out_layers.3", "conv"),
    ("shortcut", "skip_connection", "conv"),
)
# With `qkv` cut into three, see `split_attentions`.
_ATTENTION = (
    ("norm", "norm", "norm"),
    ("q", "qkv.q", "dense"),
    ("k", "qkv.k", "dense"),
    ("v", "qkv.v", "dense"),
    ("proj_out", "proj_out", "conv_as_dense"),
)


def rows(linear_projections: bool) -> tuple[Row, ...]:
    """The table of a UNet."""
    transformer = transformer_rows(linear_projections)
    return (
        ("time_embed_0", "time_embed.0", "dense"),
        ("time_embed_1", "time_embed.2", "dense"),
        ("label_embed/embedding", "label_emb.weight", "same"),
        ("vector_embed_0", "label_emb.0.0", "dense"),
        ("vector_embed_1", "label_emb.0.2", "dense"),
        ("conv_in", "input_blocks.0.0", "conv"),
        ("down_{level}_{block}_res", "input_blocks.{input}.0", _RES_BLOCK),
        ("down_{level}_{block}_transformer", "input_blocks.{input}.1", transformer),
        ("down_{level}_{block}_attention", "input_blocks.{input}.1", _ATTENTION),
        ("down_{level}_downsample", "input_blocks.{downsample}.0.op", "conv"),
        ("down_{level}_downsample", "input_blocks.{downsample}.0", _RES_BLOCK),
        ("mid_0_res", "middle_block.0", _RES_BLOCK),
        ("mid_0_transformer", "middle_block.1", transformer),
        ("mid_0_attention", "middle_block.1", _ATTENTION),
        ("mid_1_res", "middle_block.2", _RES_BLOCK),
        ("up_{level}_{block}_res", "output_blocks.{output}.0", _RES_BLOCK),
        ("up_{level}_{block}_transformer", "output_blocks.{output}.1", transformer),
        ("up_{level}_{block}_attention", "output_blocks.{output}.1", _ATTENTION),
        ("up_{level}_upsample", "output_blocks.{last}.{place}.conv", "conv"),
        ("up_{level}_upsample", "output_blocks.{last}.{place}", _RES_BLOCK),
        ("norm_out", "out.0", "norm"),
        ("conv_out", "out.2", "conv"),
    )


def unet(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The tensors of the UNet, without the prefix.

    Args:
      tensors: of a checkpoint of a whole diffusion model, or of a UNet alone.
      where: they come from, for the message.

    Raises:
      UserError: there is no UNet among them.
    """
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in tensors):
        raise UserError(
            f"{where} has the tensors of a diffusers model; give the folder that holds it and its "
            f"config.json"
        )
    if not any(name.startswith("input_blocks.") for name in tensors):
        names = ", ".join(shown(name) for name in list(tensors)[:3])
        raise UserError(
            f"{where} holds no UNet: no tensor is named input_blocks.* or {PREFIXES[0]}"
            f"input_blocks.*" + (f", the first are {names}" if names else "")
        )
    return dict(tensors)


def infer(
    tensors: Mapping[str, np.ndarray], num_heads: int | None, head_dim: int | None, where: str
) -> Description:
    """The network that tensors without prefix belong to.

    Args:
      tensors: of the UNet alone.
      num_heads: of each attention.
      head_dim: channels of a head. Where neither is given, those of the published models are
        assumed, see `_published_heads`.
      where: the tensors come from, for the message.

    Raises:
      UserError: tensors that tell the network's size are missing or have impossible shapes, or
        neither num_heads nor head_dim is given and no published model is like it.
    """
    needed = ("input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.0.out_layers.3.weight")
    if lacking := [name for name in needed if getattr(tensors.get(name), "ndim", 0) != 4]:
        raise UserError(
            f"{where} does not tell the size of its UNet: the 4-d tensors {', '.join(lacking)} "
            f"are missing"
        )
    check_not_empty(tensors, needed, where)
    channels, in_channels = tensors[needed[0]].shape[:2]
    levels, blocks = _levels(tensors, where)
    first = [1 + level * blocks for level in range(levels)]  # input block of each level
    widths = [_width(tensors, number, channels, where) for number in first]
    depth = rf"\.1\.transformer_blocks\.{NUMBER}\."
    depths = [
        1 + max(_numbers(tensors, rf"input_blocks\.{number}{depth}"), default=0) for number in first
    ]
    attention_levels = tuple(
        level
        for level, number in enumerate(first)
        if any(name.startswith(f"input_blocks.{number}.1.") for name in tensors)
    )
    if levels - 1 not in attention_levels:  # the last level's depth is the middle's
        middle = _numbers(tensors, rf"middle_block{depth}")
        depths[-1] = 1 + max(middle, default=0)
    transformer = any(".transformer_blocks." in name for name in tensors)
    embedding = tensors.get("input_blocks.1.0.emb_layers.1.weight")
    fields: dict[str, Any] = dict(
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=blocks - 1,
        attention_levels=attention_levels,
        attention="transformer" if transformer else "self",
        transformer_depth=uniform(depths),
        num_classes=_size(tensors, "label_emb.weight", 0),
        vector_dim=_size(tensors, "label_emb.0.0.weight", 1),
        scale_shift_norm=embedding is not None and embedding.shape[0] == 2 * widths[0],
        resblock_updown=_has(tensors, r"output_blocks\.\d+\.[12]\.in_layers\."),
        conv_resample=_has(tensors, r"output_blocks\.\d+\.[12]\.(conv|in_layers)\.") or levels == 1,
        num_groups=NUM_GROUPS,
    )
    contexts = {
        tensor.shape[1]
        for name, tensor in tensors.items()
        if name.endswith(".attn2.to_k.weight") and tensor.ndim == 2
    }
    context_dim = contexts.pop() if len(contexts) == 1 else None
    if num_heads is None and head_dim is None:
        num_heads, head_dim = _published_heads(fields, context_dim, where)
    fields |= dict(num_heads=num_heads or 0, head_dim=head_dim or 0)
    linear = getattr(tensors.get("middle_block.1.proj_in.weight"), "ndim", 0) == 2
    return Description(fields, in_channels, context_dim, linear)


def _published_heads(
    fields: Mapping[str, Any], context_dim: int | None, where: str
) -> tuple[int, int]:
    """Number or channels of the heads, the other 0, of the published model that is like this.

    Stable Diffusion 1 (context 768) and LDM's text-to-image model (1280) have 8 heads, Stable
    Diffusion 2 (1024) has heads of 64 channels, the retrieval-augmented model (768, but 448
    channels) heads of 32. LDM's models with contexts of 512 and 640 have one head: they are from
    before the code took notice of their configs, which say otherwise. Those without a context have
    heads of 32 channels, but 8 heads where residual blocks change the resolution or the middle
    alone attends.
    """
    if fields["attention"] == "self":
        eight = fields["resblock_updown"] or not fields["attention_levels"]
        return (8, 0) if eight else (0, 32)
    if context_dim == 768 and fields["channels"] == 448:
        return 0, 32
    known = {768: (8, 0), 1280: (8, 0), 1024: (0, 64), 512: (1, 0), 640: (1, 0)}
    if context_dim not in known:
        raise UserError(
            f"{where} does not say how many heads its attention has, and no published model has a "
            f"context of width {context_dim}: give num_heads or head_dim"
        )
    return known[context_dim]


def split_attentions(tensors: Mapping[str, np.ndarray], network: UNet) -> dict[str, np.ndarray]:
    """`qkv.weight` [3 C, C, 1] as `qkv.q.weight` [C, C] and so on; biases likewise.

    Their rows are ordered by head first, and by query, key, value within it.
    """
    split = {}
    for name, tensor in tensors.items():
        module, found, kind = name.partition(".qkv.")
        heads = _heads(name, network) if found else 0
        flat = tensor.ndim and all(n == 1 for n in tensor.shape[2:])
        if found and flat and tensor.shape[0] % (3 * heads) == 0:
            width, *inner = tensor.shape[0] // 3, *tensor.shape[1:2]
            parts = tensor.reshape(heads, 3, width // heads, *inner)
            for i, part in enumerate("qkv"):
                split[f"{module}.qkv.{part}.{kind}"] = parts[:, i].reshape(width, *inner)
        elif name.endswith(".proj_out.weight") and tensor.shape[2:] == (1,):
            split[name] = tensor[..., 0]
        else:
            split[name] = tensor
    return split


def join_attentions(tensors: Mapping[str, np.ndarray], network: UNet) -> dict[str, np.ndarray]:
    """The inverse of `split_attentions`."""
    joined = {}
    for name, tensor in tensors.items():
        module, found, kind = name.partition(".qkv.q.")
        if found:
            heads = _heads(name, network)
            parts = [tensors[f"{module}.qkv.{part}.{kind}"] for part in "qkv"]
            parts = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in parts]
            whole = np.concatenate(parts, axis=1)
            shape = (-1,) if tensor.ndim == 1 else (-1, tensor.shape[1], 1)
            joined[f"{module}.qkv.{kind}"] = whole.reshape(shape)
        elif network.attention == "self" and name.endswith(".proj_out.weight"):
            joined[name] = tensor[..., None]
        elif ".qkv." not in name:
            joined[name] = tensor
    return joined


def _heads(name: str, network: UNet) -> int:
    """Number of heads of the attention that a tensor belongs to."""
    blocks, last = network.num_res_blocks + 1, len(network.channel_multipliers) - 1
    level = last
    if match := re.match(rf"input_blocks\.{NUMBER}\.", name):
        level = (int(match[1]) - 1) // blocks
    elif match := re.match(rf"output_blocks\.{NUMBER}\.", name):
        level = last - int(match[1]) // blocks
    return max(network.heads[min(max(level, 0), last)][0], 1)


def _levels(tensors: Mapping[str, np.ndarray], where: str) -> tuple[int, int]:
    """Number of levels, and of blocks on each on the way up.

    The first level on the way up ends where something upsamples. What has no parameters shows on
    the way down, as a number that is left out.
    """
    inputs = _numbers(tensors, rf"input_blocks\.{NUMBER}\.")
    outputs = 1 + max(_numbers(tensors, rf"output_blocks\.{NUMBER}\."), default=-1)
    ends = _numbers(tensors, rf"output_blocks\.{NUMBER}\.[12]\.(?:conv|in_layers)\.")
    gaps = set(range(max(inputs))) - inputs
    blocks = 1 + min(ends) if ends else min(gaps, default=outputs)
    if blocks < 2 or outputs % blocks or 1 + max(inputs) != outputs:
        raise UserError(
            f"{where} has {1 + max(inputs)} input blocks and {outputs} output blocks, which do "
            f"not make levels of {blocks}"
        )
    if outputs // blocks > MAX_LEVELS:
        raise UserError(
            f"{where} has a UNet of {outputs // blocks} levels; at most {MAX_LEVELS} can be"
        )
    return outputs // blocks, blocks


def _width(tensors: Mapping[str, np.ndarray], number: int, channels: int, where: str) -> int:
    """Channels of an input block."""
    tensor = tensors.get(f"input_blocks.{number}.0.out_layers.3.weight")
    if tensor is None or tensor.ndim != 4 or tensor.shape[0] % channels:
        shape = None if tensor is None else tensor.shape
        raise UserError(
            f"{where} has input_blocks.{number}.0.out_layers.3.weight of shape {shape}; it must be "
            f"4-d, and its first size a multiple of the {channels} channels of input_blocks.0.0"
        )
    return tensor.shape[0]


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    """What the group of a pattern matches at the beginning of names."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _has(names: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in names)


def _size(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    """A size of a matrix, 0 where there is none."""
    tensor = tensors.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim == 2 else 0
