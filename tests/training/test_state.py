"""Randomness by global sample index."""

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.training.state import sample_keys


def key_data(step, batch_size):
    keys = sample_keys(jax.random.key(0), jnp.asarray(step, jnp.int32), batch_size)
    return np.asarray(jax.random.key_data(keys))


def test_keys_depend_on_the_global_index_alone():
    # Examples 16..31 are step 1 of batches of 16 and steps 2 and 3 of batches of 8.
    np.testing.assert_array_equal(key_data(1, 16), np.concatenate([key_data(2, 8), key_data(3, 8)]))
    seen = np.concatenate([key_data(step, 8) for step in range(10)])
    assert len(np.unique(seen, axis=0)) == 80
