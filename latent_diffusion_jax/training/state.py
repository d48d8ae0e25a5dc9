"""The state of a training stage, and randomness that does not depend on the topology."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


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


class Stage(NamedTuple):
    """What the training loop knows of a stage: a few pure functions.

    Attributes:
      init: key -> State.
      train_step: (state, batch, key) -> (state, metrics).
      eval_step: (state, batch, key) -> metrics, each [B]: one value for an example.
      preview: (state, batch, key) -> images [N, H, W, C] in [-1, 1] to look at.
    """

    init: Callable[[jax.Array], State]
    train_step: Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]
    eval_step: Callable[[State, Any, jax.Array], dict[str, jax.Array]]
    preview: Callable[[State, Any, jax.Array], jax.Array]


def sample_keys(key: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """One key for each example of step `step`'s global batch: [B].

    Keyed by the example's global index, step * B + row, so that the random numbers are the same
    on any number of devices and processes, and after a resume.
    """
    index = step.astype(jnp.uint32) * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
