"""The denoising objective against numpy, and the timesteps that it is asked at."""

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.losses import denoising_loss, sample_timesteps
from latent_diffusion_jax.diffusion.schedules import make_schedule

SCHEDULE = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
T = np.array([0, 421, 999], np.int32)
Z_0, EPSILON = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 2)).astype(np.float32)


def test_a_perfect_predictor_has_no_loss():
    alpha_bar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)

    def perfect(z_t, t):
        alpha_bar_t = alpha_bar[t][:, None, None, None]
        return (z_t - jnp.sqrt(alpha_bar_t) * Z_0) / jnp.sqrt(1 - alpha_bar_t)

    loss = denoising_loss(perfect, SCHEDULE, Z_0, EPSILON, jnp.asarray(T))
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-6)
    assert denoising_loss(lambda z_t, t: EPSILON, SCHEDULE, Z_0, EPSILON, T).max() == 0.0


def test_the_loss_equals_numpy():
    def predict(z_t, t):
        return 0.3 * z_t + t[:, None, None, None] / 500

    loss = denoising_loss(predict, SCHEDULE, Z_0, EPSILON, jnp.asarray(T))
    alpha_bar = SCHEDULE.alphas_cumprod[T][:, None, None, None]
    z_t = np.sqrt(alpha_bar) * Z_0.astype(np.float64) + np.sqrt(1 - alpha_bar) * EPSILON
    expected = ((0.3 * z_t + T[:, None, None, None] / 500 - EPSILON) ** 2).mean(axis=(1, 2, 3))
    assert loss.shape == (3,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_loss_is_float32_for_a_half_precision_predictor():
    def predict(z_t, t):
        return jnp.zeros_like(z_t, jnp.bfloat16)

    epsilon = jnp.asarray(EPSILON, jnp.bfloat16)
    loss = denoising_loss(predict, SCHEDULE, jnp.asarray(Z_0, jnp.bfloat16), epsilon, T)
    assert loss.dtype == jnp.float32
    expected = np.mean(np.asarray(epsilon, np.float64) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_timesteps_cover_the_whole_range_evenly():
    schedule = make_schedule("linear", 10, 1e-4, 0.02)
    t = np.asarray(sample_timesteps(schedule, jax.random.split(jax.random.key(0), 5000)))
    assert t.dtype == np.int32 and t.shape == (5000,)
    counts = np.bincount(t, minlength=10)
    assert counts.shape == (10,)  # nothing at T or above
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_timestep_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(1), 8)
    t = np.asarray(sample_timesteps(SCHEDULE, keys))
    assert len(set(t.tolist())) > 4
    np.testing.assert_array_equal(sample_timesteps(SCHEDULE, keys[:3]), t[:3])
    np.testing.assert_array_equal(sample_timesteps(SCHEDULE, keys[5:6]), t[5:6])
    np.testing.assert_array_equal(sample_timesteps(SCHEDULE, keys[::-1]), t[::-1])
