"""Random numbers by sample: what an example or an image gets depends on its own key alone."""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normal_per_key(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape], row i from keys[i] alone.

    A row so does not depend on the batch it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def dropout(x: jax.Array, rate: float, keys: jax.Array, place: Sequence[str]) -> jax.Array:
    """Zeroes a share `rate` of the numbers and scales the others up, so that the mean stays.

    Args:
      x: [B, ...].
      rate: below 1.
      keys: of the examples [B]; row i of the mask depends on keys[i] alone.
      place: where in a network this is; other places have other masks.
    """
    number = zlib.crc32("/".join(place).encode())  # the same in every process, unlike `hash`

    def mask(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), jnp.zeros_like(x))
