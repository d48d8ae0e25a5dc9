"""Conditions: what a model is told about the image it is to make.

Each kind has two halves. On the host, a `Conditioning` says what of a record goes into a batch; on
the devices, `LatentDiffusion.condition` makes a `Cond` of it, in training and sampling alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Cond:
    """A condition as the UNet takes it, whatever it was made from.

    Attributes:
      context: tokens for cross-attention [B, L, D], or None.
      vector: labels [B], or vectors [B, D], that are embedded with the timestep, or None.
      concat: maps [B, h, w, c] that the UNet sees beside z_t, after its channels, or None.
    """

    context: jax.Array | None = None
    vector: jax.Array | None = None
    concat: jax.Array | None = None


class Conditioning(NamedTuple):
    """The host half of a condition: arrays by name, `tokens` or `label`; none at all without one.

    Attributes:
      prepare: (record, generator) -> one example's; without a generator, always the same.
      null: one example's that stand for "no condition".
      previews: those to draw at every preview, with a leading axis N.
    """

    prepare: Callable[[dict[str, Any], np.random.Generator | None], dict[str, np.ndarray]]
    null: dict[str, np.ndarray]
    previews: dict[str, np.ndarray]


UNCONDITIONAL = Conditioning(lambda record, rng: {}, {}, {})


def drop(inputs: jax.Array, null: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Replaces rows by the null input with probability `rate`, to train for guidance.

    Args:
      inputs: the condition's inputs [B, ...], such as token ids.
      null: what stands for "no condition" [...].
      keys: a random key for each row [B].
      rate: probability of a replacement, in [0, 1].
    """
    chex.assert_shape(keys, (inputs.shape[0],))
    chex.assert_shape(null, inputs.shape[1:])
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    dropped = dropped.reshape((-1,) + (1,) * (inputs.ndim - 1))
    return jnp.where(dropped, null[None], inputs)
