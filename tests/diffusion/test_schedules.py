"""Noise schedules against `diffusers` and Stable Diffusion's numbers; visited timesteps."""

import numpy as np
import pytest
from diffusers import DDPMScheduler

from latent_diffusion_jax.diffusion.schedules import (
    BETAS,
    NoiseSchedule,
    make_schedule,
    sampling_timesteps,
)


@pytest.mark.parametrize("name", sorted(BETAS))
@pytest.mark.parametrize(("steps", "start", "end"), [(1000, 0.00085, 0.012), (50, 1e-4, 0.4)])
def test_schedules_equal_diffusers(name, steps, start, end):
    reference = DDPMScheduler(
        num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule=name
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
    np.testing.assert_allclose(alpha_bar[0], 1 - 1e-4, rtol=1e-12)
    np.testing.assert_allclose(alpha_bar[-1] / alpha_bar[-2], 1 - 0.02, rtol=1e-12)


def test_scaled_linear_has_the_values_of_stable_diffusion():
    alpha_bar = make_schedule("scaled_linear", 1000, 0.00085, 0.012).alphas_cumprod
    np.testing.assert_allclose(
        alpha_bar[[0, 249, 499, 749]], [0.99915, 0.675432, 0.277670, 0.056623], rtol=0, atol=1e-6
    )


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosin'.*linear, scaled_linear"):
        make_schedule("cosin", 10, 1e-4, 0.02)


@pytest.mark.parametrize("name", sorted(BETAS))
@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.02), (-1e-4, 0.02), (1e-4, 1.0), (float("nan"), 0.02)]
)
def test_betas_outside_the_unit_interval_are_errors(name, start, end):
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\)"):
        make_schedule(name, 10, start, end)


def check_timesteps(timesteps: np.ndarray, num_timesteps: int, num_steps: int) -> None:
    assert timesteps.shape == (num_steps,) and timesteps.dtype == np.int32
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()
    # Even: each is within half a timestep of its place on the line from T to T/S.
    line = num_timesteps * (1 - np.arange(num_steps) / num_steps) - 1
    assert np.abs(timesteps - line).max() <= 0.5 + 1e-9


def test_every_number_of_steps_gives_that_many_falling_timesteps():
    for num_steps in range(1, 1001):
        check_timesteps(sampling_timesteps(1000, num_steps), 1000, num_steps)


def test_every_number_of_steps_works_for_odd_lengths_too():
    for num_timesteps in range(1, 61):
        for num_steps in range(1, num_timesteps + 1):
            check_timesteps(sampling_timesteps(num_timesteps, num_steps), num_timesteps, num_steps)


def test_as_many_steps_as_timesteps_visit_each_once():
    np.testing.assert_array_equal(sampling_timesteps(1000, 1000), np.arange(999, -1, -1))


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 250, 333, 1000])
def test_timesteps_equal_diffusers_trailing_spacing(num_steps):
    reference = DDPMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    reference.set_timesteps(num_steps)
    np.testing.assert_array_equal(
        sampling_timesteps(1000, num_steps), reference.timesteps.numpy()[:num_steps]
    )


@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_impossible_numbers_of_steps_are_errors(num_steps):
    with pytest.raises(ValueError, match=rf"1\.\.1000, got {num_steps}"):
        sampling_timesteps(1000, num_steps)


def test_a_schedule_cannot_be_changed():
    schedule = NoiseSchedule(np.array([0.9, 0.5]))
    with pytest.raises(AttributeError):
        schedule.alphas_cumprod = np.array([0.1])
