"""The denoising objective (DDPM, equation 14; LDM, equation 3)."""

import chex
import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.process import add_noise
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule


def sample_timesteps(schedule: NoiseSchedule, keys: jax.Array) -> jax.Array:
    """One timestep uniform in 0 .. T-1 for each key: int32 [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_timesteps))(keys)


def denoising_loss(
    predict_epsilon, schedule: NoiseSchedule, z_0: jax.Array, epsilon: jax.Array, t: jax.Array
) -> jax.Array:
    """Squared error of the predicted noise, averaged over an example: [B], float32.

    Args:
      predict_epsilon: (z_t [B, h, w, c], t [B]) -> epsilon of z_t's shape.
      schedule: the forward process.
      z_0: clean latents [B, h, w, c].
      epsilon: standard normal noise of the same shape.
      t: timesteps [B].
    """
    chex.assert_equal_shape([z_0, epsilon])
    chex.assert_shape(t, (z_0.shape[0],))
    error = predict_epsilon(add_noise(schedule, z_0, epsilon, t), t) - epsilon
    return jnp.mean(jnp.square(error.astype(jnp.float32)), axis=tuple(range(1, z_0.ndim)))
