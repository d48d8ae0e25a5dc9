"""KL autoencoder (VAE): the first stage of latent diffusion (LDM, section 3.1 and appendix G)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.attention import PixelAttention
from latent_diffusion_jax.models.layers import GroupNorm, conv, upsample_nearest


@flax.struct.dataclass
class DiagonalGaussian:
    """The posterior q(z | x): a Gaussian for each latent pixel and channel, [B, h, w, c]."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
        """Splits [B, h, w, 2c] into mean and log-variance, the latter clipped to [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, noise: jax.Array) -> jax.Array:
        """mean + std * noise, for standard normal noise [B, h, w, c]."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> jax.Array:
        """KL divergence to the standard normal in nats, summed over an image: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


class ResBlock(nn.Module):
    """Residual block without a time embedding."""

    channels: int
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-6, name="norm1")(x))
        h = conv(self.channels, 3, self.dtype, "conv1")(h)
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-6, name="norm2")(h))
        h = conv(self.channels, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "shortcut")(x)
        return x + h


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    channels: int
    num_groups: int
    attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResBlock(self.channels, self.num_groups, self.dtype, name="block_1")(x)
        if self.attention:
            x = PixelAttention(self.num_groups, self.dtype, name="attn_1")(x)
        return ResBlock(self.channels, self.num_groups, self.dtype, name="block_2")(x)


class Encoder(nn.Module):
    """Image [B, H, W, C] -> features [B, H/f, W/f, out_channels], f = 2^(levels - 1)."""

    out_channels: int
    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    mid_attention: bool
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.channels, 3, self.dtype, "conv_in")(x)
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            width = self.channels * multiplier
            for i in range(self.num_res_blocks):
                h = ResBlock(width, self.num_groups, self.dtype, name=f"down_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = PixelAttention(self.num_groups, self.dtype, name=f"down_{level}_attn_{i}")(
                        h
                    )
            if level != last:
                # Padded right and bottom only, as in the reference (the UNet pads all round).
                h = conv(
                    width,
                    3,
                    self.dtype,
                    f"down_{level}_downsample",
                    strides=2,
                    padding=((0, 1), (0, 1)),
                )(h)
        h = Middle(h.shape[-1], self.num_groups, self.mid_attention, self.dtype, name="mid")(h)
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-6, name="norm_out")(h))
        return conv(self.out_channels, 3, self.dtype, "conv_out")(h)


class Decoder(nn.Module):
    """Latent features [B, h, w, c] -> image [B, h*f, w*f, out_channels], unbounded."""

    out_channels: int
    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    mid_attention: bool
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = conv(self.channels * self.channel_multipliers[-1], 3, self.dtype, "conv_in")(z)
        h = Middle(h.shape[-1], self.num_groups, self.mid_attention, self.dtype, name="mid")(h)
        for level in reversed(range(len(self.channel_multipliers))):
            width = self.channels * self.channel_multipliers[level]
            for i in range(self.num_res_blocks + 1):
                h = ResBlock(width, self.num_groups, self.dtype, name=f"up_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = PixelAttention(self.num_groups, self.dtype, name=f"up_{level}_attn_{i}")(h)
            if level != 0:
                h = conv(width, 3, self.dtype, f"up_{level}_upsample")(upsample_nearest(h))
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-6, name="norm_out")(h))
        return conv(self.out_channels, 3, self.dtype, "conv_out")(h)


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to a Gaussian over latents, and latents back to images."""

    image_channels: int = 3
    z_channels: int = 3  # channels inside, before quant_conv
    embed_dim: int = 3  # channels of a latent
    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 4)  # one level each; f = 2^(levels - 1)
    num_res_blocks: int = 2
    attention_levels: Sequence[int] = ()  # 0 is full resolution
    mid_attention: bool = True
    num_groups: int = 32
    dtype: Any = jnp.float32  # of the computation; parameters stay float32

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    def setup(self):
        shape = dict(
            channels=self.channels,
            channel_multipliers=self.channel_multipliers,
            num_res_blocks=self.num_res_blocks,
            attention_levels=self.attention_levels,
            mid_attention=self.mid_attention,
            num_groups=self.num_groups,
            dtype=self.dtype,
        )
        self.encoder = Encoder(out_channels=2 * self.z_channels, **shape)
        self.decoder = Decoder(out_channels=self.image_channels, **shape)
        self.quant_conv = nn.Conv(2 * self.embed_dim, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.z_channels, (1, 1), dtype=self.dtype)

    def encode(self, x: jax.Array) -> DiagonalGaussian:
        """Images [B, H, W, C] in [-1, 1] -> posterior over [B, H/f, W/f, embed_dim]."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, embed_dim], not scaled -> images [B, h*f, w*f, C], float32."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, DiagonalGaussian]:
        """Reconstruction from a posterior sample, and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior
