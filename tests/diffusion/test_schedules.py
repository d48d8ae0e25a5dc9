"""Noise schedules against `diffusers` and Stable Diffusion's numbers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from latent_diffusion_jax.diffusion.schedules import (
    BETAS,
    NoiseSchedule,
    make_schedule,
)

OF_DIFFUSERS = {"cosine": "squaredcos_cap_v2"}
WITH_ENDS = ("linear", "scaled_linear", "sqrt")  # from beta_start to beta_end exactly


@pytest.mark.parametrize("name", sorted(set(BETAS) - {"sqrt"}))
@pytest.mark.parametrize(("steps", "start", "end"), [(1000, 0.00085, 0.012), (50, 1e-4, 0.4)])
def test_schedules_equal_diffusers(name, steps, start, end):
    reference = DDPMScheduler(
        num_train_timesteps=steps,
        beta_start=start,
        beta_end=end,
        beta_schedule=OF_DIFFUSERS.get(name, name),
    )
    schedule = make_schedule(name, steps, start, end)
    assert schedule.num_timesteps == steps
    assert schedule.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(
        schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(BETAS))
def test_schedules_fall_and_start_and_end_at_the_given_betas(name):
    alpha_bar = make_schedule(name, 200, 1e-4, 0.02).alphas_cumprod
    assert (np.diff(alpha_bar) < 0).all()
    if name in WITH_ENDS:
        first, last = (0.01, 0.02**0.5) if name == "sqrt" else (1e-4, 0.02)
        np.testing.assert_allclose(alpha_bar[0], 1 - first, rtol=1e-12)
        np.testing.assert_allclose(alpha_bar[-1] / alpha_bar[-2], 1 - last, rtol=1e-12)


def test_scaled_linear_has_the_values_of_stable_diffusion():
    alpha_bar = make_schedule("scaled_linear", 1000, 0.00085, 0.012).alphas_cumprod
    np.testing.assert_allclose(
        alpha_bar[[0, 249, 499, 749]], [0.99915, 0.675432, 0.277670, 0.056623], rtol=0, atol=1e-6
    )


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosin'.*linear, scaled_linear"):
        make_schedule("cosin", 10, 1e-4, 0.02)


@pytest.mark.parametrize("name", sorted(set(WITH_ENDS) - {"sqrt"}))
@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.02), (-1e-4, 0.02), (1e-4, 1.0), (float("nan"), 0.02)]
)
def test_betas_outside_the_unit_interval_are_errors(name, start, end):
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\)"):
        make_schedule(name, 10, start, end)


def test_zero_terminal_snr_equals_diffusers():
    options = dict(beta_start=0.00085, beta_end=0.012)
    reference = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True, **options)
    schedule = make_schedule("scaled_linear", 1000, **options, zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] == 0.0
    np.testing.assert_allclose(
        schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(BETAS))
def test_betas_can_be_read_from_a_schedule(name):
    schedule = make_schedule(name, 50, 1e-4, 0.4)
    np.testing.assert_allclose(schedule.betas, BETAS[name](50, 1e-4, 0.4), rtol=1e-9)


def test_a_schedule_cannot_be_changed():
    schedule = NoiseSchedule(np.array([0.9, 0.5]))
    with pytest.raises(AttributeError):
        schedule.alphas_cumprod = np.array([0.1])
