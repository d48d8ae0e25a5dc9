"""What is wrong with a config, found before anything is built from it or any work is done."""

import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.diffusion.losses import LOSSES, WEIGHTINGS
from latent_diffusion_jax.diffusion.noise_levels import SIGMAS, SPACINGS
from latent_diffusion_jax.diffusion.process import PREDICTION_TYPES
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.diffusion.schedules import BETAS
from latent_diffusion_jax.diffusion.solvers import VARIANCES
from latent_diffusion_jax.models import remat
from latent_diffusion_jax.models.discriminator import NORMS
from latent_diffusion_jax.models.precision import PRECISIONS
from latent_diffusion_jax.models.unet import ATTENTIONS
from latent_diffusion_jax.older_configs import VERSION
from latent_diffusion_jax.runtime.commands import flatten
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training import autoencoder_losses
from latent_diffusion_jax.training.autoencoder_stage import TRAINED
from latent_diffusion_jax.training.keeper import Keeping

STAGES = ("first_stage", "diffusion")

# Keys whose section the config has not are left out: a first stage alone needs no second.
SECTIONS = {
    "first_stage": ("first_stage",),
    "diffusion": ("conditioning", "init_from", "unet", "schedule", "objective", "optimizer",
                  "sample", "condition_dropout", "ema_decay", "batch_size", "accumulation",
                  "precision", "param_dtype", "ema_dtype", "num_steps", "keep_best"),
}  # fmt: skip
AT_LEAST_ONE = (
    "batch_size",
    "accumulation",
    "num_steps",
    "log_every",
    "eval_every",
    "eval_examples",
    "checkpoint_every",
    "keep_checkpoints",
    "data.image_size",
    "data.num_threads",
    "first_stage.batch_size",
    "first_stage.accumulation",
    "first_stage.num_steps",
    "first_stage.scale_examples",
    "first_stage.autoencoder.image_channels",
    "first_stage.autoencoder.z_channels",
    "first_stage.autoencoder.embed_dim",
    "first_stage.autoencoder.channels",
    "first_stage.autoencoder.num_res_blocks",
    "first_stage.autoencoder.num_groups",
    "first_stage.autoencoder.codebook_size",
    "first_stage.discriminator.channels",
    "first_stage.discriminator.num_layers",
    "tokenizer.num_examples",
    "text_encoder.width",
    "text_encoder.depth",
    "text_encoder.num_heads",
    "text_encoder.head_dim",
    "unet.channels",
    "unet.num_groups",
    "unet.num_res_blocks",
    "unet.transformer_depth",
    "schedule.num_timesteps",
    "sample.steps",
    "sample.batch_size",
)
IN_UNIT_INTERVAL = (
    "condition_dropout",
    "ema_decay",
    "data.holdout_share",
    "data.max_damaged_share",
    "first_stage.codebook.revive_below",
    "first_stage.loss.lecam_decay",
    "sample.eta",
    "sample.guidance_rescale",
)
OPTIMIZER_RANGES = {  # both ends included
    "learning_rate": (0.0, 1e36),
    "warmup_steps": (0, 1e12),
    "final_fraction": (0.0, 1.0),
    "weight_decay": (0.0, 1e3),
    "clip_norm": (0.0, 1e12),
}
MOST_IN_BFLOAT16 = 0.995  # decay of a moving average
AT_MOST = {
    "seed": 2**32 - 1,  # all bits that JAX takes of one
    "data.num_threads": 1024,
}
NUMBERS = ("first_stage.loss.logvar",)  # any
VQ_ONLY = ("first_stage.autoencoder.codebook_size", "first_stage.codebook.")
BELOW_ONE = ("first_stage.ema_decay", "first_stage.codebook.decay", "unet.dropout")
NOT_NEGATIVE = (
    "seed",
    "profile.after",
    "profile.steps",
    "first_stage.loss.disc_start",
    "max_skipped_steps",
    "keep_every",
    "grace_seconds",
    "data.retry_seconds",
    "unet.num_heads",
    "unet.head_dim",
    "data.check_images",
    "first_stage.loss.kl_weight",
    "first_stage.loss.codebook_weight",
    "first_stage.loss.beta",
    "first_stage.loss.perceptual_weight",
    "first_stage.loss.disc_weight",
    "class_embedding.width",
    "first_stage.loss.r1_weight",
    "first_stage.loss.lecam_weight",
    "objective.huber_delta",
    "objective.min_snr_gamma",
    "objective.p2_gamma",
    "objective.p2_k",
    "objective.offset_noise",
    "objective.vlb_weight",
    "sample.clip",
)
NAMES: dict[str, Any] = {
    "first_stage.kind": build.AUTOENCODERS,
    "first_stage.trained": TRAINED,
    "first_stage.precision": PRECISIONS,
    "first_stage.param_dtype": build.DTYPES,
    "first_stage.ema_dtype": build.DTYPES,
    "first_stage.optimizer.mu_dtype": build.DTYPES,
    "first_stage.optimizer.nu_dtype": build.DTYPES,
    "first_stage.discriminator_optimizer.mu_dtype": build.DTYPES,
    "first_stage.discriminator_optimizer.nu_dtype": build.DTYPES,
    "first_stage.autoencoder.dtype": build.DTYPES,
    "first_stage.autoencoder.remat": remat.POLICIES,
    "first_stage.discriminator.dtype": build.DTYPES,
    "first_stage.discriminator.norm": NORMS,
    "first_stage.loss.lpips_dtype": build.DTYPES,
    "first_stage.loss.pixel_loss": autoencoder_losses.PIXEL_LOSSES,
    "first_stage.loss.reduction": autoencoder_losses.REDUCTIONS,
    "first_stage.loss.generator_loss": autoencoder_losses.GENERATOR_LOSSES,
    "first_stage.loss.discriminator_loss": autoencoder_losses.DISCRIMINATOR_LOSSES,
    "first_stage.loss.update_order": autoencoder_losses.UPDATE_ORDERS,
    "precision": PRECISIONS,
    "param_dtype": build.DTYPES,
    "ema_dtype": build.DTYPES,
    "optimizer.mu_dtype": build.DTYPES,
    "optimizer.nu_dtype": build.DTYPES,
    "text_encoder.dtype": build.DTYPES,
    "conditioning": build.CONDITIONINGS,
    "clip.dtype": build.DTYPES,
    "unet.attention": ATTENTIONS,
    "unet.dtype": build.DTYPES,
    "unet.remat": remat.POLICIES,
    "schedule.name": BETAS,
    "objective.prediction_type": PREDICTION_TYPES,
    "objective.loss": LOSSES,
    "objective.weighting": WEIGHTINGS,
    "sample.sampler": SAMPLERS,
    "sample.variance": VARIANCES,
    "sample.spacing": SPACINGS,
    "sample.sigmas": SIGMAS,
}


