"""The second stage: the UNet and its conditioner learn to denoise latents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion_jax.conditioning.base import drop
from latent_diffusion_jax.diffusion.guidance import classifier_free
from latent_diffusion_jax.diffusion.losses import denoising_loss, sample_timesteps
from latent_diffusion_jax.diffusion.samplers import ddim, normal_per_key
from latent_diffusion_jax.diffusion.schedules import sampling_timesteps
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.training import ema
from latent_diffusion_jax.training.state import Stage, State, sample_keys, to_float


def make_stage(
    ldm: LatentDiffusion,
    optimizer: optax.GradientTransformation,
    null_tokens: np.ndarray,
    preview_tokens: np.ndarray,
    *,
    caption_dropout: float,
    ema_decay: float,
    preview_steps: int,
    preview_guidance_scale: float,
) -> Stage:
    """Builds the stage. `State.frozen` holds the parameters `autoencoder` and `scale_factor`.

    Args:
      ldm: the networks.
      optimizer: for the UNet and the conditioner together.
      null_tokens: token ids of the empty caption [L].
      preview_tokens: token ids of the captions to draw at every preview [N, L].
      caption_dropout: share of captions replaced by the empty one, for guidance.
      ema_decay: decay of the moving average that samples are drawn with.
      preview_steps: sampling steps of a preview.
      preview_guidance_scale: its guidance scale.
    """

    def init(key: jax.Array) -> State:
        params = ldm.init_trained(key, len(null_tokens))
        average = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))

    def loss_per_example(params: Any, batch: Any, tokens: jax.Array, t: jax.Array, keys: jax.Array):
        noises = jax.vmap(lambda key: jax.random.split(key))(keys)
        posterior_noise = normal_per_key(noises[:, 0], ldm.latent_shape)
        epsilon = normal_per_key(noises[:, 1], ldm.latent_shape)
        z_0 = ldm.encode(params, to_float(batch["image"]), posterior_noise)
        cond = ldm.condition(params, tokens)
        return denoising_loss(
            lambda z_t, t: ldm.predict_epsilon(params, z_t, t, cond), ldm.schedule, z_0, epsilon, t
        )

    def train_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        keys = sample_keys(key, state.step, batch["image"].shape[0])
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
        # The timesteps are spread evenly and the noise depends on the key alone, so that the
        # figure is comparable between steps and runs.
        size = batch["image"].shape[0]
        t = jnp.arange(size) * ldm.schedule.num_timesteps // size
        keys = sample_keys(key, jnp.zeros((), jnp.int32), size)
        return {"loss": loss_per_example(state.frozen | state.ema, batch, batch["tokens"], t, keys)}

    def preview(state: State, batch: Any, key: jax.Array) -> jax.Array:
        del batch
        params = state.frozen | state.ema
        keys = jax.random.split(key, len(preview_tokens))
        null = jnp.broadcast_to(jnp.asarray(null_tokens), preview_tokens.shape)
        predict = classifier_free(
            lambda z_t, t, cond: ldm.predict_epsilon(params, z_t, t, cond),
            ldm.condition(params, jnp.asarray(preview_tokens)),
            ldm.condition(params, null),
            jnp.float32(preview_guidance_scale),
        )
        z_T = normal_per_key(keys, ldm.latent_shape)
        timesteps = sampling_timesteps(ldm.schedule.num_timesteps, preview_steps)
        z_0 = ddim(predict, z_T, ldm.schedule, timesteps, keys)
        return jnp.clip(ldm.decode(params, z_0), -1.0, 1.0)

    return Stage(init, train_step, eval_step, preview)
