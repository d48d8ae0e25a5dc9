"""The state of a training stage, and randomness that does not depend on the topology."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from latent_diffusion_jax.models.precision import multiplying
from latent_diffusion_jax.runtime import sharding


@flax.struct.dataclass
class State:
    """What a train step works on. `None` where a stage has no such part.

    Attributes:
      step: number of updates made, int32 scalar.
      params: trained parameters, a nested dict with one top-level key for each network.
      ema: moving average of `params`, or of a part of it.
      opt: optimizer state.
      frozen: parameters that the step reads and never changes; not part of checkpoints.
      averages: other moving averages that steps keep, of a codebook or of logits.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt: Any
    frozen: Any = None
    averages: Any = None


TrainStep = Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]


class Stage(NamedTuple):
    """What the training loop knows of a stage: a few pure functions.

    Attributes:
      init: key -> State.
      train_step: (state, batch, key) -> (state, metrics).
      eval_step: (state, batch, key) -> metrics, each [B]: one value for an example.
      preview: (state, batch, key) -> images [N, H, W, C] in [-1, 1] to look at.
    """

    init: Callable[[jax.Array], State]
    train_step: TrainStep
    eval_step: Callable[[State, Any, jax.Array], dict[str, jax.Array]]
    preview: Callable[[State, Any, jax.Array], jax.Array]


def jit_train_step(
    stage: Stage, state_shardings: Any, mesh: Mesh, options: dict[str, Any] | None = None
) -> Any:
    """A stage's train step over a mesh; the state that it is given is gone afterwards.

    A step with a figure that is not finite, a loss or a gradient's norm, changes nothing but the
    number of steps: see `finite_steps_alone`.

    It is traced, and compiled, with the mesh in context (`jax.set_mesh`).
    """
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        finite_steps_alone(stage.train_step),
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
        compiler_options=options,
    )


def finite_steps_alone(train_step: TrainStep) -> TrainStep:
    """A train step that leaves the state as it was where one of its figures is not finite.

    All devices decide alike, as figures are of the whole batch. Its number goes up all the same, so
    that the next step has another batch. The figure `skipped` is 1 then, else 0.
    """

    @functools.wraps(train_step)
    def run(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        new, metrics = train_step(state, batch, key)
        finite = jnp.all(jnp.stack([jnp.isfinite(value) for value in metrics.values()]))
        kept = dataclasses.replace(state, step=new.step, frozen=None)
        new = dataclasses.replace(new, frozen=None)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        metrics = metrics | {"skipped": 1.0 - finite.astype(jnp.float32)}
        return dataclasses.replace(new, frozen=state.frozen), metrics

    return run


def with_precision(stage: Stage, precision: str, dtype: Any) -> Stage:
    """The stage with products of one precision, also where none of its networks says its own.

    Such as in backward passes that are written by hand, which are traced after the networks.

    Args:
      stage: its functions.
      precision: one of `models.precision.PRECISIONS`.
      dtype: of the computation.
    """

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            with multiplying(precision, dtype):
                return function(*args)

        return run

    return Stage(*(wrapped(function) for function in stage))


def sample_keys(key: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """One key for each example of step `step`'s global batch: [B].

    Keyed by the example's global index, step * B + row, so that the random numbers are the same
    on any number of devices and processes, and after a resume.
    """
    index = step.astype(jnp.uint32) * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
