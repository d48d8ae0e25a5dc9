"""The second stage: the UNet and its conditioner learn to denoise latents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion_jax.conditioning.base import drop
from latent_diffusion_jax.diffusion.losses import denoising_loss, sample_timesteps
from latent_diffusion_jax.diffusion.samplers import normal_per_key
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.sampling import Draw
from latent_diffusion_jax.training import ema
from latent_diffusion_jax.training.state import Stage, State, sample_keys


def make_stage(
    ldm: LatentDiffusion,
    optimizer: optax.GradientTransformation,
    null_tokens: np.ndarray,
    preview_tokens: np.ndarray,
    *,
    caption_dropout: float,
    ema_decay: float,
    draw: Draw,
    guidance_scale: float,
    eta: float,
) -> Stage:
    """Builds the stage. `State.frozen` holds the parameters `autoencoder` and `scale_factor`.

    A batch has `tokens` [B, L] and `image`, uint8 [B, H, W, C], or in its place `moments`
    [B, h, w, c'], with which the encoder's parameters are not needed.

    Args:
      ldm: the networks.
      optimizer: for the UNet and the conditioner together.
      null_tokens: token ids of the empty caption [L].
      preview_tokens: token ids of the captions to draw at every preview [N, L].
      caption_dropout: share of captions replaced by the empty one, for guidance.
      ema_decay: decay of the moving average that samples are drawn with.
      draw: what `make_txt2img` gave, for previews.
      guidance_scale: of previews.
      eta: of previews.
    """

    def init(key: jax.Array) -> State:
        params = ldm.init_trained(key, len(null_tokens))
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))

    def loss_per_example(params: Any, batch: Any, tokens: jax.Array, t: jax.Array, keys: jax.Array):
        noises = jax.vmap(lambda key: jax.random.split(key))(keys)
        posterior_noise = normal_per_key(noises[:, 0], ldm.latent_shape)
        epsilon = normal_per_key(noises[:, 1], ldm.latent_shape)
        if "moments" in batch:
            z_0 = ldm.sample_latents(params, batch["moments"], posterior_noise)
        else:
            z_0 = ldm.encode(params, to_float(batch["image"]), posterior_noise)
        cond = ldm.condition(params, tokens)
        return denoising_loss(
            lambda z_t, t: ldm.predict_epsilon(params, z_t, t, cond), ldm.schedule, z_0, epsilon, t
        )

    def train_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        keys = sample_keys(key, state.step, batch["tokens"].shape[0])
        noise_keys, t_keys, drop_keys = jnp.unstack(
            jax.vmap(lambda k: jax.random.split(k, 3))(keys), axis=1
        )
        t = sample_timesteps(ldm.schedule, t_keys)
        tokens = drop(batch["tokens"], jnp.asarray(null_tokens), drop_keys, caption_dropout)

        def loss_fn(params: Any) -> jax.Array:
            return jnp.mean(loss_per_example(state.frozen | params, batch, tokens, t, noise_keys))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.ema, params, state.step, ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, average, opt, state.frozen), metrics

    def eval_step(state: State, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        # The noise depends on the key alone, and any first rows of a batch have timesteps that are
        # spread evenly (multiples of the golden ratio), so that steps and runs are comparable.
        size = batch["tokens"].shape[0]
        spread = (np.arange(size) + 0.5) * (np.sqrt(1.25) - 0.5) % 1.0
        t = jnp.asarray(spread * ldm.schedule.num_timesteps, jnp.int32)
        keys = sample_keys(key, jnp.zeros((), jnp.int32), size)
        return {"loss": loss_per_example(state.frozen | state.ema, batch, batch["tokens"], t, keys)}

    def preview(state: State, batch: Any, key: jax.Array) -> jax.Array:
        del batch, key  # image i has seed i, as with the sample command
        return draw(
            state.frozen | state.ema,
            jnp.asarray(preview_tokens),
            jnp.asarray(null_tokens),
            jnp.arange(len(preview_tokens), dtype=jnp.uint32),
            jnp.float32(guidance_scale),
            jnp.float32(eta),
        )

    return Stage(init, train_step, eval_step, preview)
