"""Configs of diffusers' UNets: `UNet2DConditionModel` and `UNet2DModel`."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights.diffusers import VERSION, boolean
from latent_diffusion_jax.weights.folders import positive_integer, positive_integers
from latent_diffusion_jax.weights.messages import shown
from latent_diffusion_jax.weights.unet_common import Description, uniform

CLASSES = {"transformer": "UNet2DConditionModel", "self": "UNet2DModel"}
ATTENDING = {"transformer": "CrossAttn", "self": "Attn"}  # begins names of blocks
DOWN, UP = "DownBlock2D", "UpBlock2D"
RESNET_DOWN, RESNET_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"

# Values that diffusers assumes where a config does not say.
DEFAULTS: dict[str, Any] = {
    "dropout": 0.0,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + (DOWN,),
        "up_block_types": (UP,) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    },
    "self": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": (DOWN,) + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + (UP,),
        "downsample_type": "conv",
        "upsample_type": "conv",
    },
}
# What their networks can be beyond ours, with the one value that ours have.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": False,
    "dual_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
# Of LDM's networks and of DDPM's (Ho et al.); they go together.
CONVENTIONS: tuple[dict[str, Any], ...] = (
    {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
    {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
)
MIDDLES = {"transformer": "UNetMidBlock2DCrossAttn", "self": "UNetMidBlock2D"}


def read_config(config: Mapping[str, Any], where: str) -> Description:
    """The network that a `config.json` describes.

    Raises:
      UserError: the config is not of a UNet, or of one that ours cannot be.
    """
    kinds = {name: kind for kind, name in CLASSES.items()}
    class_name = str(config.get("_class_name"))
    if class_name not in kinds:
        raise UserError(
            f"{where} is for the class {shown(class_name)}; UNets are of {' and '.join(kinds)}"
        )
    kind = kinds[class_name]
    for key, value in (FIXED | {"mid_block_type": MIDDLES[kind]}).items():
        given = config.get(key, value)
        entries = given if isinstance(given, list | tuple) and given else [given]
        same = all(entry == value for entry in entries)
        if not same and (given is not None or key == "mid_block_type"):
            raise UserError(f"{where} has {key} {shown(given)}, this network has {value!r}")
    full = DEFAULTS | CLASS_DEFAULTS[kind] | dict(config)
    widths = positive_integers(full, "block_out_channels", where)
    if any(width % widths[0] for width in widths):
        raise UserError(
            f"{where} has block_out_channels {widths}; all must be multiples of the first"
        )
    attention_levels, resblock_updown = _blocks(full, kind, len(widths), where)
    fields = dict(
        out_channels=positive_integer(full, "out_channels", where),
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=_one(_by_level(full, "layers_per_block", len(widths), where),
                            "layers_per_block", where),
        attention_levels=attention_levels,
        attention=kind,
        scale_shift_norm=_choice(full, "resnet_time_scale_shift", ("default", "scale_shift"),
                                 where) == "scale_shift",
        resblock_updown=resblock_updown,
        as_in_ddpm=_as_in_ddpm(full, where),
        dropout=_number(full, "dropout", where),
        num_groups=positive_integer(full, "norm_num_groups", where),
        norm_epsilon=_number(full, "norm_eps", where),
        **_heads(full, kind, len(widths), where),
        **_vector(full, where),
    )  # fmt: skip
    context_dim, linear = None, False
    if kind == "self":
        groups = full.get("attn_norm_num_groups")
        if groups != fields["num_groups"] and (groups or fields["scale_shift_norm"]):
            raise UserError(
                f"{where} has attn_norm_num_groups {shown(groups)}, this network has as many as "
                f"norm_num_groups {fields['num_groups']}"
            )
    else:
        depths = _by_level(full, "transformer_layers_per_block", len(widths), where)
        fields["transformer_depth"] = uniform(depths)
        contexts = _by_level(full, "cross_attention_dim", len(widths), where)
        # As wide as the latents' features: the one context that all levels have is none.
        if contexts != widths or len(set(widths)) == 1:
            context_dim = _one(contexts, "cross_attention_dim", where)
        linear = boolean(full, "use_linear_projection", False, where)
    return Description(fields, positive_integer(full, "in_channels", where), context_dim, linear)


def make_config(
    network: UNet,
    in_channels: int,
    context_dim: int | None,
    sample_size: int,
    linear_projections: bool,
) -> dict[str, Any]:
    """The `config.json` of a network.

    Args:
      network: our UNet.
      in_channels: of its input.
      context_dim: as in `Description`.
      sample_size: height and width of the latents, which the config mentions.
      linear_projections: as in `Description`.

    Raises:
      UserError: diffusers has no such network.
    """
    kind, name = network.attention, CLASSES[network.attention]
    widths = [network.channels * multiplier for multiplier in network.channel_multipliers]
    levels = range(len(widths))

    def refuse(field: str) -> UserError:
        return UserError(f"diffusers' {name} cannot express {field} {getattr(network, field)!r}")

    if network.channel_multipliers[0] != 1:
        raise refuse("channel_multipliers")  # the first level is as wide as the first convolution
    if not network.conv_resample and len(widths) > 1 and not network.resblock_updown:
        raise refuse("conv_resample")
    if network.resblock_updown and kind == "transformer":
        raise refuse("resblock_updown")
    if network.vector_dim and kind == "self":
        raise refuse("vector_dim")
    plain = (RESNET_DOWN, RESNET_UP) if network.resblock_updown else (DOWN, UP)
    types = [
        [ATTENDING[kind] + end if level in network.attention_levels else block for level in levels]
        for block, end in zip(plain, (DOWN, UP), strict=True)
    ]
    config = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": types[0],
        **CONVENTIONS[network.as_in_ddpm],
        "dropout": network.dropout,
        "in_channels": in_channels,
        "layers_per_block": network.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": MIDDLES[kind],
        "norm_eps": network.norm_epsilon,
        "norm_num_groups": network.num_groups,
        "num_class_embeds": network.num_classes or None,
        "out_channels": network.out_channels,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift_norm else "default",
        "sample_size": sample_size,
        "up_block_types": types[1][::-1],
    }
    if kind == "self":
        sampling = "resnet" if network.resblock_updown else "conv"
        attended = {network.heads[level] for level in (*network.attention_levels, len(widths) - 1)}
        numbers, dims = {number for number, _ in attended}, {dim for _, dim in attended}
        if len(dims) > 1 and numbers != {1}:
            raise refuse("num_heads")
        return config | {
            "attention_head_dim": dims.pop() if len(dims) == 1 else None,
            "attn_norm_num_groups": network.num_groups if network.scale_shift_norm else None,
            "downsample_type": sampling,
            "upsample_type": sampling,
        }
    return config | {
        "attention_head_dim": _config_value([max(number, 1) for number, _ in network.heads]),
        "class_embed_type": "projection" if network.vector_dim else None,
        "projection_class_embeddings_input_dim": network.vector_dim or None,
        "cross_attention_dim": widths if context_dim is None else context_dim,
        "transformer_layers_per_block": _config_value(list(network.transformer_depths)),
        "use_linear_projection": linear_projections,
    }


def _config_value(values: list[int]) -> int | list[int]:
    value = uniform(values)
    return value if isinstance(value, int) else list(value)


def _blocks(
    config: Mapping[str, Any], kind: str, levels: int, where: str
) -> tuple[tuple[int, ...], bool]:
    """Levels that attend, the highest resolution first, and whether residual blocks resample."""
    found, resampling = [], set()
    for key, plain, resnet, sampler in (
        ("down_block_types", DOWN, RESNET_DOWN, "downsample_type"),
        ("up_block_types", UP, RESNET_UP, "upsample_type"),
    ):
        types, attending = config[key], ATTENDING[kind] + plain
        known = (plain, attending, resnet)
        if not isinstance(types, list | tuple) or any(block not in known for block in types):
            raise UserError(f"{where} has {key} {shown(types)}; known are {', '.join(known)}")
        if len(types) != levels:
            raise UserError(
                f"{where} has {len(types)} {key} and {levels} block_out_channels; there must be "
                f"as many"
            )
        own = "conv"
        if kind == "self":
            own = _choice(config, sampler, ("conv", "resnet"), where)
        ways = {plain: "conv", attending: own, resnet: "resnet"}
        resampling |= {ways[block] for block in types[:-1]}
        found.append([block == attending for block in types])
    if found[0] != found[1][::-1]:
        raise UserError(
            f"{where} has attention on different levels on the way down and up; here they must be "
            f"the same"
        )
    if len(resampling) > 1:
        raise UserError(
            f"{where} changes the resolution by convolutions in some of its down_block_types and "
            f"up_block_types and by residual blocks in others; here all do it alike"
        )
    return tuple(level for level, attends in enumerate(found[0]) if attends), (
        resampling == {"resnet"}
    )


def _as_in_ddpm(config: Mapping[str, Any], where: str) -> bool:
    """Which of `CONVENTIONS` a config follows."""
    given = {
        key: value if config.get(key) is None else config[key]
        for key, value in CONVENTIONS[False].items()
    }
    if given not in CONVENTIONS:
        raise UserError(
            f"{where} has {shown(given)}; known are "
            f"{' and '.join(str(known) for known in CONVENTIONS)}"
        )
    return given == CONVENTIONS[True]


def _heads(config: Mapping[str, Any], kind: str, levels: int, where: str) -> dict[str, Any]:
    """Number or channels of the heads.

    `UNet2DConditionModel` has the number under `attention_head_dim`, a mistake that was kept.
    """
    if kind == "transformer":
        key = "attention_head_dim"
        if config.get("num_attention_heads") is not None:
            key = "num_attention_heads"
        return {"num_heads": uniform(_by_level(config, key, levels, where))}
    if config["attention_head_dim"] is None:
        return {"num_heads": 1}
    return {"head_dim": positive_integer(config, "attention_head_dim", where)}


def _vector(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Fields of what is added to the timestep's embedding."""
    kind = _choice(config, "class_embed_type", (None, "projection"), where)
    if kind == "projection":
        return {"vector_dim": positive_integer(
            {"projection_class_embeddings_input_dim": None} | dict(config),
            "projection_class_embeddings_input_dim", where)}  # fmt: skip
    if config["num_class_embeds"] is None:
        return {}
    return {"num_classes": positive_integer(config, "num_class_embeds", where)}


def _by_level(config: Mapping[str, Any], key: str, levels: int, where: str) -> list[int]:
    """A config's entry that is a positive integer or one for each level."""
    value = config[key]
    values = positive_integers(
        {key: value if isinstance(value, list | tuple) else [value]}, key, where
    )
    if len(values) not in (1, levels):
        raise UserError(f"{where} has {key} {shown(value)}; it must have one entry for each level")
    return values * (levels // len(values))


def _one(values: list[int], key: str, where: str) -> int:
    if len(set(values)) > 1:
        raise UserError(f"{where} has {key} {values}; here it is the same on all levels")
    return values[0]


def _choice(config: Mapping[str, Any], key: str, known: tuple[Any, ...], where: str) -> Any:
    if config[key] not in known:
        raise UserError(
            f"{where} has {key} {shown(config[key])}; known are {', '.join(map(repr, known))}"
        )
    return config[key]


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where} has {key} {shown(value)}; it must be a number from 0 to 1")
    return float(value)
