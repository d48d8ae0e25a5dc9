"""The second stage: the UNet and its conditioner learn to denoise latents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion_jax.conditioning.base import Conditioning, drop
from latent_diffusion_jax.diffusion.losses import (
    Objective,
    denoising_loss,
    sample_timesteps,
    training_noise,
)
from latent_diffusion_jax.diffusion.plan import Plan
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.runtime import processes, trees
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.runtime.randomness import normal_per_key
from latent_diffusion_jax.sampling import Draw, Request
from latent_diffusion_jax.training import ema
from latent_diffusion_jax.training.gradients import accumulate, map_parts
from latent_diffusion_jax.training.state import Stage, State, sample_keys


def make_stage(
    ldm: LatentDiffusion,
    optimizer: optax.GradientTransformation,
    conditioning: Conditioning,
    previews: Request,
    *,
    objective: Objective,
    condition_dropout: float,
    ema_decay: float,
    draw: Draw,
    plan: Plan,
    accumulation: int = 1,
    param_dtype: str = "float32",
    ema_dtype: str = "float32",
) -> Stage:
    """Builds the stage. `State.frozen` holds the parameters that `ldm` needs and does not train.

    A batch has the inputs of the condition and `image`, uint8 [B, H, W, C], or in its place
    `moments` [B, h, w, c'], with which the encoder's parameters are not needed.

    Args:
      ldm: the networks.
      optimizer: for the UNet and, where it is trained, the conditioner together.
      conditioning: the host half of what the UNet is told.
      previews: what to draw at every preview.
      objective: what the UNet is trained for.
      condition_dropout: share of conditions replaced by none, for guidance.
      ema_decay: decay of the moving average that samples are drawn with.
      draw, plan: what `make_draw` and `make_plan` gave, for previews.
      accumulation: micro-batches that a batch is worked on in, one after the other; the step is
        the same but for rounding.
      param_dtype, ema_dtype: of the trained parameters, and of their moving average.
    """

    def init(key: jax.Array) -> State:
        null = {name: jnp.asarray(value)[None] for name, value in conditioning.null.items()}
        params = trees.in_dtype(ldm.init_trained(key, null), param_dtype)
        average = trees.in_dtype(params, ema_dtype)
        return State(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))

    def loss_per_example(
        params: Any,
        batch: Any,
        t: jax.Array,
        keys: jax.Array,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        noises = jax.vmap(lambda key: jax.random.split(key))(keys)
        posterior_noise = normal_per_key(noises[:, 0], ldm.latent_shape)
        epsilon = training_noise(objective, noises[:, 1], ldm.latent_shape)
        if "moments" in batch:
            z_0 = ldm.sample_latents(params, batch["moments"], posterior_noise)
        else:
            z_0 = ldm.encode(params, to_float(batch["image"]), posterior_noise)
        cond = ldm.condition(params, {name: batch[name] for name in conditioning.null})
        return denoising_loss(
            lambda z_t, t: ldm.predict(params, z_t, t, cond, dropout_keys),
            ldm.schedule,
            objective,
            z_0,
            epsilon,
            t,
        )

    def train_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        keys = sample_keys(key, state.step, _size(batch))
        noise_keys, t_keys, drop_keys, dropout_keys = jnp.unstack(
            jax.vmap(lambda k: jax.random.split(k, 4))(keys), axis=1
        )
        t = sample_timesteps(ldm.schedule, t_keys)
        batch = batch | {
            name: drop(batch[name], jnp.asarray(null), drop_keys, condition_dropout)
            for name, null in conditioning.null.items()
        }

        # All randomness is drawn for the whole batch, or split with it: micro-batches do not
        # change it.
        inputs = {"batch": batch, "t": t, "noise": noise_keys, "dropout": dropout_keys}

        def micro_batch(part: Any) -> tuple[Any, Any]:
            def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
                found = loss_per_example(
                    state.frozen | params, part["batch"], part["t"], part["noise"], part["dropout"]
                )
                return jax.tree.map(jnp.mean, found)

            return jax.value_and_grad(loss_fn, has_aux=True)(state.params), ()

        ((loss, parts), grads), _ = accumulate(micro_batch, inputs, accumulation)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.ema, params, state.step, ema_decay)
        metrics = {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, average, opt, state.frozen), metrics

    def eval_step(state: State, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        # The noise depends on the key alone, and any first rows of a batch have timesteps that are
        # spread evenly (multiples of the golden ratio), so that steps and runs are comparable.
        size = _size(batch)
        spread = (np.arange(size) + 0.5) * (np.sqrt(1.25) - 0.5) % 1.0
        t = jnp.asarray(spread * ldm.schedule.num_timesteps, jnp.int32)
        keys = sample_keys(key, jnp.zeros((), jnp.int32), size)
        params = state.frozen | state.ema

        def figures_of(part: Any) -> dict[str, jax.Array]:
            loss, parts = loss_per_example(params, part["batch"], part["t"], part["noise"])
            return {"loss": loss, **parts}

        return map_parts(figures_of, {"batch": batch, "t": t, "noise": keys}, accumulation)

    def preview(state: State, batch: Any, key: jax.Array) -> jax.Array:
        del batch, key
        return draw(state.frozen | state.ema, previews, plan)[0]

    return Stage(init, train_step, eval_step, preview)


def start_from(state: State, params: Any) -> State:
    """A fresh state whose trained parameters, and their average, are another model's.

    `params` are laid out over devices, and rounded, as the state's own.
    """

    def like(params: Any, own: Any) -> Any:
        return jax.tree.map(
            lambda new, old: processes.put(np.asarray(new, old.dtype), old.sharding), params, own
        )

    return dataclasses.replace(
        state, params=like(params, state.params), ema=like(params, state.ema)
    )


def _size(batch: Any) -> int:
    """Examples of a batch."""
    return batch["moments" if "moments" in batch else "image"].shape[0]
