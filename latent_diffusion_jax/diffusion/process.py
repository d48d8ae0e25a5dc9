"""The forward process, and what a network may predict of it.

z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) epsilon (DDPM, equation 4).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.schedules import NoiseSchedule

# The noise; the clean latents; v = alpha epsilon - sigma z_0 (Salimans and Ho, 2022, appendix D).
PREDICTION_TYPES = ("epsilon", "z_0", "v")


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


def prediction_target(
    prediction_type: str,
    schedule: NoiseSchedule,
    z_0: jax.Array,
    epsilon: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """What a perfect network would say of z_t; arguments as for `add_noise`."""
    if prediction_type == "epsilon":
        return epsilon
    if prediction_type == "z_0":
        return z_0
    alpha, sigma = signal_and_noise(schedule, t, z_0.ndim)
    return alpha * epsilon - sigma * z_0


def z_0_coefficients(prediction_type: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(a, b) of z_0 = a z_t + b prediction, at the level (alpha, sigma).

    Numbers or arrays, of numpy or jax. Infinite for `epsilon` at alpha = 0, where the noise does
    not tell z_0.
    """
    if prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction_type == "z_0":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    return alpha, -sigma


def predicted_z_0(
    prediction_type: str,
    schedule: NoiseSchedule,
    z_t: jax.Array,
    prediction: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Clean latents [B, ...] from a prediction of their shape at timesteps t [B]."""
    a, b = z_0_coefficients(prediction_type, *signal_and_noise(schedule, t, z_t.ndim))
    return a * z_t + b * prediction
