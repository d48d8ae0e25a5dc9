"""Classifier-free guidance (Ho and Salimans, 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def classifier_free(
    predict_epsilon: Callable[[jax.Array, jax.Array, Any], jax.Array],
    cond: Any,
    null_cond: Any,
    guidance_scale: jax.Array,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A predictor that moves from the unconditional prediction through the conditional one.

    epsilon = epsilon_null + guidance_scale * (epsilon_cond - epsilon_null): 1 is the conditional
    model, 0 the unconditional one. Both halves run as one batch of 2B.

    Args:
      predict_epsilon: (z_t [B, ...], t [B], cond) -> epsilon [B, ...].
      cond: condition, a pytree of arrays with leading axis B.
      null_cond: what stands for "no condition", a pytree like `cond`.
      guidance_scale: scalar, may be traced.

    Returns:
      (z_t, t) -> epsilon.
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null_cond)

    def guided(z_t: jax.Array, t: jax.Array) -> jax.Array:
        epsilon = predict_epsilon(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), both)
        epsilon_cond, epsilon_null = jnp.split(epsilon, 2)
        return epsilon_null + guidance_scale * (epsilon_cond - epsilon_null)

    return guided
