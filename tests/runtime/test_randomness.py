"""Random numbers by sample: dropout whose masks do not depend on how a batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime.randomness import dropout

KEYS = jax.random.split(jax.random.key(0), 16)
PLACE = ("up_0_1_res",)


@pytest.fixture(scope="module")
def masked():
    return np.asarray(jax.jit(lambda keys: dropout(jnp.ones((16, 6, 5)), 0.25, keys, PLACE))(KEYS))


def test_rate_and_scale():
    x = jnp.full((16, 50, 50), 2.0)
    y = np.asarray(dropout(x, 0.25, KEYS, PLACE))
    assert set(np.unique(y)) == {0.0, np.float32(2.0 / 0.75)}
    # 40,000 draws: four standard deviations are 0.9 %.
    assert abs((y == 0).mean() - 0.25) < 0.009
    assert abs(y.mean() - 2.0) < 0.03
    assert (np.abs((y == 0).mean((1, 2)) - 0.25) < 0.04).all()  # of each example
    np.testing.assert_array_equal(dropout(x, 0.0, KEYS, PLACE), x)


def test_rows_depend_on_their_own_key_alone(masked):
    ones = jnp.ones((4, 6, 5))
    np.testing.assert_array_equal(dropout(ones, 0.25, KEYS[3::4], PLACE), masked[3::4])
    assert len(np.unique(masked.reshape(16, -1), axis=0)) == 16
    half = dropout(ones.astype(jnp.bfloat16), 0.25, KEYS[:4], PLACE)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half == 0, masked[:4] == 0)


def test_other_places_have_other_masks(masked):
    other = dropout(jnp.ones((16, 6, 5)), 0.25, KEYS, ("up_0_0_res",))
    assert 0.2 < np.mean(other != masked) < 0.55  # 2 * 0.25 * 0.75 of them


def test_places_have_the_same_masks_in_every_version():
    """A run that is resumed goes on with the masks that it had."""
    kept = np.flatnonzero(np.asarray(dropout(jnp.ones((1, 16)), 0.5, KEYS[:1], PLACE))[0])
    np.testing.assert_array_equal(kept, [0, 1, 2, 4, 5, 6, 7, 11])


def test_masks_are_the_same_on_eight_devices(masked):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    keys = jax.device_put(KEYS, NamedSharding(mesh, P("data")))
    found = jax.jit(lambda keys: dropout(jnp.ones((16, 6, 5)), 0.25, keys, PLACE))(keys)
    np.testing.assert_array_equal(found, masked)
