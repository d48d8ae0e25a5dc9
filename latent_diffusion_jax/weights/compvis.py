"""First stages in the files of CompVis' code: latent diffusion, Stable Diffusion, taming.

Such a file holds tensors and no configuration, so the network is inferred from names and shapes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights.messages import shown
from latent_diffusion_jax.weights.shapes import MAX_LEVELS, NUMBER

PREFIX = "first_stage_model."  # in the checkpoint of a whole diffusion model
# In such a checkpoint beside the first stage, and too large to be read for nothing.
SKIPPED = ("model.", "cond_stage_model.", "model_ema.")
# In a first stage and not of its network: losses, the EMA's copy, a buffer of some VQ models.
IGNORED = ("loss.", "model_ema.", "colorize")
NUM_GROUPS = 32  # fixed in their code

_RES_BLOCK = (
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv"),
    ("shortcut", "nin_shortcut", "conv"),
)
_ATTENTION = (
    ("norm", "norm", "norm"),
    ("q", "q", "dense_as_conv"),
    ("k", "k", "dense_as_conv"),
    ("v", "v", "dense_as_conv"),
    ("proj_out", "proj_out", "conv"),
)
_ENDS = (
    ("conv_in", "conv_in", "conv"),
    ("mid/block_1", "mid.block_1", _RES_BLOCK),
    ("mid/attn_1", "mid.attn_1", _ATTENTION),
    ("mid/block_2", "mid.block_2", _RES_BLOCK),
    ("norm_out", "norm_out", "norm"),
    ("conv_out", "conv_out", "conv"),
)
TABLE = (
    ("encoder", "encoder", _ENDS),
    ("encoder/down_{level}_block_{block}", "encoder.down.{level}.block.{block}", _RES_BLOCK),
    ("encoder/down_{level}_attn_{block}", "encoder.down.{level}.attn.{block}", _ATTENTION),
    ("encoder/down_{level}_downsample", "encoder.down.{level}.downsample.conv", "conv"),
    ("decoder", "decoder", _ENDS),
    ("decoder/up_{level}_block_{block}", "decoder.up.{level}.block.{block}", _RES_BLOCK),
    ("decoder/up_{level}_attn_{block}", "decoder.up.{level}.attn.{block}", _ATTENTION),
    ("decoder/up_{level}_upsample", "decoder.up.{level}.upsample.conv", "conv"),
    ("quant_conv", "quant_conv", "conv"),
    ("post_quant_conv", "post_quant_conv", "conv"),
    ("quantizer/codebook", "quantize.embedding.weight", "same"),
)


def first_stage(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The tensors of the first stage's network, without the prefix.

    Args:
      tensors: of a checkpoint of a whole diffusion model, or of an autoencoder alone.
      where: the tensors come from, for the message.

    Raises:
      UserError: there is no first stage among them.
    """
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(PREFIX)
        }
    found = {name: x for name, x in tensors.items() if not name.startswith(IGNORED)}
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in found):
        raise UserError(
            f"{where} has the tensors of a diffusers model; give the folder that holds it and its "
            f"config.json"
        )
    if not any(name.startswith(("encoder.", "decoder.")) for name in found):
        names = ", ".join(shown(name) for name in list(tensors)[:3])
        raise UserError(
            f"{where} holds no first stage: no tensor is named encoder.* or {PREFIX}encoder.*"
            + (f", the first are {names}" if names else "")
        )
    return found


def infer(
    tensors: Mapping[str, np.ndarray], num_groups: int | None, where: str
) -> tuple[str, dict[str, Any]]:
    """Kind ("kl" or "vq") and fields of the network that tensors without prefix belong to.

    Raises:
      UserError: tensors that tell the network's size are missing, or have impossible shapes.
    """
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
    if lacking := [name for name in needed if getattr(tensors.get(name), "ndim", 0) != 4]:
        raise UserError(
            f"{where} does not tell the size of its first stage: the 4-d tensors "
            f"{', '.join(lacking)} are missing"
        )
    check_not_empty(tensors, needed, where)
    down, up = rf"encoder\.down\.{NUMBER}\.", rf"decoder\.up\.{NUMBER}\."
    levels = 1 + max((*_numbers(tensors, down), *_numbers(tensors, up)), default=0)
    if levels > MAX_LEVELS:
        raise UserError(
            f"{where} has a first stage of {levels} levels; at most {MAX_LEVELS} can be"
        )
    blocks = max(
        (
            1,
            *(1 + n for n in _numbers(tensors, rf"encoder\.down\.\d+\.block\.{NUMBER}\.")),
            *_numbers(tensors, rf"decoder\.up\.\d+\.block\.{NUMBER}\."),
        )
    )
    channels, image_channels = tensors[needed[0]].shape[:2]
    attention = _numbers(tensors, down + r"attn\.") | _numbers(tensors, up + r"attn\.")
    fields = dict(
        image_channels=image_channels,
        z_channels=tensors[needed[1]].shape[1],
        embed_dim=tensors[needed[2]].shape[1],
        channels=channels,
        channel_multipliers=tuple(_multiplier(tensors, level, channels, where) for level in
                                  range(levels)),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(attention)),
        mid_attention=any(".mid.attn_1." in name for name in tensors),
        num_groups=NUM_GROUPS if num_groups is None else num_groups,
    )  # fmt: skip
    if not any(name.startswith("quantize.") for name in tensors):
        return "kl", fields
    codebook = tensors.get("quantize.embedding.weight")
    if codebook is None or codebook.ndim != 2:
        raise UserError(f"{where} has no codebook quantize.embedding.weight [codes, channels]")
    return "vq", fields | {"codebook_size": codebook.shape[0]}


def check_not_empty(tensors: Mapping[str, np.ndarray], names: Iterable[str], where: str) -> None:
    """Raises UserError where one of the tensors that tell a network's size has no numbers."""
    for name in names:
        if not tensors[name].size:
            raise UserError(f"{where} has {name} of shape {tensors[name].shape}, which is empty")


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    """What the group of a pattern matches at the beginning of names."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _multiplier(tensors: Mapping[str, np.ndarray], level: int, channels: int, where: str) -> int:
    """Width of a level in multiples of the first convolution's, by any of its blocks."""
    pattern = rf"(encoder\.down|decoder\.up)\.{level}\.block\.\d+\.(conv1|norm2|conv2)\."
    widths = [x.shape[0] for name, x in tensors.items() if re.match(pattern, name) and x.ndim]
    if not widths:
        raise UserError(f"{where} has no blocks for level {level} of its first stage")
    width = max(set(widths), key=widths.count)
    if width % channels:
        raise UserError(
            f"{where} has {width} channels on level {level}, which is no multiple of the "
            f"{channels} of its first convolution"
        )
    return width // channels
