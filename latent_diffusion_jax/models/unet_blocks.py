"""The UNet's residual block and the ways to halve and double its resolution."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.layers import (
    Dense,
    GroupNorm,
    UpsampleConv,
    average_pool,
    conv,
    repeat_pixels,
)
from latent_diffusion_jax.runtime.randomness import dropout


class TimeResBlock(nn.Module):
    """Residual block that takes in an embedding of the timestep; starts as its shortcut.

    It can change the resolution on its way, of both its branches and without a convolution for it.
    Dropout is active where keys are given for it.
    """

    channels: int
    num_groups: int
    dtype: Any = jnp.float32
    resample: str = ""  # "down": half the resolution, "up": twice
    scale_shift_norm: bool = False  # the embedding scales and shifts normalised features
    dropout: float = 0.0  # share of the features
    epsilon: float = 1e-5  # of the norms

    @nn.compact
    def __call__(
        self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """x [B, h, w, C], embedding [B, E], keys [B] -> [B, h, w, channels], or resampled."""
        h = nn.silu(GroupNorm(self.num_groups, self.epsilon, name="norm_in")(x))
        if self.resample == "up":
            x = repeat_pixels(x)
            h = UpsampleConv(self.channels, self.dtype, name="conv_in")(h)
        else:
            if self.resample == "down":
                x, h = average_pool(x), average_pool(h)
            h = conv(self.channels, 3, self.dtype, "conv_in")(h)

        width = self.channels * (2 if self.scale_shift_norm else 1)
        embedded = Dense(width, dtype=self.dtype, name="embedding")(nn.silu(embedding))
        embedded = embedded[:, None, None]
        norm = GroupNorm(self.num_groups, self.epsilon, name="norm_out")
        if self.scale_shift_norm:
            scale, shift = jnp.split(embedded, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + embedded)
        h = nn.silu(h)
        if self.dropout and dropout_keys is not None:
            h = dropout(h, self.dropout, dropout_keys, self.path)
        h = conv(self.channels, 3, self.dtype, "conv_out", zero_init=True)(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "shortcut")(x)
        return x + h


def downsample(
    x: jax.Array, convolve: bool, dtype: Any, name: str, padding: tuple[int, int] = (1, 1)
) -> jax.Array:
    """[B, h, w, C] -> [B, h/2, w/2, C], by a convolution with stride 2 or by averaging.

    Padded all round, unlike in the autoencoder and in DDPM. Called in a compact module.
    """
    if not convolve:
        return average_pool(x)
    return conv(x.shape[-1], 3, dtype, name, strides=2, padding=(padding, padding))(x)


def upsample(x: jax.Array, convolve: bool, dtype: Any, name: str) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], pixels repeated and perhaps convolved.

    Called in a compact module.
    """
    if not convolve:
        return repeat_pixels(x)
    return UpsampleConv(x.shape[-1], dtype, name=name)(x)
