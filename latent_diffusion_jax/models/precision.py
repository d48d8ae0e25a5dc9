"""How exactly accelerators multiply numbers in float32.

TPUs multiply in bfloat16 and split float32 into parts for it: `default` is one product, as coarse
as if the network computed in bfloat16, `high` are three, `highest` are six and nearly float32. GPUs
take TF32 but for `highest`; CPUs multiply in float32 always.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PRECISIONS = ("default", "high", "highest")


def multiplying(precision: str, dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """A context; what is traced in it multiplies so, as do the gradients of it.

    Where `dtype`, that of the computation, is not float32 there is nothing to split.
    """
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision(precision if wide else "default")


def precise(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method of a network with the fields `precision` and `dtype`: all it applies.

    In the network itself, so that whoever applies it gets the numbers that it was trained with.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with multiplying(self.precision, self.dtype):
            return method(self, *args, **kwargs)

    return wrapped
