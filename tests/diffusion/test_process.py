"""The forward process against `diffusers`, and its inversion."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from latent_diffusion_jax.diffusion.process import (
    PREDICTION_TYPES,
    add_noise,
    predicted_z_0,
    prediction_target,
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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predicted_z_0_inverts_the_target(prediction_type):
    z_0, epsilon = clean_and_noise(1)
    t = jnp.asarray(TIMESTEPS)
    target = prediction_target(prediction_type, SCHEDULE, z_0, epsilon, t)
    z_t = add_noise(SCHEDULE, z_0, epsilon, t)
    found = predicted_z_0(prediction_type, SCHEDULE, z_t, target, t)
    # At t = 999 epsilon is divided by sqrt(alpha_bar) = 0.068, and its rounding error with it.
    np.testing.assert_allclose(found, z_0, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("prediction_type", "theirs"),
    [("epsilon", "epsilon"), ("z_0", "sample"), ("v", "v_prediction")],
)
def test_predictions_mean_what_they_mean_in_diffusers(prediction_type, theirs):
    z_t, prediction = clean_and_noise(2)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=theirs, clip_sample=False, **BETAS
    )
    scheduler.set_timesteps(1000)
    found = predicted_z_0(prediction_type, SCHEDULE, z_t, prediction, jnp.asarray(TIMESTEPS))
    for i, t in enumerate(TIMESTEPS):
        expected = scheduler.step(
            torch.tensor(prediction[i]), int(t), torch.tensor(z_t[i])
        ).pred_original_sample
        scale = expected.abs().max().item()
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=0, atol=2e-5 * scale)
    if prediction_type == "v":
        z_0, epsilon = clean_and_noise(3)
        expected = scheduler.get_velocity(
            torch.tensor(z_0), torch.tensor(epsilon), torch.tensor(TIMESTEPS).long()
        )
        target = prediction_target("v", SCHEDULE, z_0, epsilon, jnp.asarray(TIMESTEPS))
        np.testing.assert_allclose(target, expected.numpy(), rtol=0, atol=1e-5)