def check_config(config: ConfigDict) -> None:
    """Raises UserError, naming the key, for values that could not work."""
    try:
        if config.version != VERSION:
            raise UserError(
                f"version={config.version!r} must be {VERSION}, that of this program's configs; "
                "what has changed since is in latent_diffusion_jax/older_configs.py"
            )
        _check_stages(tuple(config.stages))
        sections = {section for stage in config.stages for section in SECTIONS[stage]}
        lacking = sorted(section for section in sections if section not in config)
        if lacking:
            raise UserError(
                f"stages={tuple(config.stages)} need what the config has not: {', '.join(lacking)}"
            )
        _check_values(flatten(config))
        _check_optimizers(config)
        _check_kept_best(config)
        _check_image_size(config)
        if "first_stage" in config:
            _check_first_stage(config)
        if "diffusion" in config.stages:
            _check_conditioning(config)
            _check_second_stage(config)
    except (KeyError, AttributeError) as error:  # ml_collections names the key
        raise UserError(f"the config lacks a key: {error}") from error


def _check_values(values: dict[str, Any]) -> None:
    """Values that are wrong by themselves; keys of sections that the config has not are left out.

    Raises KeyError where a section is there and lacks a key.
    """
    sections = {key.split(".")[0] for key in values}

    def present(keys: Iterable[str]) -> list[tuple[str, Any]]:
        wanted = [key for key in keys if key.split(".")[0] in sections]
        if values.get("first_stage.kind") != "vq":
            wanted = [key for key in wanted if not key.startswith(VQ_ONLY)]
        return [(key, values[key]) for key in wanted]

    numbers = (*AT_LEAST_ONE, *NOT_NEGATIVE, *AT_MOST, *IN_UNIT_INTERVAL, *BELOW_ONE, *NUMBERS)
    for key, value in present(numbers):
        values_of = value if isinstance(value, tuple | list) else (value,)  # one for each level
        if not all(_is_number(v) and math.isfinite(v) for v in values_of):
            raise UserError(f"{key}={value!r} must be a number")
    for key, value in present(AT_LEAST_ONE):
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    for key, value in present(NOT_NEGATIVE):
        if value < 0:
            raise UserError(f"{key}={value} must not be negative")
    for key, value in present(AT_MOST):
        if value > AT_MOST[key]:
            raise UserError(f"{key}={value} must be at most {AT_MOST[key]}")
    for key, value in present(IN_UNIT_INTERVAL):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}={value} must be in [0, 1]")
    for key, value in present(BELOW_ONE):
        if not 0.0 <= value < 1.0:
            raise UserError(f"{key}={value} must be at least 0 and below 1")
    for key, value in present(NAMES):
        if value not in NAMES[key]:
            raise UserError(f"unknown {key} {value!r}; known: {', '.join(NAMES[key])}")


