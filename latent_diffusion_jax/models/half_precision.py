"""Dense layers and convolutions, on CPUs in the forms that XLA is fast at there.

In bfloat16 those are products of matrices in bfloat16 that are summed in float32, as accelerators
sum them: twice as fast as float32. There are none that sum in bfloat16, and no convolutions.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.runtime.context_mesh import by_platform

STEP_PIXELS = 1024  # whose sums in float32 stay in a processor's caches
_MATRICES = (((1,), (0,)), ((), ()))


def dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """`jax.lax.dot_general`, for `nn.Dense`; on CPUs leading axes are flattened first.

    The weight gradient then contracts over one axis instead of two, which XLA's CPU backend does
    three to four times as fast. On TPUs it would have to rearrange activations for that: a
    transformer block's step without its attention would take 1.2 times as long.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)

    def on_cpus(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == jnp.bfloat16:
            y = _convolve(rows[None, :, None], kernel[None, None])[0, :, 0]
        else:
            y = jax.lax.dot_general(rows, kernel, _MATRICES, **options)
        return y.reshape(*x.shape[:-1], kernel.shape[1])

    of_last_axis = kernel.ndim == 2 and dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    if not of_last_axis or (x.ndim == 2 and x.dtype != jnp.bfloat16):
        return plain(x, kernel)
    return by_platform(x, kernel, cpu=on_cpus, default=plain)


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of [B, H, W, C], for `nn.Conv`; in bfloat16 as said above.

    That is with stride 1; on CPUs it has no derivatives in forward mode.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    def on_cpus(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pads = padding
        if isinstance(pads, str):
            pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (1, 1), pads)
        return _convolve(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel)

    if x.dtype != jnp.bfloat16 or tuple(window_strides) != (1, 1):
        return plain(x, kernel)
    return by_platform(x, kernel, cpu=on_cpus, default=plain)


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] and a kernel [h, w, C, D] to [B, H - h + 1, W - w + 1, D].

    In steps of some rows where there are many pixels: the sums of a step stay in the caches, which
    takes 0.6 of the time.
    """
    (batch, height, width, _), (rows, columns, _, features) = x.shape, kernel.shape
    height, width = height - rows + 1, width - columns + 1
    steps = min(-(-batch * height * width // STEP_PIXELS), height)
    if steps == 1 or rows * columns == 1:
        return _sum(
            (
                _dot(x[:, i : i + height, j : j + width], kernel[i, j])
                for i in range(rows)
                for j in range(columns)
            ),
            x.dtype,
        )
    size = -(-height // steps)
    x = jnp.pad(x, ((0, 0), (0, steps * size - height), (0, 0), (0, 0)))
    joined = kernel.reshape(rows, -1, features)

    def of_step(step: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, step * size, size + rows - 1, axis=1)
        part = jnp.concatenate([part[:, :, j : j + width] for j in range(columns)], axis=-1)
        return _sum((_dot(part[:, i : i + size], joined[i]) for i in range(rows)), x.dtype)

    y = jax.lax.map(of_step, jnp.arange(steps)).swapaxes(0, 1)  # [B, steps, size, W, D]
    return y.reshape(batch, -1, width, features)[:, :height]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel), (x, kernel)


def _backward(
    arguments: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums in float32 here too, which those that JAX derives would not be."""
    (x, kernel), (_, height, width, _) = arguments, gradient.shape
    rows, columns = kernel.shape[:2]
    around = ((0, 0), (rows - 1, rows - 1), (columns - 1, columns - 1), (0, 0))
    of_x = _convolve(jnp.pad(gradient, around), kernel[::-1, ::-1].swapaxes(2, 3))
    of_kernel = [
        jnp.einsum(
            "bhwc,bhwd->cd",
            x[:, i : i + height, j : j + width],
            gradient,
            preferred_element_type=jnp.float32,
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return of_x, jnp.stack(of_kernel).reshape(kernel.shape).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def _sum(parts: Iterable[jax.Array], dtype: Any) -> jax.Array:
    return functools.reduce(jnp.add, parts).astype(dtype)


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[.., C] and [C, D] to float32 [.., D]."""
    return jnp.tensordot(x, kernel, axes=1, preferred_element_type=jnp.float32)
