"""KL and VQ autoencoders (VAE, VQGAN): the first stage of latent diffusion (LDM, section 3.1 and
appendix G)."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models import remat
from latent_diffusion_jax.models.attention import PixelAttention
from latent_diffusion_jax.models.layers import GroupNorm, UpsampleConv, conv
from latent_diffusion_jax.models.precision import precise
from latent_diffusion_jax.models.quantizer import (
    FiniteScalarQuantizer,
    Quantized,
    VectorQuantizer,
)

ENCODER = ("encoder", "quant_conv")  # the parameters that make a posterior


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

    @property
    def moments(self) -> jax.Array:
        """Mean and log-variance side by side, [B, h, w, 2c]; `from_moments` takes them back."""
        return jnp.concatenate([self.mean, self.logvar], axis=-1)

    def sample(self, noise: jax.Array) -> jax.Array:
        """mean + std * noise, for standard normal noise [B, h, w, c]."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> jax.Array:
        """KL divergence to the standard normal in nats, summed over an image: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@flax.struct.dataclass
class Point:
    """The posterior of an autoencoder without noise: one latent, as a `DiagonalGaussian` is used.

    Attributes:
      mean: latents [B, h, w, c], before they are quantised.
    """

    mean: jax.Array

    @property
    def moments(self) -> jax.Array:
        """The latents, [B, h, w, c]; `from_moments` takes them back."""
        return self.mean

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "Point":
        return cls(moments.astype(jnp.float32))

    def sample(self, noise: jax.Array) -> jax.Array:
        """The latents themselves."""
        del noise
        return self.mean


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
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        res_block, attention = _blocks(self.num_groups, self.dtype, self.remat)
        x = res_block(x, self.channels, "block_1")
        if self.attention:
            x = attention(x, "attn_1")
        return res_block(x, self.channels, "block_2")


def _blocks(num_groups: int, dtype: Any, policy: str) -> tuple[Any, Any]:
    """Functions (x, channels, name) and (x, name) -> x: a residual block, and attention.

    Called in a compact module.
    """

    def res_block(x: jax.Array, channels: int, name: str) -> jax.Array:
        block = remat.of_block(ResBlock, policy)
        return remat.named(block(channels, num_groups, dtype, name=name)(x))

    def attention(x: jax.Array, name: str) -> jax.Array:
        block = remat.of_block(PixelAttention, policy)
        return remat.named(block(num_groups, dtype, name=name)(x))

    return res_block, attention


class Encoder(nn.Module):
    """Image [B, H, W, C] -> features [B, H/f, W/f, out_channels], f = 2^(levels - 1)."""

    out_channels: int
    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    mid_attention: bool
    num_groups: int
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        res_block, attention = _blocks(self.num_groups, self.dtype, self.remat)
        last = len(self.channel_multipliers) - 1

        def down(_: nn.Module, h: jax.Array, level: int) -> jax.Array:
            width = self.channels * self.channel_multipliers[level]
            for i in range(self.num_res_blocks):
                h = res_block(h, width, f"down_{level}_block_{i}")
                if level in self.attention_levels:
                    h = attention(h, f"down_{level}_attn_{i}")
            if level == last:
                return h
            # Padded right and bottom only, as in the reference (the UNet pads all round).
            name, padding = f"down_{level}_downsample", ((0, 1), (0, 1))
            return remat.named(conv(width, 3, self.dtype, name, strides=2, padding=padding)(h))

        def levels(network: nn.Module, x: jax.Array) -> jax.Array:
            h = remat.named(conv(self.channels, 3, self.dtype, "conv_in")(x))
            for level in range(last + 1):
                through = functools.partial(down, level=level)
                h = remat.of_level(through, self.remat)(network, h)
            return Middle(
                h.shape[-1], self.num_groups, self.mid_attention, self.remat, self.dtype, name="mid"
            )(h)

        h = remat.of_network(levels, self.remat)(self, x)
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
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        res_block, attention = _blocks(self.num_groups, self.dtype, self.remat)

        def up(_: nn.Module, h: jax.Array, level: int) -> jax.Array:
            width = self.channels * self.channel_multipliers[level]
            for i in range(self.num_res_blocks + 1):
                h = res_block(h, width, f"up_{level}_block_{i}")
                if level in self.attention_levels:
                    h = attention(h, f"up_{level}_attn_{i}")
            if level == 0:
                return h
            return remat.named(UpsampleConv(width, self.dtype, name=f"up_{level}_upsample")(h))

        def levels(network: nn.Module, z: jax.Array) -> jax.Array:
            width = self.channels * self.channel_multipliers[-1]
            h = remat.named(conv(width, 3, self.dtype, "conv_in")(z))
            h = Middle(
                h.shape[-1], self.num_groups, self.mid_attention, self.remat, self.dtype, name="mid"
            )(h)
            for level in reversed(range(len(self.channel_multipliers))):
                h = remat.of_level(functools.partial(up, level=level), self.remat)(network, h)
            return h

        h = remat.of_network(levels, self.remat)(self, z)
        h = nn.silu(GroupNorm(self.num_groups, epsilon=1e-6, name="norm_out")(h))
        return conv(self.out_channels, 3, self.dtype, "conv_out")(h)


class _Autoencoder(nn.Module):
    """What both kinds share: their fields and the networks around the latents."""

    image_channels: int = 3
    z_channels: int = 3  # channels inside, before quant_conv
    embed_dim: int = 3  # channels of a latent
    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 4)  # one level each; f = 2^(levels - 1)
    num_res_blocks: int = 2
    attention_levels: Sequence[int] = ()  # 0 is full resolution
    mid_attention: bool = True
    num_groups: int = 32
    remat: str = "none"  # what the backward pass computes anew, to save memory; see `remat`
    dtype: Any = jnp.float32  # of the computation; parameters have their own
    precision: str = "high"  # of products in float32; see `precision`

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    def _set_up(self, moments: int) -> None:
        """`moments`: numbers that describe one channel of a latent."""
        shape = dict(
            channels=self.channels,
            channel_multipliers=self.channel_multipliers,
            num_res_blocks=self.num_res_blocks,
            attention_levels=self.attention_levels,
            mid_attention=self.mid_attention,
            num_groups=self.num_groups,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.encoder = Encoder(out_channels=moments * self.z_channels, **shape)
        self.decoder = Decoder(out_channels=self.image_channels, **shape)
        self.quant_conv = nn.Conv(moments * self.embed_dim, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.z_channels, (1, 1), dtype=self.dtype)

    @precise
    def _moments(self, x: jax.Array) -> jax.Array:
        chex.assert_shape(x, (None, None, None, self.image_channels))
        factor = self.downsampling_factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} pixels cannot be encoded: height and width "
                f"must be multiples of the downsampling factor {factor}"
            )
        return self.quant_conv(self.encoder(x))

    @precise
    def _decode(self, z: jax.Array) -> jax.Array:
        chex.assert_shape(z, (None, None, None, self.embed_dim))
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


class AutoencoderKL(_Autoencoder):
    """Images in [-1, 1] to a Gaussian over latents, and latents back to images."""

    posterior = DiagonalGaussian

    @property
    def moments_channels(self) -> int:
        """Channels of a posterior's moments."""
        return 2 * self.embed_dim

    def setup(self):
        self._set_up(moments=2)

    def encode(self, x: jax.Array) -> DiagonalGaussian:
        """Images [B, H, W, C] in [-1, 1] -> posterior over [B, H/f, W/f, embed_dim].

        Raises:
          ValueError: the downsampling factor f does not divide height or width.
        """
        return DiagonalGaussian.from_moments(self._moments(x))

    def decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, embed_dim], not scaled -> images [B, h*f, w*f, C], float32."""
        return self._decode(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction from the posterior's mean."""
        return self.decode(self.encode(x).mean)