def _check_stages(stages: tuple[str, ...]) -> None:
    if not stages or set(stages) - set(STAGES):
        raise UserError(f"stages={stages}; known stages: {', '.join(STAGES)}")
    ordered = tuple(name for name in STAGES if name in stages)
    if stages != ordered:
        raise UserError(f"stages={stages} must be in the order {ordered}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _check_optimizers(config: ConfigDict) -> None:
    """Numbers with which an optimizer would make weights that are none, or turn them round."""
    trained = []
    if "first_stage" in config.stages:
        first = config.first_stage
        trained.append(("first_stage.optimizer", first.optimizer))
        if first.loss.disc_weight:
            trained.append(("first_stage.discriminator_optimizer", first.discriminator_optimizer))
        _check_follows(
            "first_stage.ema_dtype", first.ema_dtype, "first_stage.ema_decay", first.ema_decay
        )
    if "diffusion" in config.stages:
        trained.append(("optimizer", config.optimizer))
        _check_follows("ema_dtype", config.ema_dtype, "ema_decay", config.ema_decay)
    for where, values in trained:
        for key, (low, high) in OPTIMIZER_RANGES.items():
            if not _is_number(values[key]) or not low <= values[key] <= high:  # NaN is not
                raise UserError(f"{where}.{key}={values[key]} must be in [{low:g}, {high:g}]")
        betas = values.betas
        two = isinstance(betas, tuple | list) and len(betas) == 2
        if not two or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
            raise UserError(f"{where}.betas={betas} must be two numbers, at least 0 and below 1")
        if not _is_number(values.eps) or not 0.0 < values.eps < math.inf:
            raise UserError(f"{where}.eps={values.eps} must be positive")
        _check_follows(f"{where}.nu_dtype", values.nu_dtype, f"{where}.betas' second", betas[1])


def _check_follows(key: str, dtype: str, of_what: str, decay: float) -> None:
    """Bfloat16 rounds away what a slow moving average moves by: it would stay where it began."""
    if dtype == "bfloat16" and decay > MOST_IN_BFLOAT16:
        raise UserError(
            f"{key}='bfloat16' does not follow {of_what}={decay}: that takes 'float32', or at most "
            f"{MOST_IN_BFLOAT16}"
        )


def _check_kept_best(config: ConfigDict) -> None:
    """That figures by which the best checkpoints stay are among those of the held-out data."""
    if "first_stage" in config.stages:
        first = config.first_stage
        figures = ["l1", "psnr", *(["lpips"] if first.loss.lpips_weights else [])]
        Keeping(best=first.keep_best).check(figures, "first_stage.keep_best")
    if "diffusion" in config.stages:
        figures = ["loss", "mse", *(["vlb"] if config.objective.learned_variance else [])]
        Keeping(best=config.keep_best).check(figures, "keep_best")


def _check_network(name: str, section: ConfigDict) -> None:
    """Sizes of an autoencoder or a UNet that must fit one another."""
    multipliers = tuple(section.channel_multipliers)
    if not multipliers or not all(isinstance(m, int) and m > 0 for m in multipliers):
        raise UserError(
            f"{name}.channel_multipliers={multipliers} must be positive numbers, one a level"
        )
    levels = range(len(multipliers))
    if set(section.attention_levels) - set(levels):
        raise UserError(
            f"{name}.attention_levels={section.attention_levels} must be among {tuple(levels)}"
        )
    widths = [section.channels * multiplier for multiplier in multipliers]
    if any(width % section.num_groups for width in (section.channels, *widths)):
        raise UserError(f"{name}.num_groups={section.num_groups} must divide {widths}")


def _check_image_size(config: ConfigDict) -> None:
    size = config.data.image_size
    if config.data.resize not in (0, -1) and config.data.resize < size:
        raise UserError(
            f"data.resize={config.data.resize} must be 0 (the crop's size), -1 (images as they "
            f"are) or at least data.image_size={size}"
        )
    factor, deeper = 1, 1
    if "first_stage" in config:
        _check_network("first_stage.autoencoder", config.first_stage.autoencoder)
        factor = 2 ** (len(config.first_stage.autoencoder.channel_multipliers) - 1)
    elif config.data.latents:
        raise UserError("data.latents are a first stage's, and the config has none")
    if "diffusion" in config.stages:
        _check_network("unet", config.unet)
        deeper = 2 ** (len(config.unet.channel_multipliers) - 1)
    if size % (factor * deeper):
        parts = [("the autoencoder", factor), ("the UNet", deeper)]
        named = ", ".join(f"{name} divides it by {by}" for name, by in parts if by > 1)
        raise UserError(f"data.image_size={size} must be a multiple of {factor * deeper}: {named}")


def _check_first_stage(config: ConfigDict) -> None:
    first, size = config.first_stage, config.data.image_size
    network, loss = first.autoencoder, first.loss
    if first.batch_size % first.accumulation:
        raise UserError(
            f"first_stage.accumulation={first.accumulation} must divide first_stage.batch_size="
            f"{first.batch_size}"
        )
    if loss.disc_weight and size // 2**first.discriminator.num_layers < 3:
        raise UserError(
            f"data.image_size={size} is too small for a discriminator of "
            f"first_stage.discriminator.num_layers={first.discriminator.num_layers}"
        )
    if loss.lpips_weights and (network.image_channels != 3 or size < 16):
        raise UserError(
            f"first_stage.loss.lpips_weights: LPIPS compares images of 3 channels and at least 16 "
            f"pixels, these have {network.image_channels} and {size}"
        )
    if first.trained == "decoder" and not first.init_from:
        raise UserError(
            "first_stage.trained='decoder' needs first_stage.init_from: a workdir, a diffusers "
            "folder or a CompVis file with the autoencoder to finetune"
        )
    if first.kind == "vq":
        levels, averaged = tuple(network.levels), first.codebook.decay > 0
        if levels and (len(levels) != network.embed_dim or min(levels) < 3):
            raise UserError(
                f"first_stage.autoencoder.levels={levels} must be "
                f"first_stage.autoencoder.embed_dim={network.embed_dim} numbers, at least 3 each"
            )
        if averaged and (levels or first.trained == "decoder"):
            raise UserError(
                f"first_stage.codebook.decay={first.codebook.decay} needs a codebook that learns: "
                "no first_stage.autoencoder.levels, and first_stage.trained='all'"
            )


def _check_conditioning(config: ConfigDict) -> None:
    kind = config.conditioning
    lacking = [section for section in build.CONDITIONINGS[kind] if section not in config]
    if lacking:
        raise UserError(f"conditioning={kind!r} needs what the config has not: {lacking}")
    if kind == "clip" and not config.clip.path:
        raise UserError(
            "clip.path is empty; give a folder of diffusers that has text_encoder/ and tokenizer/"
        )
    # CLIP knows language already: some finetune without captions, on the empty one.
    if kind == "text" and not config.data.caption_key and not config.data.latents:
        raise UserError(
            f"conditioning={kind!r} needs captions, and data.caption_key='' says that there are "
            "none"
        )
    attends = kind in ("text", "clip") or (kind == "class" and config.class_embedding.width > 0)
    if attends and config.unet.attention == "self":
        raise UserError(
            f"unet.attention='self' attends to pixels alone, and conditioning={kind!r} needs "
            f"'transformer'"
        )
    key = {"class": "labels", "text": "prompts", "clip": "prompts"}.get(kind)
    if key and not config.sample[key]:
        raise UserError(f"sample.{key} is empty; previews need at least one")
    if kind == "class" and min(config.sample.labels) < 0:
        raise UserError(f"sample.labels={tuple(config.sample.labels)} must not be negative")
    if kind == "none" and config.sample.guidance_scale != 1.0:
        raise UserError(
            f"sample.guidance_scale={config.sample.guidance_scale} must be 1 with "
            f"conditioning='none': there is nothing to be guided by"
        )
    if kind == "text" and config.tokenizer.max_length < 3:
        raise UserError(
            f"tokenizer.max_length={config.tokenizer.max_length} must be at least 3: a caption "
            "stands between two other tokens"
        )


def _check_second_stage(config: ConfigDict) -> None:
    unet = config.unet
    if config.batch_size % config.accumulation:
        raise UserError(
            f"accumulation={config.accumulation} must divide batch_size={config.batch_size}"
        )
    low, high = config.schedule.beta_start, config.schedule.beta_end
    if not 0.0 < low <= high < 1.0:
        raise UserError(f"schedule: 0 < beta_start={low} <= beta_end={high} < 1 does not hold")
    if config.schedule.zero_terminal_snr and config.objective.prediction_type == "epsilon":
        raise UserError(
            "schedule.zero_terminal_snr needs objective.prediction_type='v' or 'z_0': epsilon says "
            "nothing of the image where all is noise"
        )
    if config.sample.steps > config.schedule.num_timesteps:
        raise UserError(
            f"sample.steps={config.sample.steps} must be at most schedule.num_timesteps="
            f"{config.schedule.num_timesteps}"
        )
    if config.sample.variance == "learned" and not config.objective.learned_variance:
        raise UserError("sample.variance='learned' needs objective.learned_variance")
    try:
        build.sample_plan(config)
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    if bool(unet.num_heads) == bool(unet.head_dim):
        raise UserError(
            f"unet.num_heads={unet.num_heads} and unet.head_dim={unet.head_dim}: one of them must "
            f"be 0 and the other not"
        )
    attended = [unet.channels * unet.channel_multipliers[i] for i in (*unet.attention_levels, -1)]
    for key in ("num_heads", "head_dim"):
        if unet[key] and any(width % unet[key] for width in attended):
            raise UserError(f"unet.{key}={unet[key]} must divide the attended widths {attended}")
