"""The forward process against `diffusers`, and its inversion."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from latent_diffusion_jax.diffusion.process import (
    add_noise,
    prediction_from_epsilon,
    signal_and_noise,
)
from latent_diffusion_jax.diffusion.schedules import make_schedule

BETAS = dict(beta_start=0.00085, beta_end=0.012)
SCHEDULE = make_schedule("scaled_linear", 1000, **BETAS)
TIMESTEPS = np.array([0, 1, 250, 613, 999], np.int32)


def clean_and_noise(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 5, 4, 3, 2)).astype(np.float32)


def test_add_noise_equals_diffusers():
    z_0, epsilon = clean_and_noise()
    reference = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", **BETAS
    ).add_noise(torch.tensor(z_0), torch.tensor(epsilon), torch.tensor(TIMESTEPS).long())
    z_t = add_noise(SCHEDULE, z_0, epsilon, jnp.asarray(TIMESTEPS))
    np.testing.assert_allclose(z_t, reference.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2, 4])
def test_signal_and_noise_lie_on_the_unit_circle_and_broadcast(ndim):
    alpha, sigma = signal_and_noise(SCHEDULE, jnp.asarray(TIMESTEPS), ndim)
    assert alpha.shape == sigma.shape == (5,) + (1,) * (ndim - 1)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(alpha).ravel() ** 2, SCHEDULE.alphas_cumprod[TIMESTEPS], rtol=1e-5
    )


def test_noise_at_the_first_timestep_keeps_its_precision():
    """1 - alpha_bar_0 is small; computed in float32 it would be off by 1e-4."""
    _, sigma = signal_and_noise(SCHEDULE, jnp.array([0]), 1)
    np.testing.assert_allclose(sigma, np.sqrt(BETAS["beta_start"]), rtol=1e-6)


def test_prediction_from_epsilon_inverts_add_noise():
    z_0, epsilon = clean_and_noise(1)
    t = jnp.asarray(TIMESTEPS)
    prediction = prediction_from_epsilon(SCHEDULE, add_noise(SCHEDULE, z_0, epsilon, t), epsilon, t)
    # At t = 999 z_0 is divided by sqrt(alpha_bar) = 0.068, and its rounding error with it.
    np.testing.assert_allclose(prediction.z_0, z_0, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(prediction.epsilon, epsilon)


def test_prediction_from_a_wrong_epsilon_is_consistent_with_z_t():
    """Whatever epsilon is predicted, noising the predicted z_0 with it gives z_t back."""
    z_t, epsilon = clean_and_noise(2)
    t = jnp.asarray(TIMESTEPS)
    prediction = prediction_from_epsilon(SCHEDULE, z_t, epsilon, t)
    np.testing.assert_allclose(
        add_noise(SCHEDULE, prediction.z_0, prediction.epsilon, t), z_t, rtol=0, atol=2e-6
    )
