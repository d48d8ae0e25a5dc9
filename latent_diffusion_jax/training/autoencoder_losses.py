"""Losses of the first stage, from images and logits alone (LDM, appendix G; VQGAN)."""

import dataclasses

import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.quantizer import Quantized

PIXEL_LOSSES = ("l1", "l2")
REDUCTIONS = ("sum", "mean")
GENERATOR_LOSSES = ("linear", "non_saturating")
DISCRIMINATOR_LOSSES = ("hinge", "vanilla")
UPDATE_ORDERS = ("together", "generator_first")


def reconstruction_loss(
    images: jax.Array,
    reconstructions: jax.Array,
    perceptual: jax.Array | None = None,
    logvar: jax.Array | None = None,
    *,
    pixel_loss: str = "l1",
    reduction: str = "sum",
) -> jax.Array:
    """Negative log-likelihood of images, up to a constant; scalar.

    Args:
      images: [B, H, W, C] in [-1, 1].
      reconstructions: of the same shape.
      perceptual: weighted perceptual distance [B]. As in the reference it is added to every
        element, so with the sum it counts H * W * C times.
      logvar: log-variance of the output, scalar, by which the distance is scaled; None for 0.
      pixel_loss: `l1` (absolute difference) or `l2` (squared difference).
      reduction: over an image, `sum` (the references' KL autoencoders) or `mean` (their VQ
        autoencoders); over the batch it is always the mean.
    """
    difference = images - reconstructions
    distance = jnp.abs(difference) if pixel_loss == "l1" else jnp.square(difference)
    if perceptual is not None:
        distance = distance + perceptual[:, None, None, None]
    if logvar is not None:
        distance = distance / jnp.exp(logvar) + logvar
    return jnp.mean(distance) if reduction == "mean" else jnp.sum(distance) / images.shape[0]


def quantization_loss(quantized: Quantized, beta: float, beta_on_codebook: bool) -> jax.Array:
    """Codebook loss and commitment term of a batch; scalar (VQ-VAE, equation 3).

    Args:
      quantized: what the quantiser gave.
      beta: weight of one of the two, 0.25 in the references.
      beta_on_codebook: which one. The paper weighs the commitment term; taming-transformers, and
        so every checkpoint of LDM (`legacy=True`), the codebook's.
    """
    codebook, commitment = quantized.codebook_loss, quantized.commitment_loss
    loss = beta * codebook + commitment if beta_on_codebook else codebook + beta * commitment
    return jnp.mean(loss)


def generator_loss(logits_fake: jax.Array, kind: str = "linear") -> jax.Array:
    """The generator's side of a GAN; scalar.

    Args:
      logits_fake: of reconstructions.
      kind: `linear`, minus the mean logit, as the references have it with either discriminator
        loss; or `non_saturating`, -log D (Goodfellow et al., 2014).
    """
    if kind == "linear":
        return -jnp.mean(logits_fake)
    return jnp.mean(jax.nn.softplus(-logits_fake))


def discriminator_loss(
    logits_real: jax.Array, logits_fake: jax.Array, kind: str = "hinge"
) -> jax.Array:
    """The discriminator's side of a GAN; scalar.

    Args:
      logits_real: of images.
      logits_fake: of reconstructions.
      kind: `hinge` (Lim and Ye, 2017) or `vanilla` (cross-entropy).
    """
    if kind == "hinge":
        real, fake = jax.nn.relu(1.0 - logits_real), jax.nn.relu(1.0 + logits_fake)
    else:
        real, fake = jax.nn.softplus(-logits_real), jax.nn.softplus(logits_fake)
    return 0.5 * (jnp.mean(real) + jnp.mean(fake))


def lecam_penalty(
    logits_real: jax.Array, logits_fake: jax.Array, real_average: jax.Array, fake_average: jax.Array
) -> jax.Array:
    """LeCam regularisation (Tseng et al., 2021, equation 3): keeps logits near the moving averages
    of the other side's; scalar."""
    real = jnp.mean(jnp.square(jax.nn.relu(logits_real - fake_average)))
    fake = jnp.mean(jnp.square(jax.nn.relu(real_average - logits_fake)))
    return real + fake


def r1_penalty(image_grads: jax.Array) -> jax.Array:
    """R1 (Mescheder et al., 2018): half the squared norm of the logit's gradient; scalar.

    Args:
      image_grads: gradient of each real image's mean logit with respect to it, [B, H, W, C].
    """
    return 0.5 * jnp.mean(jnp.sum(jnp.square(image_grads), axis=(1, 2, 3)))


def adaptive_weight(reconstruction_grad: jax.Array, generator_grad: jax.Array) -> jax.Array:
    """Ratio of the two losses' gradient norms at the decoder's last layer (VQGAN, equation 7).

    Clipped to [0, 1e4]; balances the adversarial against the reconstruction term.
    """
    ratio = jnp.linalg.norm(reconstruction_grad) / (jnp.linalg.norm(generator_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


@dataclasses.dataclass(frozen=True)
class AutoencoderLosses:
    """Which losses train an autoencoder and its discriminator, and their weights.

    Attributes:
      pixel_loss: `l1` or `l2`.
      reduction: of the distance over an image, `sum` or `mean`.
      kl_weight: of the KL term (summed over a latent) of a KL autoencoder.
      codebook_weight: of `quantization_loss` of a VQ autoencoder.
      beta: see `quantization_loss`.
      beta_on_codebook: see `quantization_loss`.
      perceptual_weight: of LPIPS.
      logvar: log-variance of the output; the start value where it is learned.
      learn_logvar: whether it is trained (in the references it never is).
      disc_start: step from which the adversarial term counts. Before it neither network sees it
        and the discriminator is not trained.
      disc_weight: of the adversarial term, on top of the adaptive weight.
      adaptive_weight: whether the adversarial term is balanced at the decoder's last layer.
      generator_loss: `linear` or `non_saturating`.
      discriminator_loss: `hinge` or `vanilla`.
      r1_weight: of the gradient penalty on real images.
      lecam_weight: of the LeCam penalty.
      lecam_decay: of its moving averages of the logits.
      update_order: `together`, both networks from the same reconstructions; or
        `generator_first`, as the references do it: the discriminator then sees reconstructions of
        the autoencoder that was just updated, at the cost of one more forward pass.
    """

    pixel_loss: str
    reduction: str
    kl_weight: float
    codebook_weight: float
    beta: float
    beta_on_codebook: bool
    perceptual_weight: float
    logvar: float
    learn_logvar: bool
    disc_start: int
    disc_weight: float
    adaptive_weight: bool
    generator_loss: str
    discriminator_loss: str
    r1_weight: float
    lecam_weight: float
    lecam_decay: float
    update_order: str
