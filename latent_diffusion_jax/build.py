"""From a config to data, networks and stages: the one place where config sections become objects.

The keys of a section are the arguments of what it builds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax.conditioning import base, class_label, text
from latent_diffusion_jax.conditioning.base import Conditioning
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.data import latents, pipeline
from latent_diffusion_jax.data.latents import LatentSource
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.diffusion.losses import Objective
from latent_diffusion_jax.diffusion.plan import Plan
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.class_embedding import ClassEmbedding
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sampling import Request, Settings, make_draw, make_plan
from latent_diffusion_jax.training import autoencoder_stage, diffusion_stage
from latent_diffusion_jax.training.autoencoder_losses import AutoencoderLosses
from latent_diffusion_jax.training.codebook import CodebookAverage
from latent_diffusion_jax.training.optimizer import make_optimizer
from latent_diffusion_jax.training.state import Stage, with_precision
from latent_diffusion_jax.weights import lpips as lpips_weights

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
AUTOENCODERS = {"kl": AutoencoderKL, "vq": AutoencoderVQ}
# What a second stage is told, and the sections of the config that it needs.
CONDITIONINGS = {
    "none": (),
    "class": ("class_embedding",),
    "text": ("tokenizer", "text_encoder"),  # both trained here
    "clip": ("clip",),  # a frozen text encoder
}


def network_fields(section: ConfigDict) -> dict[str, Any]:
    """A section as keyword arguments, the dtype's name replaced by the dtype."""
    return dict(section) | {"dtype": DTYPES[section.dtype]}


def image_channels(config: ConfigDict) -> int:
    """Of the images: those of the first stage, or of the UNet where there is none."""
    if "first_stage" in config:
        return config.first_stage.autoencoder.image_channels
    return config.data.image_channels


def data_sources(config: ConfigDict) -> tuple[pipeline.DecodedSource, pipeline.DecodedSource]:
    """The training and the held-out split, checked for damaged images."""
    data, sources = config.data, []
    for split in (data.train_split, data.test_split):
        records = open_source(
            data.name,
            split,
            data_dir=data.data_dir or None,
            image_key=data.image_key,
            caption_key=data.caption_key,
            caption_template=data.caption_template,
            holdout_share=data.holdout_share,
        )
        if not len(records):
            raise UserError(f"split {split!r} of data {data.name!r} is empty")
        source = pipeline.DecodedSource(
            records, data.max_damaged_share, image_channels(config), data.retry_seconds
        )
        source.check(data.check_images, data.num_threads)
        sources.append(source)
    train, test = sources
    if _conditioning(config) == "class":
        names, others = train.records.label_names, test.records.label_names
        if list(names) != list(others):
            raise UserError(
                f"conditioning='class' needs labels in both splits of data {data.name!r}: "
                f"{data.train_split!r} has {len(names)} classes, {data.test_split!r} has "
                f"{len(others)} (images beside a folder's classes have none)"
            )
    return train, test


def _conditioning(config: ConfigDict) -> str:
    return config.conditioning if "diffusion" in config.stages else "none"


def latent_sources(config: ConfigDict) -> tuple[LatentSource, LatentSource]:
    """The training and the held-out split of `data.latents`, checked against the config."""
    data = config.data
    train, test = (
        LatentSource(data.latents, split, data.retry_seconds) for split in latents.SPLITS
    )
    latents.check_use(train.index, data.latents, data.image_size, data.random_flip)
    kind = _conditioning(config)
    if kind == "text" and train.index.get("data", {}).get("caption_key") == "":
        raise UserError(
            f"conditioning={kind!r} needs captions, and the latents in {data.latents} were encoded "
            "without: encode again with --config.data.caption_key, where the data has some"
        )
    for split, source in zip(latents.SPLITS, (train, test), strict=True):
        if kind == "class" and source[0]["label"] is None:
            raise UserError(
                f"conditioning='class' needs labels, and the latents in {data.latents} have none "
                f"in the split {split!r}"
            )
    return train, test


