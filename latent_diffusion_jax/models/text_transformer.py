"""The text encoder of the paper: an unmasked pre-norm transformer, trained with the UNet.

LDM, section 4.3.1 and table 17: learned absolute positions, no padding mask (padding tokens are
tokens like any other), a final layer norm.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.attention import Attention
from latent_diffusion_jax.models.layers import Dense
from latent_diffusion_jax.models.precision import precise


class TextTransformer(nn.Module):
    """Token ids [B, L] -> context [B, L, width]."""

    vocab_size: int
    max_length: int = 77  # tokens
    width: int = 640
    depth: int = 32
    num_heads: int = 8
    head_dim: int = 64  # heads * head_dim need not be the width
    dtype: Any = jnp.float32  # of the computation; parameters have their own
    precision: str = "high"  # of products in float32; see `precision`

    @precise
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if tokens.shape[-1] != self.max_length:
            raise ValueError(
                f"TextTransformer takes {self.max_length} tokens, got {tokens.shape[-1]}"
            )
        normal = nn.initializers.normal(0.02)
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=normal,
            dtype=self.dtype,
            name="token_embedding",
        )(tokens)
        positions = self.param("position_embedding", normal, (self.max_length, self.width))
        x = x + positions.astype(self.dtype)

        def norm(name: str, tokens: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(tokens).astype(
                tokens.dtype
            )

        for i in range(self.depth):
            attention = Attention(
                self.num_heads, self.head_dim, self.dtype, name=f"layer_{i}_attention"
            )
            x = x + attention(norm(f"layer_{i}_norm1", x))
            h = Dense(4 * self.width, dtype=self.dtype, name=f"layer_{i}_ff_in")(
                norm(f"layer_{i}_norm2", x)
            )
            h = nn.gelu(h, approximate=False)
            x = x + Dense(self.width, dtype=self.dtype, name=f"layer_{i}_ff_out")(h)
        return norm("norm_out", x)
