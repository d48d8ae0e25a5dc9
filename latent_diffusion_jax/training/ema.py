"""Exponential moving average of parameters."""

from typing import Any

import jax
import jax.numpy as jnp


def decay_at(step: jax.Array, decay: float) -> jax.Array:
    """The decay for update number `step` (from 0): min(decay, (1 + n) / (10 + n)), as in LDM."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """ema + (1 - decay) (params - ema), leaf by leaf, in the average's dtype."""
    rate = 1.0 - decay_at(step, decay)

    def updated(e: jax.Array, p: jax.Array) -> jax.Array:
        wide = e.astype(jnp.promote_types(e.dtype, jnp.float32))
        return (wide + rate * (p - wide)).astype(e.dtype)

    return jax.tree.map(updated, ema, params)
