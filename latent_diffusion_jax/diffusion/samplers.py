"""Samplers: from noise z_T to latents z_0, each one function over one `lax.scan`.

All take the same arguments, so that a new one is a function and a line in `SAMPLERS`.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.process import prediction_from_epsilon
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule

PredictEpsilon = Callable[[jax.Array, jax.Array], jax.Array]


def normal_per_key(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, *shape], row i from keys[i] alone.

    A row so does not depend on the batch it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def ddim(
    predict_epsilon: PredictEpsilon,
    z_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    keys: jax.Array,
    eta: jax.Array | float = 0.0,
) -> jax.Array:
    """DDIM (Song et al., 2021, equation 12).

    Args:
      predict_epsilon: (z_t [B, ...], t [B]) -> epsilon [B, ...].
      z_T: standard normal noise [B, ...].
      schedule: the forward process.
      timesteps: the timesteps to visit, falling, [S]; after the last one comes z_0 itself.
      keys: one random key for each row, [B]; used where eta > 0.
      eta: 0 is deterministic, 1 has the variance of DDPM's posterior. May be traced.

    Returns:
      z_0 [B, ...], float32.
    """
    chex.assert_shape(keys, (z_T.shape[0],))
    alpha_bar = schedule.alphas_cumprod[timesteps]
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    # Equation 16: the step's noise at eta = 1.
    sigma = np.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    steps = (
        jnp.asarray(timesteps, jnp.int32),
        jnp.asarray(np.sqrt(alpha_bar_next), jnp.float32),
        jnp.asarray(1 - alpha_bar_next, jnp.float32),
        jnp.asarray(sigma, jnp.float32),
        jnp.arange(len(timesteps)),
    )

    def step(z_t: jax.Array, inputs) -> tuple[jax.Array, None]:
        t, alpha_next, variance_next, sigma, i = inputs
        t = jnp.full(z_t.shape[0], t)
        z_0, epsilon = prediction_from_epsilon(schedule, z_t, predict_epsilon(z_t, t), t)
        sigma = eta * sigma
        noise = normal_per_key(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z_t.shape[1:])
        direction = jnp.sqrt(jnp.maximum(variance_next - sigma**2, 0.0)) * epsilon
        return alpha_next * z_0 + direction + sigma * noise, None

    return jax.lax.scan(step, z_T.astype(jnp.float32), steps)[0]


def ddpm(
    predict_epsilon: PredictEpsilon,
    z_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    keys: jax.Array,
    eta: jax.Array | float = 1.0,
) -> jax.Array:
    """Ancestral sampling (DDPM, algorithm 2) with the posterior's variance.

    The same update as DDIM's at eta = 1 (DDIM, section 4.1); `eta` is ignored.
    """
    del eta
    return ddim(predict_epsilon, z_T, schedule, timesteps, keys, eta=1.0)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}
