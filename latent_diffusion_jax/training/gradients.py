"""Gradients under XLA's control flow: micro-batches, and work that only some steps need.

On CPUs XLA takes a hundred times as long for the weight gradients of convolutions inside loops and
branches, so there loops are unrolled and branches computed and selected.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.runtime.context_mesh import by_platform


def accumulate(
    function: Callable[[Any], tuple[Any, Any]], batch: Any, count: int
) -> tuple[Any, Any]:
    """Averages a function over micro-batches that are worked on one after the other.

    Memory is that of one micro-batch and one more copy of what is averaged, which is in float32
    also where the function gives halves: gradients of parameters in bfloat16.

    Args:
      function: micro-batch -> (what is averaged, what is kept of the last one).
      batch: a tree of arrays [B, ...]. Micro-batch i takes every count-th row from i on, so that
        each device works on its own rows.
      count: number of micro-batches; divides B.

    Returns:
      What `function` gives for the batch.
    """
    if count == 1:
        found, last = function(batch)
        return jax.tree.map(_wide, found), last
    function = jax.jit(function)  # traced once
    parts = _parts(batch, count)

    def part(i: Any) -> Any:
        return jax.tree.map(lambda x: x[i], parts)

    def add(total: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: a + _wide(b) / count, total, new)

    def unrolled() -> tuple[Any, Any]:
        # Barriers keep XLA from working on all micro-batches at once.
        found, last = function(part(0))
        total = jax.tree.map(lambda x: _wide(x) / count, found)
        for i in range(1, count):
            inputs, total = jax.lax.optimization_barrier((part(i), total))
            found, last = function(inputs)
            total = add(total, found)
        return total, last

    def looped() -> tuple[Any, Any]:
        found, last = jax.eval_shape(function, part(0))
        found = jax.eval_shape(lambda found: jax.tree.map(_wide, found), found)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (found, last))

        def body(carry: tuple[Any, Any], inputs: Any) -> tuple[Any, None]:
            found, last = function(inputs)
            return (add(carry[0], found), last), None

        return jax.lax.scan(body, start, parts)[0]

    return by_platform(cpu=unrolled, default=looped)


def map_parts(function: Callable[[Any], Any], batch: Any, count: int) -> Any:
    """A function of examples by micro-batches, those of `accumulate`, which bounds its memory.

    Args:
      function: micro-batch -> a tree of arrays, a row for each example.
      batch: a tree of arrays [B, ...].
      count: number of micro-batches; divides B.

    Returns:
      What `function` gives for the batch.
    """
    if count == 1:
        return function(batch)
    function = jax.jit(function)  # traced once
    parts = _parts(batch, count)

    def unrolled() -> Any:
        found = [function(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(count)]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *found)

    found = by_platform(cpu=unrolled, default=lambda: jax.lax.map(function, parts))
    return jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found
    )


def _parts(batch: Any, count: int) -> Any:
    """[B, ...] to [count, B / count, ...]: each device keeps its own rows."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )


def _wide(x: jax.Array) -> jax.Array:
    """Halves as float32, all else as it is."""
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def run_if(condition: jax.Array, function: Callable[[Any], Any], otherwise: Any, args: Any) -> Any:
    """`function(args)` where the scalar condition holds, else `otherwise`, of the same shapes."""

    function = jax.jit(function)  # traced once

    def select() -> Any:
        return jax.tree.map(
            lambda new, old: jnp.where(condition, new, old), function(args), otherwise
        )

    def branch() -> Any:
        return jax.lax.cond(condition, lambda: function(args), lambda: otherwise)

    return by_platform(cpu=select, default=branch)
