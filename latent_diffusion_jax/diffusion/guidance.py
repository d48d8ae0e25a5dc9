"""Classifier-free guidance (Ho and Salimans, 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.plan import Predict


def classifier_free(
    predict: Callable[[jax.Array, jax.Array, Any], jax.Array],
    cond: Any,
    null_cond: Any,
    rescale: jax.Array | float = 0.0,
    channels: int | None = None,
) -> Predict:
    """A predictor that moves from the unconditional prediction through the conditional one.

    prediction = null + guidance_scale * (cond - null): 1 is the conditional model, 0 the
    unconditional one. It is the same whatever is predicted, since epsilon, z_0 and v depend
    linearly on one another. Both halves run as one batch of 2B.

    Args:
      predict: (z_t [B, ...], t [B], cond) -> prediction [B, ...].
      cond: condition, a pytree of arrays with leading axis B.
      null_cond: what stands for "no condition", or for a negative prompt; a pytree like `cond`.
      rescale: share in [0, 1] of the result that is scaled to the standard deviation of the
        conditional prediction, against overexposure (Lin et al., 2024, section 3.4).
      channels: of z_t, where more channels are predicted; the rest, variances, is the conditional
        model's.

    Returns:
      (z_t, t, guidance_scale) -> prediction.
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null_cond)

    def guided(z_t: jax.Array, t: jax.Array, guidance_scale: jax.Array) -> jax.Array:
        found = predict(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), both)
        conditional, null = jnp.split(found, 2)
        variance = conditional[..., channels:] if channels is not None else conditional[..., :0]
        conditional, null = conditional[..., :channels], null[..., :channels]
        mixed = null + guidance_scale * (conditional - null)
        axes = tuple(range(1, mixed.ndim))
        deviation = jnp.std(mixed, axes, keepdims=True)
        ratio = jnp.std(conditional, axes, keepdims=True) / jnp.maximum(deviation, 1e-12)
        mixed *= 1.0 + rescale * (ratio - 1.0)
        return jnp.concatenate([mixed, variance], axis=-1)

    return guided


def unguided(predict: Callable[[jax.Array, jax.Array, Any], jax.Array], cond: Any) -> Predict:
    """The conditional model alone, at half the cost: guidance scales are ignored."""
    return lambda z_t, t, guidance_scale: predict(z_t, t, cond)
