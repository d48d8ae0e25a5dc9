"""Samplers: against `diffusers`, against closed forms, and row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from latent_diffusion_jax.diffusion.samplers import SAMPLERS, ddim, ddpm, normal_per_key
from latent_diffusion_jax.diffusion.schedules import make_schedule, sampling_timesteps

BETAS = dict(beta_start=0.00085, beta_end=0.012)
SCHEDULE = make_schedule("scaled_linear", 1000, **BETAS)
ALPHA_BAR = SCHEDULE.alphas_cumprod


def toy(z_t, t):
    """A fixed nonlinear denoiser, its output between -1.2 and 1.2."""
    phase = t.astype(jnp.float32).reshape((-1,) + (1,) * (z_t.ndim - 1)) / 200
    return 0.9 * jnp.tanh(z_t) + 0.3 * jnp.sin(phase + z_t)


def torch_toy(z_t, t):
    return 0.9 * torch.tanh(z_t) + 0.3 * torch.sin(t / 200 + z_t)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def diffusers_scheduler(num_steps: int) -> DDIMScheduler:
    """`diffusers`' DDIM with our timesteps, in float64."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
        **BETAS,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


# --- against diffusers -------------------------------------------------------------------------


# diffusers steps back by T // S, so only divisors of T compare.
@pytest.mark.parametrize("num_steps", [1, 4, 20, 250])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_trajectories_equal_diffusers(num_steps, eta):
    z_T = normal(0, 3, 4, 2, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    ours = jax.jit(
        lambda z: ddim(toy, z, SCHEDULE, sampling_timesteps(1000, num_steps), keys, eta)
    )(z_T)

    scheduler = diffusers_scheduler(num_steps)
    sample = torch.tensor(z_T, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        noise = torch.tensor(np.array(normal_per_key(step_keys, (4, 2, 2))), dtype=torch.float64)
        sample = scheduler.step(
            torch_toy(sample, t), t, sample, eta=eta, variance_noise=noise
        ).prev_sample
    scale = sample.abs().max().item()
    np.testing.assert_allclose(ours, sample.numpy(), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_one_stochastic_step_has_the_mean_and_variance_of_diffusers(eta):
    """Independent of how noise is drawn from keys: statistics over many rows of one z_T."""
    timesteps, rows = np.array([999, 499]), 8192
    z_T = np.tile(normal(1, 1, 4), (rows, 1))

    def first_step_only(z_t, t):
        # Predicting no noise at the second step only divides by sqrt(alpha_bar_499).
        return jnp.where(t[:, None] == 499, 0.0, toy(z_t, t))

    keys = jax.random.split(jax.random.key(1), rows)
    z_0 = ddim(first_step_only, z_T, SCHEDULE, timesteps, keys, eta)
    samples = np.asarray(z_0, np.float64) * np.sqrt(ALPHA_BAR[499])

    scheduler = diffusers_scheduler(2)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), timesteps)
    sample = torch.tensor(z_T[:1], dtype=torch.float64)
    mean = scheduler.step(
        torch_toy(sample, 999), 999, sample, eta=eta, variance_noise=torch.zeros(1, 4)
    ).prev_sample.numpy()[0]
    std = eta * float(scheduler._get_variance(999, 499)) ** 0.5
    # Four standard errors of each.
    np.testing.assert_allclose(samples.mean(axis=0), mean, rtol=0, atol=4 * std / rows**0.5)
    np.testing.assert_allclose(samples.std(axis=0), std, rtol=4 / (2 * rows) ** 0.5)
    correlation = np.corrcoef(samples.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / rows**0.5


def test_ddpm_takes_the_steps_of_the_posterior():
    """DDPM, equation 7: mean and variance of q(z_{t-1} | z_t, z_0) with the predicted z_0."""
    schedule = make_schedule("linear", 12, 0.01, 0.3)
    alpha_bar = schedule.alphas_cumprod
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / alpha_bar_prev
    z_T, keys = normal(2, 2, 5), jax.random.split(jax.random.key(2), 2)

    z = z_T.astype(np.float64)
    for i, t in enumerate(range(11, -1, -1)):
        epsilon = np.asarray(toy(jnp.asarray(z), jnp.full(2, t)), np.float64)
        z_0 = (z - np.sqrt(1 - alpha_bar[t]) * epsilon) / np.sqrt(alpha_bar[t])
        weight_z_0 = np.sqrt(alpha_bar_prev[t]) * beta[t] / (1 - alpha_bar[t])
        weight_z_t = np.sqrt(1 - beta[t]) * (1 - alpha_bar_prev[t]) / (1 - alpha_bar[t])
        variance = (1 - alpha_bar_prev[t]) / (1 - alpha_bar[t]) * beta[t]
        noise = normal_per_key(jax.vmap(jax.random.fold_in, (0, None))(keys, i), (5,))
        z = weight_z_0 * z_0 + weight_z_t * z + np.sqrt(variance) * np.asarray(noise, np.float64)
    ours = ddpm(toy, z_T, schedule, sampling_timesteps(12, 12), keys)
    np.testing.assert_allclose(ours, z, rtol=1e-4, atol=1e-4)


def test_ddpm_is_ddim_at_eta_one_whatever_eta_is_given():
    z_T, keys = normal(3, 2, 4), jax.random.split(jax.random.key(3), 2)
    arguments = (toy, z_T, SCHEDULE, sampling_timesteps(1000, 5), keys)
    expected = ddim(*arguments, eta=1.0)
    np.testing.assert_array_equal(ddpm(*arguments), expected)
    np.testing.assert_array_equal(ddpm(*arguments, eta=0.0), expected)


# --- against closed forms ----------------------------------------------------------------------

MU = np.array([0.7, -1.5, 0.0, 2.0])
STD = np.array([0.5, 0.2, 1.0, 1.5])


def optimal_epsilon(z_t, t):
    """E[epsilon | z_t] for clean pixels N(MU, STD^2)."""
    alpha = jnp.asarray(np.sqrt(ALPHA_BAR), jnp.float32)[t][:, None]
    sigma = jnp.asarray(np.sqrt(1 - ALPHA_BAR), jnp.float32)[t][:, None]
    return sigma * (z_t - alpha * MU) / (alpha**2 * STD**2 + sigma**2)


def noisy_end(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal draws and the exact samples of z_T that they stand for."""
    unit = normal(seed, rows, 4).astype(np.float64)
    return unit, np.sqrt(ALPHA_BAR[-1]) * MU + unit * np.sqrt(
        ALPHA_BAR[-1] * STD**2 + 1 - ALPHA_BAR[-1]
    )


def test_ddim_converges_to_the_exact_flow_with_first_order():
    """For Gaussian data the flow is linear: z_0 = MU + STD u where z_T is u deviations off."""
    unit, z_T = noisy_end(64, seed=4)
    exact = MU + STD * unit
    keys = jax.random.split(jax.random.key(0), 64)
    errors = []
    for num_steps in (10, 20, 40, 80):
        z_0 = ddim(optimal_epsilon, z_T, SCHEDULE, sampling_timesteps(1000, num_steps), keys)
        errors.append(np.sqrt(np.mean((np.asarray(z_0) - exact) ** 2)))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert (ratios > 1.6).all() and (ratios < 2.5).all(), (errors, ratios)
    assert errors[-1] < 0.05


def test_ddim_samples_have_the_mean_and_deviation_of_the_data():
    """From plain normal noise; what the last timestep keeps of the data bounds the error."""
    unit = normal(5, 4096, 4)
    unit = (unit - unit.mean(axis=0)) / unit.std(axis=0)  # no sampling error
    keys = jax.random.split(jax.random.key(0), len(unit))
    errors = []
    for num_steps in (10, 50, 250):
        z_0 = ddim(optimal_epsilon, unit, SCHEDULE, sampling_timesteps(1000, num_steps), keys)
        z_0 = np.asarray(z_0, np.float64)
        errors.append([np.abs(z_0.mean(axis=0) - MU).max(), np.abs(z_0.std(axis=0) - STD).max()])
    errors = np.array(errors)
    # z_T = N(0, 1) instead of N(sqrt(alpha_bar_T) MU, ..) shifts the mean by this much in the end.
    floor = np.sqrt(ALPHA_BAR[-1]) * (STD * np.abs(MU)).max()
    assert errors[-1, 0] < floor + 0.02
    assert errors[-1, 1] < 0.02
    assert (np.diff(errors[:, 1]) < 0).all(), errors


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_stochastic_samples_have_the_mean_and_deviation_of_the_data(name):
    rows = 4096
    _, z_T = noisy_end(rows, seed=6)
    keys = jax.random.split(jax.random.key(6), rows)
    z_0 = SAMPLERS[name](
        optimal_epsilon, z_T, SCHEDULE, sampling_timesteps(1000, 500), keys, eta=1.0
    )
    z_0 = np.asarray(z_0, np.float64)
    # Four standard errors and, for the deviation, the discretisation error of 500 steps.
    np.testing.assert_array_less(np.abs(z_0.mean(axis=0) - MU), 4 * STD / rows**0.5)
    np.testing.assert_array_less(np.abs(z_0.std(axis=0) / STD - 1), 4 / (2 * rows) ** 0.5 + 0.02)
    assert np.abs(np.corrcoef(z_0.T) - np.eye(4)).max() < 5 / rows**0.5


# --- rows, keys and tracing --------------------------------------------------------------------


def test_normal_per_key_is_standard_normal_and_differs_between_keys():
    noise = np.asarray(normal_per_key(jax.random.split(jax.random.key(7), 512), (4, 4, 2)))
    assert noise.shape == (512, 4, 4, 2)
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5
    assert len(np.unique(noise[:, 0, 0, 0])) == 512


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(name, eta):
    z_T, keys = normal(8, 8, 4, 4, 2), jax.random.split(jax.random.key(8), 8)
    timesteps = sampling_timesteps(1000, 10)

    def draw(rows):
        return np.asarray(SAMPLERS[name](toy, z_T[rows], SCHEDULE, timesteps, keys[rows], eta))

    eight = draw(np.arange(8))
    np.testing.assert_allclose(draw(np.array([5])), eight[[5]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(draw(np.array([1, 5, 2])), eight[[1, 5, 2]], rtol=0, atol=1e-6)


def test_keys_matter_where_eta_does():
    z_T = np.tile(normal(9, 1, 4), (3, 1))
    keys = jax.random.split(jax.random.key(9), 3)
    arguments = (toy, z_T, SCHEDULE, sampling_timesteps(1000, 5), keys)
    still, moved = np.asarray(ddim(*arguments, eta=0.0)), np.asarray(ddim(*arguments, eta=0.5))
    np.testing.assert_allclose(still, still[[0, 0, 0]], rtol=0, atol=1e-6)
    assert min(np.abs(moved[0] - moved[1]).max(), np.abs(moved[1] - moved[2]).max()) > 0.01


def test_a_new_eta_does_not_compile_again():
    traces = []
    z_T, keys = normal(10, 2, 4), jax.random.split(jax.random.key(10), 2)
    timesteps = sampling_timesteps(1000, 5)

    @jax.jit
    def run(eta):
        traces.append(eta)
        return ddim(toy, z_T, SCHEDULE, timesteps, keys, eta)

    for eta in (0.0, 0.3, 1.0):
        expected = ddim(toy, z_T, SCHEDULE, timesteps, keys, eta)
        np.testing.assert_allclose(run(eta), expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_return_float32_of_the_shape_of_the_noise(name):
    z_T = jnp.zeros((2, 6, 4, 3), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 2)
    z_0 = jax.eval_shape(
        lambda z: SAMPLERS[name](toy, z, SCHEDULE, sampling_timesteps(1000, 3), keys), z_T
    )
    assert z_0.shape == (2, 6, 4, 3) and z_0.dtype == jnp.float32
