"""The denoising objectives: what is predicted, how its error counts, and learned variances."""

import dataclasses
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.process import (
    PREDICTION_TYPES,
    add_noise,
    predicted_z_0,
    prediction_target,
)
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule

LOSSES = ("l2", "l1", "huber")
WEIGHTINGS = ("none", "min_snr", "p2")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the second stage is trained for.

    Attributes:
      prediction_type: one of `PREDICTION_TYPES`.
      loss: `l2`, `l1`, or `huber`, quadratic below `huber_delta` and linear above.
      huber_delta: see there.
      weighting: `none` counts all timesteps alike; `min_snr` bounds the weight of clean ones (Hang
        et al., 2023, equation 6); `p2` lowers it (Choi et al., 2022, equation 8).
      min_snr_gamma: bound on the signal-to-noise ratio.
      p2_gamma, p2_k: exponent and offset.
      offset_noise: standard deviation of noise that is the same at all pixels of a channel, added
        to the noise of training, so that very dark and bright images can be learned.
      learned_variance: the network predicts variances in as many channels again, between the
        smallest and the largest of the posterior's (Improved DDPM, equation 15).
      vlb_weight: of the variational bound that teaches them, summed over timesteps, in bits per
        dimension (Improved DDPM, section 3.1, lambda).
    """

    prediction_type: str = "epsilon"
    loss: str = "l2"
    huber_delta: float = 0.1
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    offset_noise: float = 0.0
    learned_variance: bool = False
    vlb_weight: float = 0.001

    def __post_init__(self) -> None:
        for name, known in (
            ("prediction_type", PREDICTION_TYPES),
            ("loss", LOSSES),
            ("weighting", WEIGHTINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}"
                )


def sample_timesteps(schedule: NoiseSchedule, keys: jax.Array) -> jax.Array:
    """One timestep uniform in 0 .. T-1 for each key: int32 [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_timesteps))(keys)