class AutoencoderVQ(_Autoencoder):
    """Images in [-1, 1] to a grid of codes from a finite set, and back (VQGAN).

    Diffusion runs on latents before they are quantised, and `decode` quantises them first: the
    quantiser is a part of the decoder (LDM, section 3.1).
    """

    codebook_size: int = 8192
    levels: Sequence[int] = ()  # finite scalar quantisation in the codebook's place

    posterior = Point

    @property
    def moments_channels(self) -> int:
        """Channels of a posterior's moments."""
        return self.embed_dim

    @property
    def num_codes(self) -> int:
        """Number of different vectors that a latent pixel can be quantised to."""
        return math.prod(self.levels) if self.levels else self.codebook_size

    def setup(self):
        self._set_up(moments=1)
        self.quantizer: VectorQuantizer | FiniteScalarQuantizer
        if self.levels:
            if len(self.levels) != self.embed_dim:
                raise ValueError(
                    f"{len(self.levels)} levels do not fit latents of {self.embed_dim} channels"
                )
            self.quantizer = FiniteScalarQuantizer(tuple(self.levels))
        else:
            self.quantizer = VectorQuantizer(self.codebook_size, self.embed_dim)

    def encode(self, x: jax.Array) -> Point:
        """Images [B, H, W, C] in [-1, 1] -> latents [B, H/f, W/f, embed_dim], not quantised.

        Raises:
          ValueError: the downsampling factor f does not divide height or width.
        """
        return Point.from_moments(self._moments(x))

    def quantize(self, z: jax.Array) -> Quantized:
        """Latents [B, h, w, embed_dim] -> what they are quantised to."""
        return self.quantizer(z)

    def indices(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, embed_dim] -> indices of their codes, int32 [B, h, w]."""
        return self.quantizer.indices(z)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Indices [B, h, w] -> quantised latents [B, h, w, embed_dim]."""
        return self.quantizer.lookup(indices)

    def decode_quantized(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, embed_dim], quantised already -> images [B, h*f, w*f, C], float32."""
        return self._decode(z)

    def decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, embed_dim] -> quantised -> images [B, h*f, w*f, C], float32."""
        chex.assert_shape(z, (None, None, None, self.embed_dim))
        return self._decode(self.quantizer(z).latents)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstruction of images."""
        return self.decode(self.encode(x).mean)


def param_shapes(network: AutoencoderKL | AutoencoderVQ) -> Any:
    """Parameters of an autoencoder as shapes."""
    size = network.downsampling_factor
    images = jax.ShapeDtypeStruct((1, size, size, network.image_channels), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), images)["params"]
