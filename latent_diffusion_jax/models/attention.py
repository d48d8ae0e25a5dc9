"""Attention blocks: multi-head attention, transformer blocks over pixels, attention over pixels."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.dot_product_attention import dot_product_attention
from latent_diffusion_jax.models.layers import Dense, GroupNorm, conv
from latent_diffusion_jax.runtime import context_mesh


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
        inner = self.multiplier * width
        parts = 1 if self.is_initializing() else context_mesh.gated_parts(inner)
        project = Dense
        if parts > 1:  # weights are moved, of which there are fewer than of what they make

            def paired(params: Any) -> Any:
                return jax.tree.map(
                    lambda leaf: context_mesh.pair_halves(leaf.astype(self.dtype)), params
                )

            project = nn.map_variables(Dense, "params", paired)
        h = project(2 * inner, dtype=self.dtype, name="proj_in")(x)
        h, gate = jnp.split(h.reshape(*x.shape[:-1], parts, -1), 2, axis=-1)
        h = (h * nn.gelu(gate, approximate=False)).reshape(*x.shape[:-1], inner)
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
