"""The moving average of parameters: its warm-up, its fixed point, the recursion in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.training import ema


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999])
def test_decay_warms_up_to_its_value(decay):
    steps = np.array([0, 1, 8, 90, 10**3, 10**6], np.int32)
    ours = [float(ema.decay_at(jnp.asarray(step), decay)) for step in steps]
    np.testing.assert_allclose(ours, np.minimum(decay, (1 + steps) / (10 + steps)), rtol=1e-6)
    assert ours[-1] == pytest.approx(decay, rel=1e-6)
    assert ours[0] == pytest.approx(0.1) and (np.diff(ours) >= 0).all()


def test_constant_parameters_are_a_fixed_point():
    params = {"a": jnp.array([0.1, -3.7, 1e-8]), "b": {"c": jnp.full((2, 3), 1e6)}}
    average = params
    for step in range(20):
        average = ema.update(average, params, jnp.asarray(step), 0.999)
    for kept, leaf in zip(jax.tree.leaves(average), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(kept, leaf)


def test_updates_equal_the_recursion_in_float64():
    rng = np.random.default_rng(0)
    trajectory = rng.normal(size=(200, 5))
    average = {"w": jnp.asarray(trajectory[0], jnp.float32)}
    expected = trajectory[0].copy()
    update = jax.jit(ema.update, static_argnums=3)
    for step, params in enumerate(trajectory):
        average = update(average, {"w": jnp.asarray(params, jnp.float32)}, jnp.asarray(step), 0.9)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * params
    np.testing.assert_allclose(average["w"], expected, rtol=0, atol=1e-6)


def test_the_first_update_forgets_nine_tenths_of_the_start():
    average = ema.update({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, jnp.asarray(0), 0.9999)
    np.testing.assert_allclose(average["w"], 0.9, rtol=1e-6)


def test_the_average_follows_parameters_that_moved_once():
    """Without warm-up left, the distance shrinks by the decay at each update."""
    average = {"w": jnp.zeros(1)}
    for step in range(1000, 1010):
        average = ema.update(average, {"w": jnp.ones(1)}, jnp.asarray(step), 0.8)
    np.testing.assert_allclose(1 - average["w"], 0.8**10, rtol=1e-5)


def test_the_average_keeps_its_dtype_and_is_computed_in_float32():
    params = {"w": jnp.asarray([1.0 + 2**-7, 3.0], jnp.bfloat16)}
    average = ema.update({"w": jnp.ones(2)}, params, jnp.asarray(10**6), 0.999)
    assert average["w"].dtype == jnp.float32
    np.testing.assert_allclose(average["w"], [1 + 1e-3 * 2**-7, 1.002], rtol=1e-7)
    half = ema.update({"w": jnp.ones(2, jnp.bfloat16)}, params, jnp.asarray(10**6), 0.5)
    assert half["w"].dtype == jnp.bfloat16 and float(half["w"][1]) == 2.0
