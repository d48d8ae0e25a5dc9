"""Latent diffusion: the bundle of first stage, conditioner, UNet and schedule.

It holds the networks and says how they fit together, as pure functions of parameters. Training,
sampling and evaluation are elsewhere and take one of these.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.conditioning.base import Cond
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.unet import UNet

Params = Any


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The networks of one model; parameters are always arguments.

    The parameters are one dict with the keys `autoencoder`, `scale_factor`, `conditioner`, `unet`.
    """

    autoencoder: AutoencoderKL | AutoencoderVQ
    conditioner: nn.Module  # token ids [B, L] -> context [B, L, D]
    unet: UNet
    schedule: NoiseSchedule
    image_size: int  # pixels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        size = self.image_size // self.autoencoder.downsampling_factor
        return size, size, self.autoencoder.embed_dim

    def encode(self, params: Params, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Images [B, H, W, C] in [-1, 1] -> scaled latents of unit variance [B, h, w, c]."""
        posterior = self.autoencoder.apply(
            {"params": params["autoencoder"]}, images, method="encode"
        )
        return posterior.sample(noise) * params["scale_factor"]

    def sample_latents(self, params: Params, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """What `encode` gives, from the posterior's moments [B, h, w, c'] as they were stored."""
        posterior = self.autoencoder.posterior.from_moments(moments)
        return posterior.sample(noise) * params["scale_factor"]

    def decode(self, params: Params, z_0: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, c] -> images [B, H, W, C], near [-1, 1] but not clipped."""
        z = z_0 / params["scale_factor"]
        return self.autoencoder.apply({"params": params["autoencoder"]}, z, method="decode")

    def condition(self, params: Params, tokens: jax.Array) -> Cond:
        """Token ids [B, L] -> condition."""
        return Cond(context=self.conditioner.apply({"params": params["conditioner"]}, tokens))

    def predict_epsilon(
        self, params: Params, z_t: jax.Array, t: jax.Array, cond: Cond
    ) -> jax.Array:
        """Noisy latents [B, h, w, c], timesteps [B] and a condition -> epsilon [B, h, w, c]."""
        return self.unet.apply({"params": params["unet"]}, z_t, t, cond.context)

    def init_trained(self, key: jax.Array, max_length: int) -> Params:
        """Fresh parameters of the parts that the second stage trains: conditioner and UNet."""
        key_conditioner, key_unet = jax.random.split(key)
        tokens = jnp.zeros((1, max_length), jnp.int32)
        conditioner, variables = self.conditioner.init_with_output(key_conditioner, tokens)
        latents = jnp.zeros((1, *self.latent_shape))
        unet = self.unet.init(key_unet, latents, jnp.zeros(1, jnp.int32), conditioner)
        return {"conditioner": variables["params"], "unet": unet["params"]}
