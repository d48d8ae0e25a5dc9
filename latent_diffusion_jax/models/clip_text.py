"""CLIP's text transformer, the frozen text encoder of Stable Diffusion.

A causal pre-norm transformer with learned absolute positions (Radford et al., 2021, section 2.4).
Stable Diffusion 1 takes the last layer of OpenAI's ViT-L/14, Stable Diffusion 2 the last but one of
OpenCLIP's ViT-H/14, both after the final norm. Padding tokens are tokens like any other.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.dot_product_attention import dot_product_attention
from latent_diffusion_jax.models.layers import Dense
from latent_diffusion_jax.models.precision import precise


def quick_gelu(x: jax.Array) -> jax.Array:
    """The GELU of OpenAI's CLIP: x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, which OpenCLIP's models have."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


# Those of Stable Diffusion 1 and 2, as fields of `ClipTextEncoder`.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ViT-L/14": dict(vocab_size=49_408, max_length=77, width=768, depth=12, num_heads=12,
                     activation="quick_gelu", output_layer=-1),
    "ViT-H/14": dict(vocab_size=49_408, max_length=77, width=1_024, depth=24, num_heads=16,
                     activation="gelu", output_layer=-2),
}  # fmt: skip


class CausalAttention(nn.Module):
    """Multi-head attention of tokens to themselves and those before them; all with biases."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        width = x.shape[-1]
        q, k, v = (
            Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for name in ("to_q", "to_k", "to_v")
        )
        out = dot_product_attention(q, k, v, causal=True).reshape(x.shape)
        return Dense(width, dtype=self.dtype, name="to_out")(out)


class ClipTextEncoder(nn.Module):
    """Token ids [B, L] -> context [B, L, width].

    Sizes: 49408, 768, 12, 12, hidden 3072, quick_gelu for ViT-L/14; 49408, 1024, 24, 16, hidden
    4096, gelu for OpenCLIP's ViT-H/14.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    max_length: int = 77  # tokens
    hidden_width: int | None = None  # of the feed-forward layers; None: four times the width
    activation: str = "quick_gelu"  # or "gelu"
    output_layer: int = -1  # whose output is the context: -1 the last, -2 the one before it, ...
    final_norm: bool = True  # of that output, whichever layer it is of
    dtype: Any = jnp.float32  # of the computation; parameters have their own
    precision: str = "high"  # of products in float32; see `precision`

    @property
    def layers_run(self) -> int:
        """Layers up to the output layer; those after it have no parameters."""
        return self.depth + 1 + self.output_layer

    @precise
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, L], L at most `max_length` -> context [B, L, width] in `dtype`.

        Raises:
          ValueError: there are too many tokens, or the fields do not fit together.
        """
        self._check(tokens.shape[-1])
        normal = nn.initializers.normal(0.02)
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=normal,
            dtype=self.dtype,
            name="token_embedding",
        )(tokens)
        positions = self.param("position_embedding", normal, (self.max_length, self.width))
        x = x + positions[: tokens.shape[-1]].astype(self.dtype)

        def norm(name: str, tokens: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(tokens).astype(
                tokens.dtype
            )

        hidden_width = self.hidden_width or 4 * self.width
        for i in range(self.layers_run):
            attention = CausalAttention(self.num_heads, self.dtype, name=f"layer_{i}_attention")
            x = x + attention(norm(f"layer_{i}_norm1", x))
            h = Dense(hidden_width, dtype=self.dtype, name=f"layer_{i}_ff_in")(
                norm(f"layer_{i}_norm2", x)
            )
            h = ACTIVATIONS[self.activation](h)
            x = x + Dense(self.width, dtype=self.dtype, name=f"layer_{i}_ff_out")(h)
        return norm("norm_out", x) if self.final_norm else x

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"ClipTextEncoder takes at most {self.max_length} tokens, got {length}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.width}")
        if not -self.depth <= self.output_layer <= -1:
            raise ValueError(
                f"output_layer {self.output_layer} must be from -1 (the last) to {-self.depth}"
            )
