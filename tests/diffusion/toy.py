"""A fixed denoiser for samplers to be compared on, in JAX and in PyTorch."""

import jax.numpy as jnp
import numpy as np
import torch

from latent_diffusion_jax.diffusion.schedules import make_schedule

BETAS = dict(beta_start=0.00085, beta_end=0.012)
SCHEDULE = make_schedule("scaled_linear", 1000, **BETAS)


def predict(z_t, t, guidance_scale=1.0):
    """Smooth in z_t and t, bounded by 1.2."""
    phase = jnp.asarray(t, jnp.float32).reshape((-1,) + (1,) * (z_t.ndim - 1)) / 200
    return 0.9 * jnp.tanh(z_t) + 0.3 * jnp.sin(phase + z_t)


def torch_predict(z_t, t):
    return 0.9 * torch.tanh(z_t) + 0.3 * torch.sin(t / 200 + z_t)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
