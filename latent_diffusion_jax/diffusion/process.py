"""The forward process and the conversions between z_0 and epsilon.

z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) epsilon (DDPM, equation 4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.schedules import NoiseSchedule


class Prediction(NamedTuple):
    """What a denoiser says of z_t, both views of the same prediction; shapes as z_t."""

    z_0: jax.Array
    epsilon: jax.Array


def signal_and_noise(
    schedule: NoiseSchedule, t: jax.Array, ndim: int
) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t [B], as [B, 1, ...] with `ndim` axes."""
    alpha_bar = schedule.alphas_cumprod
    shape = (-1,) + (1,) * (ndim - 1)
    alpha = jnp.asarray(np.sqrt(alpha_bar), jnp.float32)[t].reshape(shape)
    sigma = jnp.asarray(np.sqrt(1.0 - alpha_bar), jnp.float32)[t].reshape(shape)
    return alpha, sigma


def add_noise(
    schedule: NoiseSchedule, z_0: jax.Array, epsilon: jax.Array, t: jax.Array
) -> jax.Array:
    """z_t for clean latents z_0 [B, ...], noise of the same shape and timesteps t [B]."""
    alpha, sigma = signal_and_noise(schedule, t, z_0.ndim)
    return alpha * z_0 + sigma * epsilon


def prediction_from_epsilon(
    schedule: NoiseSchedule, z_t: jax.Array, epsilon: jax.Array, t: jax.Array
) -> Prediction:
    """Solves the forward process for z_0, given a predicted epsilon."""
    alpha, sigma = signal_and_noise(schedule, t, z_t.ndim)
    return Prediction((z_t - sigma * epsilon) / alpha, epsilon)
