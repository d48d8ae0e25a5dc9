"""The denoising UNet with cross-attention (LDM, section 3.3; figure 3)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.attention import SpatialTransformer
from latent_diffusion_jax.models.layers import (
    Dense,
    GroupNorm,
    UpsampleConv,
    conv,
    timestep_embedding,
)


class TimeResBlock(nn.Module):
    """Residual block that adds a projection of the time embedding; starts as its shortcut."""

    channels: int
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """x [B, h, w, C], embedding [B, E] -> [B, h, w, channels]."""
        h = nn.silu(GroupNorm(self.num_groups, name="norm_in")(x))
        h = conv(self.channels, 3, self.dtype, "conv_in")(h)
        h = (
            h
            + Dense(self.channels, dtype=self.dtype, name="embedding")(nn.silu(embedding))[
                :, None, None
            ]
        )
        h = nn.silu(GroupNorm(self.num_groups, name="norm_out")(h))
        h = conv(self.channels, 3, self.dtype, "conv_out", zero_init=True)(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "shortcut")(x)
        return x + h


class UNet(nn.Module):
    """Noisy latents, timesteps and a context to a prediction of the latents' shape."""

    out_channels: int = 3
    channels: int = 192  # of the highest resolution
    channel_multipliers: Sequence[int] = (1, 2, 3, 5)  # one level each
    num_res_blocks: int = 2
    attention_levels: Sequence[int] = (1, 2, 3)  # 0 is the highest resolution
    head_dim: int = 32
    transformer_depth: int = 1
    num_groups: int = 32
    dtype: Any = jnp.float32  # of the computation; parameters stay float32

    @nn.compact
    def __call__(self, z_t: jax.Array, t: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Predicts epsilon (or what the objective asks for).

        Args:
          z_t: noisy latents [B, h, w, c]; h and w divisible by 2^(levels - 1).
          t: timesteps [B].
          context: tokens to attend to [B, L, D], or None: attention to the latents themselves.

        Returns:
          [B, h, w, out_channels], float32.
        """
        embedding = timestep_embedding(t, self.channels).astype(self.dtype)
        embedding = Dense(4 * self.channels, dtype=self.dtype, name="time_embed_0")(embedding)
        embedding = Dense(4 * self.channels, dtype=self.dtype, name="time_embed_1")(
            nn.silu(embedding)
        )
        context = None if context is None else context.astype(self.dtype)

        def block(x: jax.Array, width: int, attend: bool, name: str) -> jax.Array:
            x = TimeResBlock(width, self.num_groups, self.dtype, name=f"{name}_res")(x, embedding)
            if attend:
                x = SpatialTransformer(
                    width // self.head_dim,
                    self.head_dim,
                    self.transformer_depth,
                    self.num_groups,
                    self.dtype,
                    name=f"{name}_transformer",
                )(x, context)
            return x

        h = conv(self.channels, 3, self.dtype, "conv_in")(z_t.astype(self.dtype))
        skips = [h]
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            width = self.channels * multiplier
            for i in range(self.num_res_blocks):
                h = block(h, width, level in self.attention_levels, f"down_{level}_{i}")
                skips.append(h)
            if level != last:
                h = conv(
                    width,
                    3,
                    self.dtype,
                    f"down_{level}_downsample",
                    strides=2,
                    padding=((1, 1), (1, 1)),
                )(h)
                skips.append(h)

        width = h.shape[-1]
        h = block(h, width, True, "mid_0")
        h = block(h, width, False, "mid_1")

        for level in reversed(range(last + 1)):
            width = self.channels * self.channel_multipliers[level]
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, width, level in self.attention_levels, f"up_{level}_{i}")
            if level != 0:
                h = UpsampleConv(width, self.dtype, name=f"up_{level}_upsample")(h)

        h = nn.silu(GroupNorm(self.num_groups, name="norm_out")(h))
        return conv(self.out_channels, 3, self.dtype, "conv_out", zero_init=True)(h).astype(
            jnp.float32
        )
