"""The denoising objective against numpy, and the timesteps that it is asked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from latent_diffusion_jax.diffusion.losses import (
    Objective,
    denoising_loss,
    loss_weights,
    sample_timesteps,
    training_noise,
)
from latent_diffusion_jax.diffusion.process import PREDICTION_TYPES, add_noise, prediction_target
from latent_diffusion_jax.diffusion.schedules import make_schedule

SCHEDULE = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
T = np.array([0, 421, 999], np.int32)
Z_0, EPSILON = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 2)).astype(np.float32)


def loss_of(predict, **objective):
    return denoising_loss(predict, SCHEDULE, Objective(**objective), Z_0, EPSILON, jnp.asarray(T))[
        0
    ]


def test_a_perfect_predictor_has_no_loss():
    alpha_bar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)

    def perfect(z_t, t):
        alpha_bar_t = alpha_bar[t][:, None, None, None]
        return (z_t - jnp.sqrt(alpha_bar_t) * Z_0) / jnp.sqrt(1 - alpha_bar_t)

    loss = loss_of(perfect)
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-6)
    assert loss_of(lambda z_t, t: EPSILON).max() == 0.0


def test_the_loss_equals_numpy():
    def predict(z_t, t):
        return 0.3 * z_t + t[:, None, None, None] / 500

    loss = loss_of(predict)
    alpha_bar = SCHEDULE.alphas_cumprod[T][:, None, None, None]
    z_t = np.sqrt(alpha_bar) * Z_0.astype(np.float64) + np.sqrt(1 - alpha_bar) * EPSILON
    expected = ((0.3 * z_t + T[:, None, None, None] / 500 - EPSILON) ** 2).mean(axis=(1, 2, 3))
    assert loss.shape == (3,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_loss_is_float32_for_a_half_precision_predictor():
    def predict(z_t, t):
        return jnp.zeros_like(z_t, jnp.bfloat16)

    epsilon = jnp.asarray(EPSILON, jnp.bfloat16)
    z_0 = jnp.asarray(Z_0, jnp.bfloat16)
    loss, _ = denoising_loss(predict, SCHEDULE, Objective(), z_0, epsilon, T)
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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_of_any_type_has_no_loss(prediction_type):
    target = prediction_target(prediction_type, SCHEDULE, Z_0, EPSILON, jnp.asarray(T))
    for loss in ("l2", "l1", "huber"):
        assert loss_of(lambda z_t, t: target, prediction_type=prediction_type, loss=loss).max() == 0


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ("l1", torch.nn.functional.l1_loss),
        # PyTorch's is half of the squared error below delta.
        ("huber", lambda x, y, **_: 2 * torch.nn.functional.huber_loss(x, y, delta=0.7)),
        ("l2", torch.nn.functional.mse_loss),
    ],
)
def test_penalties_equal_torch(loss, theirs):
    found = loss_of(lambda z_t, t: 0.3 * z_t, loss=loss, huber_delta=0.7)
    z_t = np.asarray(add_noise(SCHEDULE, Z_0, EPSILON, jnp.asarray(T)))
    expected = [theirs(torch.tensor(0.3 * z_t[i]), torch.tensor(EPSILON[i])) for i in range(3)]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-5)


def test_min_snr_weights_are_those_of_diffusers_examples():
    """Weights as in its training scripts, of the SNR that its own function computes."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000)).numpy().astype(np.float64)
    bounded = np.minimum(snr, 5.0)
    expected = {"epsilon": bounded / snr, "v": bounded / (snr + 1), "z_0": bounded}
    for prediction_type, weights in expected.items():
        objective = Objective(prediction_type, weighting="min_snr", min_snr_gamma=5.0)
        np.testing.assert_allclose(loss_weights(objective, SCHEDULE), weights, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighting_is_the_same_whatever_is_predicted(weighting):
    """Errors of z_0 are SNR times, of v SNR / (SNR + 1) times smaller than those of epsilon."""
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    of = {t: loss_weights(Objective(t, weighting=weighting), SCHEDULE) for t in PREDICTION_TYPES}
    np.testing.assert_allclose(of["z_0"] / snr, of["epsilon"])
    np.testing.assert_allclose(of["v"] * (snr + 1) / snr, of["epsilon"])
    if weighting == "p2":
        np.testing.assert_allclose(of["epsilon"], 1 / (1 + snr))


def test_the_weight_of_a_timestep_multiplies_its_loss():
    plain, weighted = (loss_of(lambda z_t, t: z_t, weighting=w) for w in ("none", "min_snr"))
    weights = loss_weights(Objective(weighting="min_snr"), SCHEDULE)[T]
    np.testing.assert_allclose(weighted, plain * weights, rtol=1e-5)


def test_offset_noise_is_one_number_for_each_channel():
    keys = jax.random.split(jax.random.key(3), 4096)
    noise = np.asarray(training_noise(Objective(offset_noise=0.5), keys, (4, 4, 2)), np.float64)
    means = noise.mean(axis=(1, 2))
    expected = (0.5**2 + 1 / 16) ** 0.5
    assert abs(means.std() / expected - 1) < 4 / (2 * means.size) ** 0.5
    np.testing.assert_allclose(noise.var(axis=(1, 2)).mean(), 15 / 16, rtol=0.03)
    assert abs(np.corrcoef(means.T)[0, 1]) < 5 / 4096**0.5
    plain = training_noise(Objective(), keys, (4, 4, 2))
    assert abs(np.asarray(plain).mean(axis=(1, 2)).std() * 4 - 1) < 0.05


def test_the_variational_bound_is_the_divergence_of_the_posteriors():
    """Against torch.distributions and scipy, in float64; in bits."""
    variance = np.random.default_rng(4).uniform(-1, 1, Z_0.shape)
    z_0 = np.clip(Z_0, -1, 1)
    z_0[0, 0, 0] = [1.0, -1.0]  # bins without an end

    def predict(z_t, t):
        return jnp.concatenate([0.3 * z_t, jnp.asarray(variance, jnp.float32)], axis=-1)

    objective = Objective(learned_variance=True)
    loss, parts = denoising_loss(predict, SCHEDULE, objective, z_0, EPSILON, jnp.asarray(T))
    np.testing.assert_allclose(loss, parts["mse"] + 0.001 * 1000 * parts["vlb"], rtol=1e-6)

    alpha_bar = SCHEDULE.alphas_cumprod
    for i, t in enumerate(T):
        before = alpha_bar[t - 1] if t else 1.0
        beta = 1 - alpha_bar[t] / before
        z_t = np.sqrt(alpha_bar[t]) * z_0[i] + np.sqrt(1 - alpha_bar[t]) * EPSILON[i]
        guess = (z_t - np.sqrt(1 - alpha_bar[t]) * 0.3 * z_t) / np.sqrt(alpha_bar[t])

        from_z_0 = np.sqrt(before) * beta / (1 - alpha_bar[t])
        from_z_t = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar[t])
        mean, true_mean = (from_z_0 * z + from_z_t * z_t for z in (guess, z_0[i]))
        posterior = beta * (1 - before) / (1 - alpha_bar[t])
        if t == 0:
            posterior = (1 - alpha_bar[1] / alpha_bar[0]) * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
        share = (variance[i] + 1) / 2
        log_variance = share * np.log(beta) + (1 - share) * np.log(posterior)
        deviation = np.exp(0.5 * log_variance)
        if t:
            ours = torch.distributions.Normal(*map(torch.tensor, (mean, deviation)))
            true = torch.distributions.Normal(*map(torch.tensor, (true_mean, np.full_like(
                deviation, posterior**0.5))))  # fmt: skip
            expected = torch.distributions.kl_divergence(true, ours).numpy()
        else:
            normal = scipy.stats.norm(mean, deviation)
            above = np.where(z_0[i] > 0.999, 1.0, normal.cdf(z_0[i] + 1 / 255))
            below = np.where(z_0[i] < -0.999, 0.0, normal.cdf(z_0[i] - 1 / 255))
            expected = -np.log(np.maximum(above - below, 1e-12))
        np.testing.assert_allclose(parts["vlb"][i], expected.mean() / np.log(2), rtol=1e-3)


def test_the_bound_teaches_variances_and_not_the_mean():
    def loss(outputs):
        objective = Objective(learned_variance=True)
        return denoising_loss(
            lambda z_t, t: outputs, SCHEDULE, objective, Z_0, EPSILON, jnp.asarray(T)
        )[1]["vlb"].sum()

    gradient = np.asarray(jax.grad(loss)(jnp.full((*Z_0.shape[:-1], 4), 0.1)))
    assert (gradient[..., :2] == 0).all() and (np.abs(gradient[1:, ..., 2:]) > 0).all()


def test_wrong_names_and_channels_are_refused():
    for field, value in (("prediction_type", "x"), ("loss", "l3"), ("weighting", "snr")):
        with pytest.raises(ValueError, match=f"unknown {field} '{value}'; known: "):
            Objective(**{field: value})
    with pytest.raises(ValueError, match="predicts 2 channels, expected 4"):
        loss_of(lambda z_t, t: z_t, learned_variance=True)