def example_maker(
    config: ConfigDict, conditioning: Conditioning = base.UNCONDITIONAL
) -> pipeline.Prepare:
    """How a record becomes an example: `image` or `moments`, and the condition's inputs."""
    data = config.data

    def prepare(record: dict[str, Any], rng: np.random.Generator | None) -> pipeline.Example:
        if "moments" in record:
            example = {"moments": latents.latent_example(record, rng, data.random_flip)}
        else:
            example = {
                "image": pipeline.image_example(
                    record, rng, data.image_size, data.random_flip, data.resize
                )
            }
        return example | conditioning.prepare(record, rng)

    return prepare


def autoencoder(config: ConfigDict) -> AutoencoderKL | AutoencoderVQ:
    fields = network_fields(config.first_stage.autoencoder)
    return AUTOENCODERS[config.first_stage.kind](**fields, precision=config.first_stage.precision)


def perceptual_params(config: ConfigDict) -> Any:
    """Parameters of LPIPS from the config's file; None, and a log line, where it names none."""
    weights = config.first_stage.loss.lpips_weights
    if not weights:
        logging.info(
            "perceptual loss: off, no LPIPS weights given (first_stage.loss.lpips_weights)"
        )
        return None
    return lpips_weights.load(weights)


def first_stage(config: ConfigDict) -> Stage:
    """The autoencoder's training stage; `State.frozen` is what `perceptual_params` gives."""
    section = config.first_stage
    num_steps = section.num_steps
    size = config.data.image_size
    losses = dict(section.loss)
    lpips_file, lpips_dtype = losses.pop("lpips_weights"), DTYPES[losses.pop("lpips_dtype")]
    lpips = LPIPS(dtype=lpips_dtype, precision=section.precision) if lpips_file else None

    def perceptual(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        assert lpips is not None
        return lpips.apply({"params": params}, x, y)

    codebook_average = None
    if section.kind == "vq" and section.codebook.decay:
        codebook_average = CodebookAverage(**section.codebook)
    # The discriminator's schedule counts from its own first update.
    disc_steps = max(num_steps - section.loss.disc_start, 1)
    network = autoencoder(config)
    stage = autoencoder_stage.make_stage(
        network,
        PatchDiscriminator(**network_fields(section.discriminator), precision=section.precision),
        {
            "autoencoder": make_optimizer(num_steps, **section.optimizer),
            "discriminator": make_optimizer(disc_steps, **section.discriminator_optimizer),
        },
        (size, size, section.autoencoder.image_channels),
        AutoencoderLosses(**losses),
        perceptual=perceptual if lpips is not None else None,
        trained=section.trained,
        ema_decay=section.ema_decay,
        codebook_average=codebook_average,
        accumulation=section.accumulation,
        param_dtype=section.param_dtype,
        ema_dtype=section.ema_dtype,
    )
    return with_precision(stage, section.precision, network.dtype)


def computing_in(ldm: LatentDiffusion, dtype: str) -> LatentDiffusion:
    """The model with all networks computing in another dtype, one of `DTYPES`."""
    networks = {
        name: network.clone(dtype=DTYPES[dtype])
        for name in ("autoencoder", "conditioner", "unet")
        if (network := getattr(ldm, name)) is not None
    }
    return dataclasses.replace(ldm, **networks)


def latent_diffusion(
    config: ConfigDict,
    vocab_size: int = 0,
    max_length: int = 0,
    *,
    num_labels: int = 0,
    clip: Mapping[str, Any] | None = None,
) -> LatentDiffusion:
    """The networks of both stages.

    Args:
      config: of the run.
      vocab_size, max_length: of the tokenizer, with conditioning "text".
      num_labels: of the data, with conditioning "class".
      clip: fields of the text encoder, with conditioning "clip".
    """
    conditioner: TextTransformer | ClassEmbedding | ClipTextEncoder | None = None
    num_classes = 0  # that the UNet embeds
    if config.conditioning == "text":
        conditioner = TextTransformer(
            vocab_size=vocab_size,
            max_length=max_length,
            **network_fields(config.text_encoder),
            precision=config.precision,
        )
    elif config.conditioning == "clip":
        given = {"dtype": DTYPES[config.clip.dtype], "precision": config.precision}
        conditioner = ClipTextEncoder(**{**(clip or {}), **given})
    elif config.conditioning == "class" and config.class_embedding.width:
        width, dtype = config.class_embedding.width, DTYPES[config.unet.dtype]
        conditioner = ClassEmbedding(num_labels + 1, width, dtype)
    elif config.conditioning == "class":
        num_classes = num_labels + 1
    first = autoencoder(config) if "first_stage" in config else None
    channels = first.embed_dim if first is not None else image_channels(config)
    learned_variance = config.objective.learned_variance
    unet = UNet(
        out_channels=channels * (2 if learned_variance else 1),
        num_classes=num_classes,
        **network_fields(config.unet),
        precision=config.precision,
    )
    return LatentDiffusion(
        first,
        conditioner,
        unet,
        make_schedule(**config.schedule),
        config.data.image_size,
        config.objective.prediction_type,
        learned_variance,
        trained_conditioner=config.conditioning != "clip",
    )


def make_conditioning(
    config: ConfigDict, tokenizer: PromptTokenizer | None, num_labels: int
) -> Conditioning:
    """The host half of what the config's second stage is told.

    Args:
      config: of the run.
      tokenizer: with a text encoder.
      num_labels: of the data, with conditioning "class".

    Raises:
      UserError: `sample.labels` has a label that the data has not.
    """
    if tokenizer is not None:
        return text.caption_conditioning(tokenizer, config.sample.prompts)
    if config.conditioning == "class":
        previews = config.sample.labels
        if max(previews) >= num_labels:
            raise UserError(f"sample.labels={tuple(previews)}: the data has {num_labels} labels")
        return class_label.label_conditioning(num_labels, previews)
    return base.UNCONDITIONAL


def sample_plan(config: ConfigDict) -> Plan:
    """The plan of the config's sampler, without its networks.

    Raises:
      ValueError: the section `sample` does not fit schedule and objective.
    """
    return make_plan(
        make_schedule(**config.schedule),
        config.objective.prediction_type,
        sample_settings(config),
    )


def sample_settings(config: ConfigDict) -> Settings:
    """What the config's section `sample` says of how to sample."""
    names = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in config.sample.items() if name in names})


