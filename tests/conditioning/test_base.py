"""Dropping of conditions, which guidance needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.base import Cond, drop

COUNT = 3000
INPUTS = np.arange(3 * COUNT).reshape(COUNT, 3) + 100
NULL = np.array([7, 8, 9])

compiled_drop = jax.jit(drop)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), COUNT)


def dropped(rate, seed=0):
    """Which rows are replaced: [COUNT]."""
    found = np.asarray(compiled_drop(INPUTS, NULL, keys(seed), rate))
    is_null, is_input = (found == NULL).all(axis=1), (found == INPUTS).all(axis=1)
    assert (is_null ^ is_input).all()  # rows stay whole
    return is_null


@pytest.mark.parametrize("seed", range(3))
def test_rate_zero_and_one(seed):
    assert not dropped(0.0, seed).any()
    assert dropped(1.0, seed).all()


def test_share_is_the_rate():
    assert dropped(0.3).mean() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / COUNT) ** 0.5)


def test_keys_decide():
    assert (dropped(0.5, seed=1) == dropped(0.5, seed=1)).all()
    assert (dropped(0.5, seed=1) != dropped(0.5, seed=2)).any()


def test_a_row_depends_on_its_own_key_alone():
    whole = np.asarray(compiled_drop(INPUTS, NULL, keys(), 0.5))
    order = np.random.default_rng(0).permutation(COUNT)
    shuffled = compiled_drop(INPUTS[order], NULL, keys()[order], 0.5)
    np.testing.assert_array_equal(shuffled, whole[order])
    few = drop(INPUTS[order[:30]], NULL, keys()[order[:30]], 0.5)  # and not compiled
    np.testing.assert_array_equal(few, whole[order[:30]])


def test_any_number_of_axes_and_dtype():
    inputs, null = jnp.ones((50, 4, 5), jnp.bfloat16), jnp.zeros((4, 5), jnp.bfloat16)
    found = compiled_drop(inputs, null, keys()[:50], 0.5)
    assert found.shape == inputs.shape and found.dtype == jnp.bfloat16
    per_row = np.asarray(found, np.float32).reshape(50, -1)
    assert set(per_row.min(axis=1)) == {0.0, 1.0}
    np.testing.assert_array_equal(per_row.min(axis=1), per_row.max(axis=1))


def test_a_condition_passes_through_compiled_functions():
    double = jax.jit(lambda cond: jax.tree.map(lambda x: 2 * x, cond))
    doubled = double(Cond(context=np.ones((2, 3, 4))))
    np.testing.assert_array_equal(doubled.context, 2 * np.ones((2, 3, 4)))
    assert double(Cond()).context is None
