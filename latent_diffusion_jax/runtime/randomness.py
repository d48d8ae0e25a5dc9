"""Random numbers by sample: what an example or an image gets depends on its own key alone."""

import jax


def normal_per_key(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape], row i from keys[i] alone.

    A row so does not depend on the batch it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
