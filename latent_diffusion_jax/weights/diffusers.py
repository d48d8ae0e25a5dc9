"""First stages in the folders of diffusers: `AutoencoderKL` and `VQModel`."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights.folders import positive_integer, positive_integers

CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
VERSION = "0.40.0"  # that the written configs belong to
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"

# Values that diffusers assumes where a config does not say.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (DOWN,),
    "up_block_types": (UP,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "kl": {"latent_channels": 4, "scaling_factor": 0.18215},
    "vq": {
        "latent_channels": 3,
        "scaling_factor": 1.0,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
    },
}
# What their networks can be beyond ours, with the one value that ours have.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "norm_type": "group",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}

_RES_BLOCK = (
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv"),
    ("shortcut", "conv_shortcut", "conv"),
)
ATTENTION = (
    ("norm", "group_norm", "norm"),
    ("q", "to_q", "dense"),
    ("k", "to_k", "dense"),
    ("v", "to_v", "dense"),
    ("proj_out", "to_out.0", "conv_as_dense"),
)
_ENDS = (
    ("conv_in", "conv_in", "conv"),
    ("mid/block_1", "mid_block.resnets.0", _RES_BLOCK),
    ("mid/attn_1", "mid_block.attentions.0", ATTENTION),
    ("mid/block_2", "mid_block.resnets.1", _RES_BLOCK),
    ("norm_out", "conv_norm_out", "norm"),
    ("conv_out", "conv_out", "conv"),
)
_DOWN, _UP = "encoder.down_blocks.{level}", "decoder.up_blocks.{up}"  # up: from the lowest level
TABLE = (
    ("encoder", "encoder", _ENDS),
    ("encoder/down_{level}_block_{block}", _DOWN + ".resnets.{block}", _RES_BLOCK),
    ("encoder/down_{level}_attn_{block}", _DOWN + ".attentions.{block}", ATTENTION),
    ("encoder/down_{level}_downsample", _DOWN + ".downsamplers.0.conv", "conv"),
    ("decoder", "decoder", _ENDS),
    ("decoder/up_{level}_block_{block}", _UP + ".resnets.{block}", _RES_BLOCK),
    ("decoder/up_{level}_attn_{block}", _UP + ".attentions.{block}", ATTENTION),
    ("decoder/up_{level}_upsample", _UP + ".upsamplers.0.conv", "conv"),
    ("quant_conv", "quant_conv", "conv"),
    ("post_quant_conv", "post_quant_conv", "conv"),
    ("quantizer/codebook", "quantize.embedding.weight", "same"),
)

# Names that attention had before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the names of today's diffusers."""
    pattern = r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)"
    return {
        re.sub(pattern, lambda match: _OLD_ATTENTION[match[1]], name): tensor
        for name, tensor in tensors.items()
    }


def read_config(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], float]:
    """Kind ("kl" or "vq"), fields of our network and scaling factor of a `config.json`.

    Raises:
      UserError: the config is not of a first stage, or of one that ours cannot be.
    """
    names = {name: kind for kind, name in CLASSES.items()}
    class_name = str(config.get("_class_name"))
    if class_name not in names:
        raise UserError(
            f"{where} is for the class {class_name!r}; first stages are of {' and '.join(names)}"
        )
    kind = names[class_name]
    for key, value in FIXED.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{where} has {key} {config[key]!r}, this network has {value!r}")
    full = {**DEFAULTS, **CLASS_DEFAULTS[kind], **config}
    if full["in_channels"] != full["out_channels"]:
        raise UserError(
            f"{where} has in_channels {full['in_channels']} and out_channels "
            f"{full['out_channels']}; they must be the same"
        )
    widths = positive_integers(full, "block_out_channels", where)
    if any(width % widths[0] for width in widths):
        raise UserError(
            f"{where} has block_out_channels {widths}; all must be multiples of the first"
        )
    attention = _attention(full, len(widths), where)
    z_channels = positive_integer(full, "latent_channels", where)
    fields = dict(
        image_channels=positive_integer(full, "in_channels", where),
        z_channels=z_channels,
        embed_dim=z_channels,
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=positive_integer(full, "layers_per_block", where),
        attention_levels=tuple(level for level, attends in enumerate(attention) if attends),
        mid_attention=boolean(full, "mid_block_add_attention", True, where),
        num_groups=positive_integer(full, "norm_num_groups", where),
    )
    if kind == "vq":
        fields["codebook_size"] = positive_integer(full, "num_vq_embeddings", where)
        if full["vq_embed_dim"] is not None:
            fields["embed_dim"] = positive_integer(full, "vq_embed_dim", where)
    return kind, fields, checked_scale(full["scaling_factor"], where)


