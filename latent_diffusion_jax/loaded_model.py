"""A model to draw with, wherever it was loaded from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.sampling import Settings, check
from latent_diffusion_jax.weights import autoencoders, diffusers, schedulers, unets
from latent_diffusion_jax.weights.text_encoders import Loaded

USUAL_STEPS, USUAL_SCALE = 50, 7.5


@dataclasses.dataclass(frozen=True)
class Model:
    """All that it takes to draw.

    Attributes:
      ldm: the networks.
      params: of the networks, see `LatentDiffusion`.
      tokenizer: None for an unconditional model.
      settings: how to sample where nothing else is said.
      batch_size: images drawn at once on each device where nothing else is said.
      sees_mask: the UNet takes a mask and the masked image's latents beside z_t.
      label_names: names of the classes that it draws, where they are known.
      null_label: what stands for no class; None where it has no such label, or no classes.
      config: that it was trained with; None for others' checkpoints.
    """

    ldm: LatentDiffusion
    params: Any
    tokenizer: PromptTokenizer | None
    settings: Settings
    batch_size: int = 4
    sees_mask: bool = False
    label_names: Sequence[str] = ()
    null_label: int | None = None
    config: ConfigDict | None = None


def with_settings(model: Model, **chosen: Any) -> Model:
    """The model with other settings; those that are None stay."""
    given = {name: value for name, value in chosen.items() if value is not None}
    return dataclasses.replace(model, settings=dataclasses.replace(model.settings, **given))


def assembled(
    where: str,
    first: autoencoders.Loaded | None,
    scale_factor: float | None,
    text: Loaded | None,
    network: nn.Module | None,
    tokenizer: PromptTokenizer | None,
    unet: unets.Loaded,
    scheduler: schedulers.Loaded,
    image_size: int,
    null_label: int | None = None,
) -> Model:
    """The parts as one model, once they fit one another."""
    denoiser = UNet(**unet.fields)
    params: dict[str, Any] = {"unet": unet.params}
    autoencoder, channels = None, denoiser.out_channels
    if first is not None:
        autoencoder = autoencoders.NETWORKS[first.kind](**first.fields)
        params["autoencoder"] = first.params
        params["scale_factor"] = jnp.float32(diffusers.checked_scale(scale_factor, where))
        channels = autoencoder.embed_dim
    extra = unet.in_channels - channels
    if extra not in (0, channels + 1):
        raise UserError(
            f"the UNet of {where} takes {unet.in_channels} channels and the latents have "
            f"{channels}: it is of another first stage, or of a kind that is not supported"
        )
    if denoiser.vector_dim or (denoiser.num_classes and network is not None):
        raise UserError(
            f"the UNet of {where} takes {'labels beside text' if network else 'vectors'}, which is "
            f"not supported"
        )
    if extra and not isinstance(network, ClipTextEncoder | TextTransformer):
        raise UserError(
            f"the UNet of {where} takes {extra} channels beside the latents and no text, which is "
            f"not supported"
        )
    if network is None and unet.context_dim is not None:
        raise UserError(
            f"the UNet of {where} attends to vectors of {unet.context_dim} and there is no text "
            f"encoder to make them"
        )
    if network is not None and text is not None:
        if unet.context_dim != network.width:
            raise UserError(
                f"the UNet of {where} attends to vectors of {unet.context_dim}, its conditioner "
                f"gives {network.width}"
            )
        params["conditioner"] = text.params
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(scheduler.settings.keys() - known):
        raise UserError(f"{where} is of another version: it has the setting {unknown[0]!r}")
    timesteps = scheduler.schedule.num_timesteps
    usual = {"steps": min(USUAL_STEPS, timesteps), "guidance_scale": USUAL_SCALE}
    settings = Settings(**usual | scheduler.settings)
    with as_user_error(f"{where} says how to sample"):
        check(settings, timesteps)
    if tokenizer is None and null_label is None:
        settings = dataclasses.replace(settings, guidance_scale=1.0)
    ldm = LatentDiffusion(
        autoencoder,
        network,
        denoiser,
        scheduler.schedule,
        image_size,
        scheduler.prediction_type,
    )
    sees_mask = extra == channels + 1
    return Model(ldm, params, tokenizer, settings, sees_mask=sees_mask, null_label=null_label)
