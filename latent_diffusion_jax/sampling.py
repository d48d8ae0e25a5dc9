"""Text to image as one pure function: text encoder, guided sampling loop, decoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.diffusion.guidance import classifier_free
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, normal_per_key
from latent_diffusion_jax.diffusion.schedules import sampling_timesteps
from latent_diffusion_jax.ldm import LatentDiffusion

Draw = Callable[..., jax.Array]


def make_txt2img(ldm: LatentDiffusion, sampler: str, steps: int) -> Draw:
    """The whole of sampling as one pure function, to be jitted.

    Args:
      ldm: the networks.
      sampler: one of `SAMPLERS`.
      steps: number of sampling steps.

    Returns:
      (params, tokens [B, L], null_tokens [L], seeds uint32 [B], guidance_scale, eta) -> images
      [B, H, W, C] in [-1, 1]. Row i depends on tokens[i] and seeds[i] alone.

    Raises:
      ValueError: the sampler is unknown, or the steps are not in 1 .. T.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    timesteps = sampling_timesteps(ldm.schedule.num_timesteps, steps)

    def txt2img(
        params: Any,
        tokens: jax.Array,
        null_tokens: jax.Array,
        seeds: jax.Array,
        guidance_scale: jax.Array,
        eta: jax.Array,
    ) -> jax.Array:
        keys = jax.vmap(jax.random.key)(seeds)
        start_keys, step_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        z_T = normal_per_key(start_keys, ldm.latent_shape)
        null = jnp.broadcast_to(null_tokens, tokens.shape)
        predict = classifier_free(
            lambda z_t, t, cond: ldm.predict_epsilon(params, z_t, t, cond),
            ldm.condition(params, tokens),
            ldm.condition(params, null),
            guidance_scale,
        )
        z_0 = SAMPLERS[sampler](predict, z_T, ldm.schedule, timesteps, step_keys, eta)
        return jnp.clip(ldm.decode(params, z_0), -1.0, 1.0)

    return txt2img