def second_stage(config: ConfigDict, ldm: LatentDiffusion, conditioning: Conditioning) -> Stage:
    """The training stage of the UNet and, where it is trained, the conditioner.

    Args:
      config: of the run.
      ldm: what `latent_diffusion` gave.
      conditioning: what `make_conditioning` gave.
    """
    stage = diffusion_stage.make_stage(
        ldm,
        make_optimizer(config.num_steps, **config.optimizer),
        conditioning,
        _previews(conditioning, config.sample.batch_size),
        objective=Objective(**config.objective),
        condition_dropout=config.condition_dropout,
        ema_decay=config.ema_decay,
        draw=make_draw(ldm, ldm.image_size, ldm.image_size),
        plan=sample_plan(config),
        accumulation=config.accumulation,
        param_dtype=config.param_dtype,
        ema_dtype=config.ema_dtype,
    )
    return with_precision(stage, config.precision, ldm.unet.dtype)


def _previews(conditioning: Conditioning, batch_size: int) -> Request:
    """What previews draw; image i has seed i, as with the command that samples."""
    inputs = {name: jnp.asarray(rows) for name, rows in conditioning.previews.items()}
    count = len(next(iter(inputs.values()))) if inputs else batch_size
    seeds = jnp.arange(count, dtype=jnp.uint32)
    if not inputs:
        return Request(seeds)
    null = {
        name: jnp.broadcast_to(jnp.asarray(value), inputs[name].shape)
        for name, value in conditioning.null.items()
    }
    return Request(seeds, inputs, null)
