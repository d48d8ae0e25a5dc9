"""Kernels for attention that other people wrote, for TPUs and for NVIDIA's GPUs.

Neither ever stores the scores. XLA cannot split a kernel over devices: see `runtime.context_mesh`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

LANES = 128  # of a TPU's vectors
TPU_MIN_TOKENS = 512  # where there are fewer queries or keys, XLA's own attention does as well
TPU_MAX_HEAD_DIM = 512
# Bytes of a token of one head, in whole lanes, up to which a block has so many queries and keys.
TPU_BLOCKS = ((256, 1024, 2048), (512, 1024, 1024), (1024, 512, 512), (2048, 256, 256))

Layout = splash_attention.QKVLayout
_allowed = contextvars.ContextVar("allowed", default=True)


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """Programs that are traced in it have no kernels: for `jax.export` to several platforms.

    Of those JAX lowers every form of a function for every platform, which no kernel bears; and
    cuDNN's calls are none that an exported program may rely on.
    """
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def fits_tpu(queries: int, keys: int, head_dim: int, *, causal: bool) -> bool:
    """Whether `tpu_attention` is the best form on TPUs."""
    many = not causal and min(queries, keys) >= TPU_MIN_TOKENS
    return many and head_dim <= TPU_MAX_HEAD_DIM and _allowed.get()


def _kernel_precision(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager[None]:
    """Pallas multiplies float32 in one pass or in six, not in the three of "high": then in six."""
    asked = jax.config.values["jax_default_matmul_precision"]
    exact = dtype == jnp.float32 and asked in ("high", "highest")
    return jax.default_matmul_precision("highest" if exact else "default")


@jax.custom_vjp
def tpu_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of scaled queries by the Pallas kernel "splash attention"."""
    with _kernel_precision(q.dtype):
        return _splash(q, k, v)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    with _kernel_precision(q.dtype):
        return jax.vjp(_splash, q, k, v)


def _backward(pull: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    with _kernel_precision(gradient.dtype):
        return pull(gradient)


tpu_attention.defvjp(_forward, _backward)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Blocks divide what the kernel is given: tokens are padded to whole ones, which none sees."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    sizes, padded_queries, padded_keys = tpu_blocks(queries, keys, head_dim, q.dtype)
    mask = splash_attention.FullMask((padded_queries, padded_keys))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask]),  # one for all heads
        block_sizes=sizes,
    )
    segments = None
    if padded_keys != keys:  # tokens see those of their own segment
        segments = splash_attention.SegmentIds(
            jnp.zeros(padded_queries, jnp.int32),
            (jnp.arange(padded_keys) >= keys).astype(jnp.int32),
        )

    def by_heads(x: jax.Array, length: int) -> jax.Array:
        """[B, N, heads, d] -> [B * heads, length, d]."""
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, length, -1)

    q, k, v = by_heads(q, padded_queries), by_heads(k, padded_keys), by_heads(v, padded_keys)
    out = kernel(q, k, v, segments).reshape(batch, heads, padded_queries, -1)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def even_blocks(length: int, limit: int, unit: int) -> tuple[int, int]:
    """The size of equal blocks, at most the limit, that cover a length, and their number.

    The limit and the size are multiples of the unit. Of the numbers of blocks up to twice what is
    needed the one with the least padding is chosen, and of those the lowest.
    """
    fewest = -(-length // limit)
    sizes = {n: -(-length // (n * unit)) * unit for n in range(fewest, 2 * fewest + 1)}
    number = min(sizes, key=lambda n: n * sizes[n])
    return sizes[number], number


def tpu_blocks(
    queries: int, keys: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> tuple[splash_attention.BlockSizes, int, int]:
    """Sizes of the kernel's blocks, and the numbers of queries and keys they make together.

    They were chosen by the lengths of the schedules that the compiler made for a v5e: a forward
    pass is fastest with few queries and many keys at a time, a backward pass with about as many of
    both. All fit the vector memory of a v4 and of what came after it.
    """
    width = max(head_dim, LANES) * jnp.dtype(dtype).itemsize
    most_queries, most_keys = next(most for limit, *most in TPU_BLOCKS if width <= limit)
    block_q, number_q = even_blocks(queries, most_queries, 2 * LANES)
    block_kv, number_kv = even_blocks(keys, most_keys, 2 * LANES)
    joined = max(
        n for n in range(1, number_kv + 1) if number_kv % n == 0 and n * block_kv <= 2 * most_keys
    )
    compute = 512 if block_kv % 512 == 0 else 256
    # One kernel for all gradients, that of the queries in a part for each block of keys, is faster
    # than two kernels and takes more memory, on the chip too.
    fused = number_kv * jnp.dtype(dtype).itemsize <= 8 and width <= 1024
    # Keys and values that do not fill the lanes are stored transposed, or they would be padded.
    layout = Layout.HEAD_DIM_MINOR if head_dim % LANES == 0 else Layout.SEQ_MINOR
    sizes = splash_attention.BlockSizes(
        block_q=2 * LANES,
        block_kv=joined * block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else 2 * LANES,
        block_kv_dq=None if fused else joined * block_kv,
        use_fused_bwd_kernel=fused,
        k_layout=layout,
        v_layout=layout,
    )
    return sizes, number_q * block_q, number_kv * block_kv


def fits_cudnn(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    """Whether `cudnn_attention` can be traced and run on this machine's GPUs.

    JAX asks the machine's cuDNN for its version while tracing, so that there must be one.
    """
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return fits and _allowed.get() and _has_cudnn()


def _has_cudnn() -> bool:
    """Whether JAX runs on NVIDIA GPUs for which cuDNN has its attention: Ampere's and later."""
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Attention of scaled queries by cuDNN's flash attention."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=causal, implementation="cudnn"
    )
