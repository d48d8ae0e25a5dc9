"""Optimizers: learning-rate schedule, gradient clipping and Adam(W)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.runtime import trees
from latent_diffusion_jax.runtime.trees import path_name


def learning_rate_schedule(
    learning_rate: float, warmup_steps: int, num_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_fraction` of the peak at `num_steps`.

    A final fraction of 1 is a constant learning rate, as in LDM.
    """
    decay = optax.cosine_decay_schedule(
        learning_rate, max(num_steps - warmup_steps, 1), alpha=final_fraction
    )
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    num_steps: int,
    learning_rate: float,
    warmup_steps: int,
    final_fraction: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip_norm: float,
    mu_dtype: str = "float32",
    nu_dtype: str = "float32",
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (Adam where `weight_decay` is 0), after clipping by global norm where `clip_norm` > 0.

    Args:
      num_steps: length of the run in updates.
      learning_rate: peak value.
      warmup_steps: updates of linear warm-up.
      final_fraction: learning rate at the end as a fraction of the peak.
      betas: Adam's decay rates of the first and second moment.
      weight_decay: decoupled weight decay, on all parameters as in LDM.
      clip_norm: largest global norm of the gradients; 0 turns clipping off.
      mu_dtype, nu_dtype: that the first and the second moment are stored in, see `_adam`.
      eps: added to the second moment's root; large, it bounds steps along small gradients.
    """
    schedule = learning_rate_schedule(learning_rate, warmup_steps, num_steps, final_fraction)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.chain(  # optax.adamw
            _adam(betas, eps, mu_dtype, nu_dtype),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        ),
    )


def _adam(
    betas: tuple[float, float], eps: float, mu_dtype: str, nu_dtype: str
) -> optax.GradientTransformation:
    """Adam in float32, whose moments are rounded to these dtypes between updates.

    In bfloat16 each takes half the memory. Rounding the first moment is harmless: what it loses is
    small beside a batch's noise. The second one loses changes of less than 1/512 to 1/256 of it.
    With beta_2 = 0.999 an update takes off no more than 1/1000, so that it grows with large
    gradients and never falls again, and steps stay as small as the largest gradients made them. Of
    beta_2 = 0.99 and below it follows.
    """
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)

    def stored(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu, nu = trees.in_dtype(state.mu, mu_dtype), trees.in_dtype(state.nu, nu_dtype)
        return state._replace(mu=mu, nu=nu)

    def init(params: Any) -> optax.ScaleByAdamState:
        return stored(adam.init(params))

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        wide = state._replace(
            mu=trees.in_dtype(state.mu, jnp.float32), nu=trees.in_dtype(state.nu, jnp.float32)
        )
        updates, new = adam.update(grads, wide, params)
        return updates, stored(new)

    return optax.GradientTransformation(init, update)


def train_only(
    optimizer: optax.GradientTransformation, prefixes: tuple[str, ...]
) -> optax.GradientTransformation:
    """An optimizer for the parameters whose slash-joined name starts with one of `prefixes`.

    The others stay as they are: they have no moments, and do not count in the gradients' norm
    where that is clipped.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if path_name(path).startswith(prefixes) else "frozen", params
        )

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
