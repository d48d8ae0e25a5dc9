"""Losses of the first stage, from reconstructions and logits alone (LDM, appendix G; VQGAN)."""

import jax
import jax.numpy as jnp


def reconstruction_loss(
    images: jax.Array, reconstructions: jax.Array, perceptual: jax.Array | None = None
) -> jax.Array:
    """L1, summed over an image and averaged over the batch; scalar.

    Args:
      images: [B, H, W, C] in [-1, 1].
      reconstructions: of the same shape.
      perceptual: weighted perceptual distance [B]. As in the reference it is added to every
        element before the sum, so it counts H * W * C times.
    """
    difference = jnp.abs(images - reconstructions)
    if perceptual is not None:
        difference = difference + perceptual[:, None, None, None]
    return jnp.sum(difference) / images.shape[0]


def generator_loss(logits_fake: jax.Array) -> jax.Array:
    """Hinge GAN, the generator's side: minus the mean logit of reconstructions."""
    return -jnp.mean(logits_fake)


def hinge_loss(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Hinge GAN, the discriminator's side (Lim and Ye, 2017)."""
    real = jnp.mean(jax.nn.relu(1.0 - logits_real))
    fake = jnp.mean(jax.nn.relu(1.0 + logits_fake))
    return 0.5 * (real + fake)


def adaptive_weight(reconstruction_grad: jax.Array, generator_grad: jax.Array) -> jax.Array:
    """Ratio of the two losses' gradient norms at the decoder's last layer (VQGAN, equation 7).

    Clipped to [0, 1e4]; balances the adversarial against the reconstruction term.
    """
    ratio = jnp.linalg.norm(reconstruction_grad) / (jnp.linalg.norm(generator_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))
