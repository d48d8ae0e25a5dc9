"""An autoencoder's latents in training: how images pass through them, and what holds them in
shape, for KL and VQ autoencoders alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.runtime.randomness import normal_per_key
from latent_diffusion_jax.runtime.sharding import gathered
from latent_diffusion_jax.training import codebook as codebooks
from latent_diffusion_jax.training.autoencoder_losses import AutoencoderLosses, quantization_loss


class Latents(NamedTuple):
    """The way through an autoencoder.

    Attributes:
      autoencoder: the network.
      losses: the weights.
      shape: (h, w, c) of a latent.
      fixed: whether the encoder has no gradient.
      average: see `make_stage`.
    """

    autoencoder: AutoencoderKL | AutoencoderVQ
    losses: AutoencoderLosses
    shape: tuple[int, int, int]
    fixed: bool
    average: codebooks.CodebookAverage | None

    @property
    def regularizer(self) -> str:
        """Name of the regularising term."""
        return "kl" if isinstance(self.autoencoder, AutoencoderKL) else "quantization"

    @property
    def weight(self) -> float:
        """Weight of the regularising term."""
        if isinstance(self.autoencoder, AutoencoderKL):
            return self.losses.kl_weight
        return self.losses.codebook_weight

    def autoencode(
        self, params: Any, images: jax.Array, keys: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """There and back, by a sample of the posterior.

        Args:
          params: of the autoencoder.
          images: [B, H, W, C] in [-1, 1].
          keys: of the posterior's noise, [B].

        Returns:
          ((reconstructions, the regularising term), latents and their indices where they are
          quantised).
        """
        network = self.autoencoder
        variables = {"params": gathered(params, network.dtype)}
        posterior = network.apply(variables, images, method="encode")
        if self.fixed:
            posterior = jax.lax.stop_gradient(posterior)
        if isinstance(network, AutoencoderKL):
            z = posterior.sample(normal_per_key(keys, self.shape))
            fake = network.apply(variables, z, method="decode")
            return (fake, jnp.mean(posterior.kl())), {}
        quantized = network.apply(variables, posterior.mean, method="quantize")
        if self.average is not None or self.fixed:  # the codebook has no gradient
            none = jnp.zeros_like(quantized.codebook_loss)
            quantized = quantized.replace(codebook_loss=none)
        loss = quantization_loss(quantized, self.losses.beta, self.losses.beta_on_codebook)
        fake = network.apply(variables, quantized.latents, method="decode_quantized")
        return (fake, loss), {"z": posterior.mean, "indices": quantized.indices}

    def statistics(self, found: dict[str, jax.Array]) -> tuple[Any, Any]:
        """What a micro-batch says of its codes: (what is averaged, latents for dead codes)."""
        if isinstance(self.autoencoder, AutoencoderKL):
            return {}, ()
        num_codes = self.autoencoder.num_codes
        if self.average is None:
            return {"shares": codebooks.usage(found["indices"], num_codes)}, ()
        z = jax.lax.stop_gradient(found["z"])
        return codebooks.statistics(z, found["indices"], num_codes), z.reshape(-1, z.shape[-1])
