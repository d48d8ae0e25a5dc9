"""What is wrong with a config, found before anything is built from it or any work is done."""

from typing import Any

from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.diffusion.schedules import BETAS
from latent_diffusion_jax.runtime.commands import flatten
from latent_diffusion_jax.runtime.errors import UserError

STAGES = ("first_stage", "diffusion")

AT_LEAST_ONE = (
    "batch_size",
    "num_steps",
    "log_every",
    "eval_every",
    "eval_examples",
    "checkpoint_every",
    "keep_checkpoints",
    "data.image_size",
    "data.num_threads",
    "first_stage.batch_size",
    "first_stage.num_steps",
    "first_stage.scale_examples",
    "first_stage.autoencoder.z_channels",
    "first_stage.autoencoder.embed_dim",
    "first_stage.autoencoder.channels",
    "first_stage.autoencoder.num_res_blocks",
    "first_stage.autoencoder.num_groups",
    "first_stage.discriminator.channels",
    "first_stage.discriminator.num_layers",
    "tokenizer.num_examples",
    "text_encoder.width",
    "text_encoder.depth",
    "text_encoder.num_heads",
    "text_encoder.head_dim",
    "unet.channels",
    "unet.num_groups",
    "unet.head_dim",
    "unet.num_res_blocks",
    "unet.transformer_depth",
    "schedule.num_timesteps",
    "sample.steps",
    "sample.batch_size",
)
IN_UNIT_INTERVAL = (
    "caption_dropout",
    "ema_decay",
    "data.holdout_share",
    "data.max_damaged_share",
    "sample.eta",
)
NAMES: dict[str, Any] = {
    "first_stage.autoencoder.dtype": build.DTYPES,
    "text_encoder.dtype": build.DTYPES,
    "unet.dtype": build.DTYPES,
    "schedule.name": BETAS,
    "sample.sampler": SAMPLERS,
}


def check_config(config: ConfigDict) -> None:
    """Raises UserError, naming the key, for values that could not work."""
    values = flatten(config)
    try:
        _check_values(config, values)
    except (KeyError, AttributeError) as error:  # ml_collections names the key
        raise UserError(f"the config lacks a key: {error}") from error


def _check_values(config: ConfigDict, values: dict[str, Any]) -> None:
    for key in AT_LEAST_ONE:
        if values[key] < 1:
            raise UserError(f"{key}={values[key]} must be at least 1")
    for key in ("seed", "data.check_images"):
        if values[key] < 0:
            raise UserError(f"{key}={values[key]} must not be negative")
    for key in IN_UNIT_INTERVAL:
        if not 0.0 <= values[key] <= 1.0:
            raise UserError(f"{key}={values[key]} must be in [0, 1]")
    for key, known in NAMES.items():
        if values[key] not in known:
            raise UserError(f"unknown {key} {values[key]!r}; known: {', '.join(known)}")
    _check_stages(tuple(config.stages))
    for name in ("optimizer", "first_stage.optimizer", "first_stage.discriminator_optimizer"):
        if len(values[f"{name}.betas"]) != 2:
            raise UserError(f"{name}.betas={values[f'{name}.betas']} must be two numbers")
    low, high = config.schedule.beta_start, config.schedule.beta_end
    if not 0.0 < low <= high < 1.0:
        raise UserError(f"schedule: 0 < beta_start={low} <= beta_end={high} < 1 does not hold")
    if config.tokenizer.max_length < 3:
        raise UserError(
            f"tokenizer.max_length={config.tokenizer.max_length} must be at least 3: a caption "
            "stands between two other tokens"
        )
    if config.sample.steps > config.schedule.num_timesteps:
        raise UserError(
            f"sample.steps={config.sample.steps} must be at most schedule.num_timesteps="
            f"{config.schedule.num_timesteps}"
        )
    if not config.sample.prompts:
        raise UserError("sample.prompts is empty; previews need at least one prompt")
    _check_networks(config)


def _check_stages(stages: tuple[str, ...]) -> None:
    if not stages or set(stages) - set(STAGES):
        raise UserError(f"stages={stages}; known stages: {', '.join(STAGES)}")
    ordered = tuple(name for name in STAGES if name in stages)
    if stages != ordered:
        raise UserError(f"stages={stages} must be in the order {ordered}")


def _check_networks(config: ConfigDict) -> None:
    """Sizes that must divide one another."""
    first, unet, size = config.first_stage, config.unet, config.data.image_size
    for name, section in (("first_stage.autoencoder", first.autoencoder), ("unet", unet)):
        multipliers = tuple(section.channel_multipliers)
        if not multipliers or not all(isinstance(m, int) and m > 0 for m in multipliers):
            raise UserError(
                f"{name}.channel_multipliers={multipliers} must be positive numbers, one a level"
            )
        levels = range(len(section.channel_multipliers))
        if set(section.attention_levels) - set(levels):
            raise UserError(
                f"{name}.attention_levels={section.attention_levels} must be among {tuple(levels)}"
            )
        widths = [section.channels * multiplier for multiplier in section.channel_multipliers]
        if any(width % section.num_groups for width in (section.channels, *widths)):
            raise UserError(f"{name}.num_groups={section.num_groups} must divide {widths}")
    factor = build.autoencoder(config).downsampling_factor
    deeper = 2 ** (len(unet.channel_multipliers) - 1)
    if size % (factor * deeper):
        raise UserError(
            f"data.image_size={size} must be a multiple of {factor * deeper}: the autoencoder "
            f"divides it by {factor}, the UNet by {deeper} more"
        )
    if size // 2**first.discriminator.num_layers < 3:
        raise UserError(
            f"data.image_size={size} is too small for a discriminator of "
            f"first_stage.discriminator.num_layers={first.discriminator.num_layers}"
        )
    if first.autoencoder.image_channels != 3:
        raise UserError("first_stage.autoencoder.image_channels must be 3: images are read as RGB")
    attended = [unet.channels * unet.channel_multipliers[i] for i in (*unet.attention_levels, -1)]
    if any(width % unet.head_dim for width in attended):
        raise UserError(f"unet.head_dim={unet.head_dim} must divide the attended widths {attended}")
