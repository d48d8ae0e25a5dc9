"""From a config to data, networks and stages: the one place where config sections become objects.

The keys of a section are the arguments of what it builds.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax.conditioning import text
from latent_diffusion_jax.conditioning.tokenizers import encode
from latent_diffusion_jax.conditioning.tokenizers import max_length as token_length
from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime import checkpoints, sharding
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sampling import make_txt2img
from latent_diffusion_jax.training import autoencoder_stage, diffusion_stage
from latent_diffusion_jax.training.optimizer import make_optimizer
from latent_diffusion_jax.training.state import Stage
from latent_diffusion_jax.weights import lpips as lpips_weights

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def network_fields(section: ConfigDict) -> dict[str, Any]:
    """A section as keyword arguments, the dtype's name replaced by the dtype."""
    return dict(section) | {"dtype": DTYPES[section.dtype]}


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
        source = pipeline.DecodedSource(records, data.max_damaged_share)
        source.check(data.check_images, data.num_threads)
        sources.append(source)
    return sources[0], sources[1]


def example_maker(config: ConfigDict, tokenizer: tokenizers.Tokenizer | None) -> pipeline.Prepare:
    """How a record becomes an example: `image` and, with a tokenizer, `tokens`."""
    size, flip = config.data.image_size, config.data.random_flip

    def prepare(record: dict[str, Any], rng: np.random.Generator | None) -> pipeline.Example:
        example = {"image": pipeline.image_example(record, rng, size, flip)}
        if tokenizer is not None:
            example["tokens"] = text.caption_tokens(record, rng, tokenizer)
        return example

    return prepare


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    return AutoencoderKL(**network_fields(config.first_stage.autoencoder))


def perceptual_params(config: ConfigDict) -> Any:
    """Parameters of LPIPS from the config's file; None, and a log line, where it names none."""
    weights = config.first_stage.loss.lpips_weights
    if not weights:
        logging.info(
            "perceptual loss: off, no LPIPS weights given (first_stage.loss.lpips_weights)"
        )
        return None
    return lpips_weights.load(weights)


def perceptual_distance(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """LPIPS of two batches of images: [B]."""
    return LPIPS().apply({"params": params}, x, y)


def first_stage(config: ConfigDict) -> Stage:
    """The autoencoder's training stage; `State.frozen` is what `perceptual_params` gives."""
    section = config.first_stage
    num_steps = section.num_steps
    size = config.data.image_size
    # The discriminator's schedule counts from its own first update.
    disc_steps = max(num_steps - section.loss.disc_start, 1)
    return autoencoder_stage.make_stage(
        autoencoder(config),
        PatchDiscriminator(**section.discriminator),
        {
            "autoencoder": make_optimizer(num_steps, **section.optimizer),
            "discriminator": make_optimizer(disc_steps, **section.discriminator_optimizer),
        },
        (size, size, section.autoencoder.image_channels),
        kl_weight=section.loss.kl_weight,
        perceptual=perceptual_distance if section.loss.lpips_weights else None,
        perceptual_weight=section.loss.perceptual_weight,
        disc_start=section.loss.disc_start,
        disc_weight=section.loss.disc_weight,
    )


def latent_diffusion(config: ConfigDict, vocab_size: int, max_length: int) -> LatentDiffusion:
    """The networks of both stages."""
    conditioner = TextTransformer(
        vocab_size=vocab_size, max_length=max_length, **network_fields(config.text_encoder)
    )
    unet = UNet(
        out_channels=config.first_stage.autoencoder.embed_dim, **network_fields(config.unet)
    )
    schedule = make_schedule(**config.schedule)
    return LatentDiffusion(autoencoder(config), conditioner, unet, schedule, config.data.image_size)


def second_stage(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> Stage:
    """The UNet's and the conditioner's training stage."""
    ldm = latent_diffusion(config, tokenizer.get_vocab_size(), token_length(tokenizer))
    return diffusion_stage.make_stage(
        ldm,
        make_optimizer(config.num_steps, **config.optimizer),
        text.null_tokens(tokenizer),
        encode(tokenizer, config.sample.prompts),
        caption_dropout=config.caption_dropout,
        ema_decay=config.ema_decay,
        draw=make_txt2img(ldm, config.sample.sampler, config.sample.steps),
        guidance_scale=config.sample.guidance_scale,
        eta=config.sample.eta,
    )


def first_stage_step(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Step of a workdir's complete first stage.

    Raises:
      UserError: there is none.
    """
    directory = workdir / "first_stage"
    step = checkpoints.latest_step(directory)
    if step is None or step < config.first_stage.num_steps:
        raise UserError(f"{directory} holds no complete first stage; train it first (stages)")
    return step


def load_first_stage(
    config: ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """The frozen parameters `autoencoder` and `scale_factor` of a workdir's first stage.

    Raises:
      UserError: it is not there, not complete or damaged.
    """
    directory, step = workdir / "first_stage", first_stage_step(config, workdir)
    network, size = autoencoder(config), config.data.image_size
    images = jax.ShapeDtypeStruct((1, size, size, network.image_channels), np.float32)
    latent = size // network.downsampling_factor
    noise = jax.ShapeDtypeStruct((1, latent, latent, network.embed_dim), np.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images, noise)["params"]
    shapes = {"params": {"autoencoder": params}}
    wanted = checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))
    part = checkpoints.restore_part(directory, step, wanted)
    scale = np.float32(checkpoints.read_json(directory, step, "info")["scale_factor"])
    return {
        "autoencoder": part["params"]["autoencoder"],
        "scale_factor": jax.device_put(scale, sharding.replicated(mesh)),
    }
