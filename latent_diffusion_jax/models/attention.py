"""Attention: the one softmax attention, and the blocks built on it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.layers import Dense, GroupNorm, conv, stored

# Numbers of scores; where there are more, they are computed in parts.
CPU_SCORES = 2**20
ACCELERATOR_SCORES = 2**27  # half a GiB


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False
) -> jax.Array:
    """Softmax attention with scores in float32.

    Batch and heads lead and the scores are kept transposed, [.., keys, queries]: XLA's CPU backend
    does this two to three times as fast as the usual order. Where there are many scores, a part of
    them exists at a time, in the backward pass too.

    Args:
      q: queries [B, N, heads, head_dim].
      k: keys [B, M, heads, head_dim].
      v: values [B, M, heads, head_dim].
      causal: each query sees the keys up to its own place only; N and M are then the same.

    Returns:
      [B, N, heads, head_dim] in the dtype of `v`.

    Raises:
      ValueError: causal, and there are not as many queries as keys.
    """
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
        )
    batch, queries, heads, head_dim = q.shape
    q = q * head_dim**-0.5
    sizes = batch, queries, heads, k.shape[1]
    cpu, default = (
        functools.partial(_attention, causal=causal, step=step_sizes(*sizes, on_cpu=on_cpu))
        for on_cpu in (True, False)
    )
    if cpu.keywords == default.keywords:
        return default(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=cpu, default=default)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, step: tuple[int, int]
) -> jax.Array:
    """`dot_product_attention` of scaled queries, so many heads and queries at a time."""
    queries, heads = q.shape[1:3]
    if step != (heads, queries):
        return _attention_in_steps(q, k, v, causal, *step)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhmd,bhnd->bhmn", k, q, preferred_element_type=jnp.float32)
    if causal:
        scores = _hide_later_keys(scores, jnp.arange(queries))
    weights = jax.nn.softmax(scores, axis=-2).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhmn,bhmd->bhnd", weights, v), 1, 2)


def step_sizes(batch: int, queries: int, heads: int, keys: int, *, on_cpu: bool) -> tuple[int, int]:
    """How many heads and queries have their scores computed at a time.

    CPUs are fastest where the scores of a step stay in their caches; accelerators want as much work
    in a step as their memory allows.
    """
    scores = batch * heads * queries * keys
    limit, group, unit = (CPU_SCORES, 1, 64) if on_cpu else (ACCELERATOR_SCORES, heads, 128)
    if scores <= limit:
        return heads, queries
    fitting = limit // (batch * group * keys)
    return group, min(max(fitting // unit, 1) * unit, queries)


def _hide_later_keys(scores: jax.Array, places: jax.Array) -> jax.Array:
    """Scores [.., M, N] of queries at these places [N]; later keys get no weight."""
    keys = jnp.arange(scores.shape[-2])
    return jnp.where(keys[:, None] <= places, scores, -jnp.inf)


def _attention_in_steps(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, group: int, block: int
) -> jax.Array:
    """`dot_product_attention` of scaled queries, over groups of heads and blocks of queries.

    The batch leads the first axis of every product: a batch that is spread over devices remains
    so. The number of heads is a multiple of the group.
    """
    batch, queries, heads, head_dim = q.shape
    padding = -queries % block
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(batch, -1, block, heads // group, group, head_dim)
    # [groups, blocks, rows, d, block], where rows are those of the batch for each of the group.
    q = q.transpose(3, 1, 0, 4, 5, 2).reshape(heads // group, -1, batch * group, head_dim, block)
    places = jnp.arange(queries + padding).reshape(-1, block)

    def grouped(x: jax.Array) -> jax.Array:
        """[B, M, heads, d] -> [groups, rows, M, d]."""
        keys, width = x.shape[1], x.shape[-1]
        x = x.reshape(batch, keys, heads // group, group, width).transpose(2, 0, 3, 1, 4)
        return x.reshape(heads // group, batch * group, keys, width)

    def of_group(tokens: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = tokens  # [blocks, rows, d, block], [rows, M, d], [rows, d, M]

        @jax.checkpoint
        def of_block(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, places = part
            scores = jnp.einsum("bmd,bdn->bmn", k, q, preferred_element_type=jnp.float32)
            if causal:
                scores = _hide_later_keys(scores, places)
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))
            weights = stored(weights.astype(v.dtype))
            out = jnp.einsum("bdm,bmn->bdn", v, weights, preferred_element_type=jnp.float32)
            return (out / weights.sum(1, keepdims=True, dtype=jnp.float32)).astype(v.dtype)

        return jax.lax.map(of_block, (q, places))

    out = jax.lax.map(of_group, (q, grouped(k), grouped(v).swapaxes(2, 3)))
    # [groups, blocks, rows, d, block] -> [B, N, heads, d]
    out = out.reshape(heads // group, -1, batch, group, v.shape[-1], block)
    out = out.transpose(2, 1, 5, 0, 3, 4).reshape(batch, queries + padding, heads, -1)
    return out[:, :queries]


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context where one is given."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x [B, N, D], context [B, M, E] or None -> [B, N, D]."""
        context = x if context is None else context
        inner = self.num_heads * self.head_dim

        def project(name: str, tokens: jax.Array) -> jax.Array:
            y = Dense(inner, use_bias=False, dtype=self.dtype, name=name)(tokens)
            return y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)

        out = dot_product_attention(
            project("to_q", x), project("to_k", context), project("to_v", context)
        )
        out = out.reshape(*x.shape[:-1], inner)
        return Dense(x.shape[-1], dtype=self.dtype, name="to_out")(out)


