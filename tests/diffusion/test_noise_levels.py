"""The noise levels that samplers visit, against `diffusers` and LDM's own lists."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from latent_diffusion_jax.diffusion.noise_levels import noise_levels, spaced_timesteps
from latent_diffusion_jax.diffusion.schedules import make_schedule
from tests.diffusion.toy import BETAS, SCHEDULE


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("one_more", [False, True])
def test_every_number_of_steps_gives_that_many_falling_timesteps(spacing, one_more):
    for num_timesteps in (1, 7, 60, 1000):
        for num_steps in range(1, num_timesteps + 1):
            found = spaced_timesteps(num_timesteps, num_steps, spacing, 1, one_more)
            assert found.shape == (num_steps,)
            assert found[0] <= num_timesteps - 1 and found[-1] >= 0
            assert (np.diff(found) < 0).all()
            if spacing == "trailing":
                # Each is within half a timestep of its place on the line from T to T / S.
                line = num_timesteps * (1 - np.arange(num_steps) / num_steps) - 1
                assert found[0] == num_timesteps - 1
                assert np.abs(found - line).max() <= 0.5 + 1e-9


def test_as_many_steps_as_timesteps_visit_each_once():
    for spacing in ("trailing", "leading", "linspace"):
        np.testing.assert_allclose(spaced_timesteps(1000, 1000, spacing), np.arange(999, -1, -1))


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 250, 333])
@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 1), ("linspace", 0)])
@pytest.mark.parametrize(
    "kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_timesteps_equal_diffusers(num_steps, spacing, offset, kind):
    reference = kind(
        num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=offset, **BETAS
    )
    reference.set_timesteps(num_steps)
    one_more = kind is DPMSolverMultistepScheduler
    between = kind is EulerDiscreteScheduler
    found = spaced_timesteps(1000, num_steps, spacing, offset, one_more, between)
    np.testing.assert_allclose(found, reference.timesteps.numpy()[:num_steps], rtol=1e-6)


def test_ldm_lists_are_those_of_its_code():
    """make_ddim_timesteps of CompVis' code, for the steps that do not crash it."""
    for num_steps in (5, 20, 30, 50, 100, 200):
        uniform = np.asarray(list(range(0, 1000, 1000 // num_steps))) + 1
        found = spaced_timesteps(1000, num_steps, "ldm_uniform")
        np.testing.assert_array_equal(found, uniform[::-1])
        quad = ((np.linspace(0, np.sqrt(1000 * 0.8), num_steps)) ** 2).astype(int) + 1
        if (np.diff(quad) > 0).all():
            found = spaced_timesteps(1000, num_steps, "ldm_quad")
            np.testing.assert_array_equal(found, quad[::-1])
    assert len(spaced_timesteps(1000, 30, "ldm_uniform")) == 31  # its own count
    with pytest.raises(ValueError, match="ldm_uniform spacing has no list of 36 steps"):
        spaced_timesteps(1000, 36, "ldm_uniform")


@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_impossible_numbers_of_steps_are_errors(num_steps):
    with pytest.raises(ValueError, match=rf"1\.\.1000, got {num_steps}"):
        spaced_timesteps(1000, num_steps)


@pytest.mark.parametrize("offset", [-1, -5, -500])
def test_timesteps_below_zero_are_errors(offset):
    with pytest.raises(ValueError, match=rf"must not be negative, got {offset}"):
        spaced_timesteps(1000, 50, "leading", offset)


def test_levels_lie_on_the_unit_circle_and_end_where_asked():
    for sigmas in ("schedule", "karras"):
        levels = noise_levels(SCHEDULE, spaced_timesteps(1000, 10), sigmas)
        np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1.0)
        assert levels.alpha[-1] == 1.0 and levels.sigma[-1] == 0.0
        assert (np.diff(levels.sigma) < 0).all() and (np.diff(levels.timesteps) < 0).all()
    levels = noise_levels(SCHEDULE, spaced_timesteps(1000, 10), final="first")
    np.testing.assert_allclose(levels.alpha[-1] ** 2, SCHEDULE.alphas_cumprod[0])


def test_levels_between_timesteps_lie_between_theirs():
    levels = noise_levels(SCHEDULE, np.array([500.5, 500.0]))
    ratio = np.sqrt((1 - SCHEDULE.alphas_cumprod) / SCHEDULE.alphas_cumprod)
    found = levels.sigma / np.maximum(levels.alpha, 1e-9)
    np.testing.assert_allclose(found[0], (ratio[500] + ratio[501]) / 2)
    np.testing.assert_allclose(found[1], ratio[500])


def test_a_schedule_that_ends_in_noise_starts_from_no_signal():
    schedule = make_schedule("scaled_linear", 1000, **BETAS, zero_terminal_snr=True)
    levels = noise_levels(schedule, spaced_timesteps(1000, 4))
    assert levels.alpha[0] == 0.0 and levels.sigma[0] == 1.0
    assert np.isfinite(levels.log_snr[:-1]).all()
