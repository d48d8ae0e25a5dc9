"""Samplers on a mixture of Gaussians, whose exact flow is known, reach it with their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs import convergence
from latent_diffusion_jax.diffusion import plan as plans
from latent_diffusion_jax.diffusion.samplers import plan_sampler
from latent_diffusion_jax.diffusion.schedules import make_schedule


@pytest.mark.parametrize("name", sorted(convergence.ORDERS))
def test_errors_fall_with_the_order_of_the_sampler(name):
    errors = [convergence.error(name, num_steps) for num_steps in (16, 32, 64)]
    seen = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (seen > convergence.ORDERS[name] - 0.35).all(), (errors, seen)
    assert errors[-1] < (0.06 if convergence.ORDERS[name] == 1 else 0.01)


def test_higher_orders_are_more_exact_with_as_many_calls():
    errors = {name: convergence.error(name, 32) for name in convergence.ORDERS}
    assert max(errors, key=errors.__getitem__) == "ddim"
    assert errors["unipc"] < errors["dpm++_2m"] < errors["ddim"] / 4


SCHEDULE = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
MEAN, STD = np.array([0.7, -1.5, 0.0, 2.0]), np.array([0.5, 0.2, 1.0, 1.5])


def optimal(z_t, t, guidance_scale):
    """E[epsilon | z_t] for clean pixels N(MEAN, STD^2), between timesteps too."""
    ratio = np.sqrt((1 - SCHEDULE.alphas_cumprod) / SCHEDULE.alphas_cumprod)
    ratio = jnp.interp(t, jnp.arange(1000), jnp.asarray(ratio))[:, None]
    alpha = 1 / jnp.sqrt(1 + ratio**2)
    sigma = alpha * ratio
    return sigma * (z_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize(
    ("name", "options", "num_steps"),
    [
        ("ddim", {"eta": 1.0}, 500),
        ("ddpm", {}, 500),
        ("euler_ancestral", {}, 500),
        ("dpm++_2m_sde", {"sigmas": "karras"}, 100),
        ("dpm++_2m", {"sigmas": "karras"}, 50),
        ("unipc", {"sigmas": "karras"}, 50),
        ("heun", {"spacing": "leading", "sigmas": "karras"}, 50),
    ],
)
def test_samples_have_the_mean_and_deviation_of_the_data(name, options, num_steps):
    rows = 4096
    last = SCHEDULE.alphas_cumprod[-1]
    unit = np.random.default_rng(6).normal(size=(rows, 4))
    unit = (unit - unit.mean(axis=0)) / unit.std(axis=0)
    z_T = np.sqrt(last) * MEAN + unit * np.sqrt(last * STD**2 + 1 - last)
    plan = plan_sampler(name, SCHEDULE, "epsilon", num_steps, **options)
    keys = jax.random.split(jax.random.key(6), rows)
    z_0 = np.asarray(plans.sample(optimal, z_T, plan, keys)[0], np.float64)
    # Four standard errors and, for the deviation, the error of so many steps.
    np.testing.assert_array_less(np.abs(z_0.mean(axis=0) - MEAN), 4 * STD / rows**0.5 + 0.01)
    np.testing.assert_array_less(np.abs(z_0.std(axis=0) / STD - 1), 4 / (2 * rows) ** 0.5 + 0.02)