def training_noise(objective: Objective, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise [B, *shape], row i from keys[i] alone: standard normal, and the offset's."""

    def draw(key: jax.Array) -> jax.Array:
        if not objective.offset_noise:
            return jax.random.normal(key, shape)
        key_noise, key_offset = jax.random.split(key)
        offset = jax.random.normal(key_offset, (*(1,) * (len(shape) - 1), shape[-1]))
        return jax.random.normal(key_noise, shape) + objective.offset_noise * offset

    return jax.vmap(draw)(keys)


def loss_weights(objective: Objective, schedule: NoiseSchedule) -> np.ndarray:
    """Weight of the error of the prediction at each timestep, [T].

    The papers give them for errors of epsilon; an error of z_0 is worth SNR times, one of v
    SNR / (SNR + 1) times as much.
    """
    alpha_bar = schedule.alphas_cumprod
    snr = alpha_bar / (1.0 - alpha_bar)
    if objective.weighting == "none":
        return np.ones_like(snr)
    if objective.weighting == "min_snr":
        of_z_0 = np.minimum(snr, objective.min_snr_gamma)
    else:
        of_z_0 = snr / (objective.p2_k + snr) ** objective.p2_gamma
    if objective.prediction_type == "z_0":
        return of_z_0
    if objective.prediction_type == "v":
        return of_z_0 / (snr + 1.0)
    return of_z_0 / np.maximum(snr, 1e-20)


def denoising_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: NoiseSchedule,
    objective: Objective,
    z_0: jax.Array,
    epsilon: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective at some timesteps (DDPM, equation 14; LDM, equation 3).

    Args:
      predict: (z_t [B, h, w, c], t [B]) -> prediction [B, h, w, c], or [.., 2 c] with learned
        variances, those last.
      schedule: the forward process.
      objective: what counts.
      z_0: clean latents [B, h, w, c].
      epsilon: noise of the same shape.
      t: timesteps [B].

    Returns:
      (loss [B], its parts {name: [B]}), float32: `mse`, the squared error of the prediction, and
      with learned variances `vlb`, their share of the bound in bits per dimension.

    Raises:
      ValueError: the prediction has not the channels that the objective asks for.
    """
    chex.assert_equal_shape([z_0, epsilon])
    chex.assert_shape(t, (z_0.shape[0],))
    channels, axes = z_0.shape[-1], tuple(range(1, z_0.ndim))
    z_t = add_noise(schedule, z_0, epsilon, t)
    found = predict(z_t, t).astype(jnp.float32)
    expected = channels * (2 if objective.learned_variance else 1)
    if found.shape[-1] != expected:
        raise ValueError(f"the network predicts {found.shape[-1]} channels, expected {expected}")
    found, variance = found[..., :channels], found[..., channels:]
    error = found - prediction_target(objective.prediction_type, schedule, z_0, epsilon, t)
    squared = jnp.mean(jnp.square(error), axes)
    loss = squared if objective.loss == "l2" else jnp.mean(_penalty(objective, error), axes)
    parts = {"mse": squared}
    if objective.weighting != "none":
        loss *= jnp.asarray(loss_weights(objective, schedule), jnp.float32)[t]
    if objective.learned_variance:
        # The mean is taught by the simple loss alone.
        mean = jax.lax.stop_gradient(
            predicted_z_0(objective.prediction_type, schedule, z_t, found, t)
        )
        parts["vlb"] = variational_bound(schedule, z_0, z_t, mean, variance, t)
        loss += objective.vlb_weight * schedule.num_timesteps * parts["vlb"]
    return loss, parts


def _penalty(objective: Objective, error: jax.Array) -> jax.Array:
    size, delta = jnp.abs(error), objective.huber_delta
    if objective.loss == "l1":
        return size
    # Scaled so that it is the squared error below delta.
    return jnp.where(size <= delta, jnp.square(error), delta * (2.0 * size - delta))


def variational_bound(
    schedule: NoiseSchedule,
    z_0: jax.Array,
    z_t: jax.Array,
    predicted: jax.Array,
    variance: jax.Array,
    t: jax.Array,
    bin_width: float = 2.0 / 255.0,
) -> jax.Array:
    """The term of the variational bound at a timestep, in bits per dimension: [B].

    The divergence of the model's p(z_{t-1} | z_t) from the true posterior, at t = 0 the likelihood
    of z_0 (DDPM, equations 5 to 7; Improved DDPM, section 3.1).

    Args:
      schedule: the forward process.
      z_0, z_t: clean and noisy latents [B, h, w, c].
      predicted: z_0 as the network predicts it.
      variance: its choice of log variances, -1 for the smallest and 1 for the largest.
      t: timesteps [B].
      bin_width: of the values that z_0 may have, for the likelihood; that of 8-bit pixels in
        [-1, 1], which DiT uses for latents too.
    """
    alpha_bar = schedule.alphas_cumprod
    before = np.append(1.0, alpha_bar[:-1])
    betas = schedule.betas
    posterior = betas * (1.0 - before) / (1.0 - alpha_bar)
    posterior[0] = posterior[1] if len(posterior) > 1 else betas[0]  # 0 has no logarithm

    def at_t(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, jnp.float32)[t].reshape((-1,) + (1,) * (z_0.ndim - 1))

    from_z_0 = at_t(np.sqrt(before) * betas / (1.0 - alpha_bar))
    from_z_t = at_t(np.sqrt(1.0 - betas) * (1.0 - before) / (1.0 - alpha_bar))
    low, high = at_t(np.log(posterior)), at_t(np.log(betas))
    log_variance = low + (variance + 1.0) / 2.0 * (high - low)
    mean = from_z_0 * predicted + from_z_t * z_t
    apart = from_z_0 * (z_0 - predicted)
    divergence = 0.5 * (
        log_variance - low - 1.0 + jnp.exp(low - log_variance)
        + jnp.square(apart) * jnp.exp(-log_variance)
    )  # fmt: skip
    likelihood = -_log_likelihood(z_0, mean, 0.5 * log_variance, bin_width)
    first = (t == 0).reshape((-1,) + (1,) * (z_0.ndim - 1))
    bits = jnp.where(first, likelihood, divergence) / math.log(2.0)
    return jnp.mean(bits, tuple(range(1, z_0.ndim)))


def _log_likelihood(
    x: jax.Array, mean: jax.Array, log_deviation: jax.Array, bin_width: float
) -> jax.Array:
    """Log probability of the bin that x lies in; the outermost bins of [-1, 1] have no end."""
    centred, inverse = x - mean, jnp.exp(-log_deviation)
    upper = jax.scipy.stats.norm.cdf((centred + bin_width / 2.0) * inverse)
    lower = jax.scipy.stats.norm.cdf((centred - bin_width / 2.0) * inverse)
    upper, lower = jnp.where(x > 0.999, 1.0, upper), jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))