def checked_scale(factor: Any, where: str) -> float:
    """A scaling factor of latents, which are multiplied by it and divided, in float32.

    Raises:
      UserError: it is no number that this can be done with.
    """
    range_of = np.finfo(np.float32)
    if not _is_number(factor) or not float(range_of.tiny) <= factor <= float(range_of.max):
        raise UserError(
            f"{where} has scaling_factor {factor!r:.60}; it must be a finite number above 0"
        )
    return float(factor)


def number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A config's entry that must be a finite number; else a UserError that names it."""
    value = config.get(key, default)
    if not _is_number(value) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{where} has {key} {value!r:.60}; it must be a finite number")
    return float(value)


def integer(
    config: Mapping[str, Any], key: str, default: int, where: str, least: int, most: int
) -> int:
    """A config's entry that must be an integer in a range; else a UserError that names it."""
    value = config.get(key, default)
    if isinstance(value, float) and value.is_integer():  # as YAML's converters write them
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise UserError(
            f"{where} has {key} {value!r:.60}; it must be an integer of {least} to {most}"
        )
    return value


def boolean(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A config's entry that must be true, false or, which is as false in diffusers, null."""
    value = config.get(key, default)
    if not isinstance(value, bool | None):
        raise UserError(f"{where} has {key} {value!r:.60}; it must be true or false")
    return bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_config(
    kind: str, fields: Mapping[str, Any], scaling_factor: float | None, image_size: int
) -> dict[str, Any]:
    """The `config.json` of a network.

    Raises:
      UserError: diffusers has no such network.
    """
    name, multipliers = CLASSES[kind], tuple(fields["channel_multipliers"])
    if fields.get("levels"):
        raise UserError(
            f"diffusers' {name} has a codebook; it cannot express finite scalar quantisation"
        )
    if multipliers[0] != 1:
        raise UserError(
            f"diffusers' {name} has the first level as wide as the first convolution; it cannot "
            f"express channel_multipliers {multipliers}, which must begin with 1"
        )
    if kind == "kl" and fields["z_channels"] != fields["embed_dim"]:
        raise UserError(
            f"diffusers' {name} has one number of latent channels; it cannot express z_channels "
            f"{fields['z_channels']} with embed_dim {fields['embed_dim']}"
        )
    attends = [level in fields["attention_levels"] for level in range(len(multipliers))]
    config = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": [fields["channels"] * m for m in multipliers],
        "down_block_types": [ATTENTION_DOWN if attend else DOWN for attend in attends],
        "in_channels": fields["image_channels"],
        "latent_channels": fields["z_channels"],
        "layers_per_block": fields["num_res_blocks"],
        "mid_block_add_attention": fields["mid_attention"],
        "norm_num_groups": fields["num_groups"],
        "out_channels": fields["image_channels"],
        "sample_size": image_size,
        "scaling_factor": 1.0 if scaling_factor is None else float(scaling_factor),
        "up_block_types": [ATTENTION_UP if attend else UP for attend in reversed(attends)],
    }
    if kind == "vq":
        config["num_vq_embeddings"] = fields["codebook_size"]
        config["vq_embed_dim"] = fields["embed_dim"]
    return config


def _attention(config: Mapping[str, Any], levels: int, where: str) -> list[bool]:
    """Which levels attend, the highest resolution first."""
    found = []
    for key, plain, attending in (
        ("down_block_types", DOWN, ATTENTION_DOWN),
        ("up_block_types", UP, ATTENTION_UP),
    ):
        types = config[key]
        if not isinstance(types, list | tuple) or any(
            kind not in (plain, attending) for kind in types
        ):
            raise UserError(f"{where} has {key} {types}; known are {plain} and {attending}")
        if len(types) != levels:
            raise UserError(
                f"{where} has {len(types)} {key} and {levels} block_out_channels; there must be "
                f"as many"
            )
        found.append([kind == attending for kind in types])
    down, up = found[0], found[1][::-1]
    if down != up:
        raise UserError(
            f"{where} has attention on different levels of encoder and decoder; here they must "
            f"be the same"
        )
    return down