class GEGLU(nn.Module):
    """Feed-forward layer gated by a GELU (Shazeer, 2020)."""

    multiplier: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = Dense(2 * self.multiplier * width, dtype=self.dtype, name="proj_in")(x)
        h, gate = jnp.split(h, 2, axis=-1)
        h = h * nn.gelu(gate, approximate=False)
        return Dense(width, dtype=self.dtype, name="proj_out")(h)


class CrossAttentionBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention, feed-forward (LDM, section 3.3)."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None) -> jax.Array:
        def norm(name: str, tokens: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(tokens).astype(
                tokens.dtype
            )

        x = x + Attention(self.num_heads, self.head_dim, self.dtype, name="attn1")(norm("norm1", x))
        x = x + Attention(self.num_heads, self.head_dim, self.dtype, name="attn2")(
            norm("norm2", x), context
        )
        return x + GEGLU(dtype=self.dtype, name="ff")(norm("norm3", x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, attending to a context.

    Starts as the identity: its last projection is initialised to zero.
    """

    num_heads: int
    head_dim: int
    depth: int = 1
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None) -> jax.Array:
        """x [B, h, w, C], context [B, L, D] -> [B, h, w, C]."""
        b, h, w, c = x.shape
        y = GroupNorm(self.num_groups, epsilon=1e-6, name="norm")(x).reshape(b, h * w, c)
        y = Dense(self.num_heads * self.head_dim, dtype=self.dtype, name="proj_in")(y)
        for i in range(self.depth):
            y = CrossAttentionBlock(self.num_heads, self.head_dim, self.dtype, name=f"block_{i}")(
                y, context
            )
        y = Dense(c, zero_init=True, dtype=self.dtype, name="proj_out")(y)
        return x + y.reshape(b, h, w, c)


class PixelAttention(nn.Module):
    """Self-attention over pixels: the autoencoder's, and that of UNets without a transformer.

    The former has one head and an epsilon of 1e-6; the latter starts as the identity.
    """

    num_groups: int = 32
    dtype: Any = jnp.float32
    num_heads: int = 1
    epsilon: float = 1e-6
    zero_init: bool = False  # of the last projection

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, h, w, c = x.shape
        y = GroupNorm(self.num_groups, epsilon=self.epsilon, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (
            Dense(c, dtype=self.dtype, name=name)(y).reshape(b, h * w, self.num_heads, -1)
            for name in ("q", "k", "v")
        )
        y = dot_product_attention(q, k, v).reshape(b, h, w, c)
        return x + conv(c, 1, self.dtype, "proj_out", zero_init=self.zero_init)(y)
