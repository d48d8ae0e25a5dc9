"""Latent diffusion: the bundle of first stage, conditioner, UNet and schedule.

It holds the networks and says how they fit together, as pure functions of parameters. Training,
sampling and evaluation are elsewhere and take one of these.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.conditioning.base import Cond
from latent_diffusion_jax.conditioning.prompts import encode_chunks
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.class_embedding import ClassEmbedding
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.sharding import gathered

Params = Any
Inputs = Mapping[str, jax.Array]  # of a condition, by name, each with a leading axis B


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The networks of one model; parameters are always arguments.

    The parameters are one dict with the keys `autoencoder`, `scale_factor`, `conditioner`, `unet`;
    without those of a network that is None.

    Attributes:
      autoencoder: the first stage; None where diffusion is in the space of pixels.
      conditioner: token ids [B, L] -> context [B, L, D], or labels [B] -> context [B, 1, D]; None
        for an unconditional model, and for one whose UNet embeds the labels.
      unet: the denoiser.
      schedule: the forward process.
      image_size: pixels a side that it was trained on.
      prediction_type: what the UNet predicts, one of `PREDICTION_TYPES`.
      learned_variance: the UNet predicts variances too, in as many channels again.
      trained_conditioner: the second stage trains the conditioner; otherwise it is frozen.
    """

    autoencoder: AutoencoderKL | AutoencoderVQ | None
    conditioner: nn.Module | None
    unet: UNet
    schedule: NoiseSchedule
    image_size: int
    prediction_type: str = "epsilon"
    learned_variance: bool = False
    trained_conditioner: bool = True

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return self.autoencoder.downsampling_factor if self.autoencoder else 1

    @property
    def channels(self) -> int:
        """Of a latent."""
        if self.autoencoder is not None:
            return self.autoencoder.embed_dim
        return self.unet.out_channels // (2 if self.learned_variance else 1)

    @property
    def image_channels(self) -> int:
        return self.autoencoder.image_channels if self.autoencoder else self.channels

    @property
    def num_labels(self) -> int:
        """Labels that the model knows, with the one for "no label"; 0 where it takes none."""
        if isinstance(self.conditioner, ClassEmbedding):
            return self.conditioner.num_classes
        return self.unet.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent at the size that the model was trained on."""
        return self.shape_of(self.image_size, self.image_size)

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of `height` x `width` pixels.

        Raises:
          ValueError: the networks do not divide these.
        """
        step = self.factor * 2 ** (len(self.unet.channel_multipliers) - 1)
        if height < step or width < step or height % step or width % step:
            raise ValueError(
                f"height and width must be multiples of {step} for this model, got {height} and "
                f"{width}"
            )
        return height // self.factor, width // self.factor, self.channels

    def encode(self, params: Params, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Images [B, H, W, C] in [-1, 1] -> scaled latents of unit variance [B, h, w, c]."""
        if self.autoencoder is None:
            return images
        posterior = _apply(self.autoencoder, params["autoencoder"], images, method="encode")
        return posterior.sample(noise) * params["scale_factor"]

    def sample_latents(self, params: Params, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """What `encode` gives, from the posterior's moments [B, h, w, c'] as they were stored."""
        assert self.autoencoder is not None
        posterior = self.autoencoder.posterior.from_moments(moments)
        return posterior.sample(noise) * params["scale_factor"]

    def decode(self, params: Params, z_0: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, c] -> images [B, H, W, C], near [-1, 1] but not clipped."""
        if self.autoencoder is None:
            return z_0
        z = z_0 / params["scale_factor"]
        return _apply(self.autoencoder, params["autoencoder"], z, method="decode")

    def condition(self, params: Params, inputs: Inputs) -> Cond:
        """A condition's inputs -> condition.

        Args:
          params: of the networks.
          inputs: `tokens`, ids [B, L]; or [B, K, L] in chunks, with `weights` of the same shape;
            or `label` [B]; or nothing.
        """
        if "label" in inputs and self.conditioner is None:
            return Cond(vector=inputs["label"])
        if not inputs:
            return Cond()
        conditioner = self.conditioner
        assert conditioner is not None

        def encode(ids: jax.Array) -> jax.Array:
            return _apply(conditioner, params["conditioner"], ids)

        if "weights" in inputs:
            return Cond(context=encode_chunks(encode, inputs["tokens"], inputs["weights"]))
        return Cond(context=encode(inputs["label"] if "label" in inputs else inputs["tokens"]))

    def predict(
        self,
        params: Params,
        z_t: jax.Array,
        t: jax.Array,
        cond: Cond,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Noisy latents [B, h, w, c], timesteps [B] and a condition -> what the UNet predicts.

        With `dropout_keys` [B], as in training, the UNet's dropout is active.
        """
        if cond.concat is not None:
            z_t = jnp.concatenate([z_t, cond.concat.astype(z_t.dtype)], axis=-1)
        return _apply(self.unet, params["unet"], z_t, t, cond.context, cond.vector, dropout_keys)

    def init_trained(self, key: jax.Array, inputs: Inputs) -> Params:
        """Fresh parameters of what the second stage trains: the UNet and its conditioner.

        Args:
          key: random.
          inputs: of any condition, see `condition`.
        """
        key_conditioner, key_unet = jax.random.split(key)
        trained: dict[str, Any] = {}
        conditioner, shapes = self.conditioner, {}
        if conditioner is not None:
            (ids,) = inputs.values()

            def init(key: jax.Array) -> Params:
                return {"conditioner": conditioner.init(key, ids)["params"]}

            shapes = jax.eval_shape(init, key_conditioner)
            if self.trained_conditioner:
                trained |= init(key_conditioner)
        # The UNet's parameters depend on the shapes of its condition alone.
        shapes = jax.eval_shape(lambda params: self.condition(params, inputs), shapes)
        cond = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        latents, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros(1, jnp.int32)
        unet = self.unet.init(key_unet, latents, t, cond.context, cond.vector)
        return trained | {"unet": unet["params"]}


def _apply(network: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """`network.apply` of parameters that may be spread over devices."""
    return network.apply({"params": gathered(params, network.dtype)}, *args, **kwargs)
