"""Layers that the autoencoder, the UNet and the text encoder share. NHWC throughout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.half_precision import conv_general_dilated, dot_general
from latent_diffusion_jax.runtime import context_mesh

NORM_STATISTICS = "norm_statistics"  # a collection of variables


def stored(x: jax.Array) -> jax.Array:
    """The same array; on CPUs it is computed once and kept, and so is its gradient.

    Along a network's residual connections XLA's CPU backend makes one long sum of the gradients of
    many layers, and computes it anew in each operation that reads a part of it. Elsewhere XLA knows
    better, and nothing is asked of it.
    """
    return context_mesh.by_platform(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, 2018) computed in float32, returned in the input's dtype.

    Sums over pixels come first and sums over a group's few channels after them, so that no large
    array is split along its last axis: on CPUs several times as fast as `flax.linen.GroupNorm`, and
    with less rounding.

    Where the collection `NORM_STATISTICS` is mutable, means and mean squares of the groups are
    written to it, [2, B, groups]; where it is given, those in it are used in place of the input's
    own. Tiles of one image share them so (see `models.tiling.collage`).
    """

    num_groups: int = 32
    epsilon: float = 1e-5  # 1e-5 in the UNet, 1e-6 in the autoencoder and in transformers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., C] -> the same shape.

        Raises:
          ValueError: the groups do not divide C.
        """
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{self.num_groups} groups do not divide {channels} channels")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x = stored(x)
        y = x.astype(jnp.float32)

        def group_means(values: jax.Array) -> jax.Array:
            means = jnp.mean(values, axis=tuple(range(1, values.ndim - 1)))
            return means.reshape(batch, self.num_groups, -1).mean(-1)

        given = self.get_variable(NORM_STATISTICS, "moments")
        record = self.is_mutable_collection(NORM_STATISTICS) and not self.is_initializing()
        if given is None or record:
            mean, square = group_means(y), group_means(jnp.square(y))
            if record:
                self.put_variable(NORM_STATISTICS, "moments", jnp.stack([mean, square]))
        if given is not None:
            mean, square = given
        inverse_deviation = jax.lax.rsqrt(
            jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon
        )

        def spread(per_group: jax.Array) -> jax.Array:
            return jnp.repeat(per_group, channels // self.num_groups, axis=-1)

        slope = spread(inverse_deviation) * scale
        offset = bias - spread(mean) * slope
        shape = (batch, *[1] * (x.ndim - 2), channels)
        return (y * slope.reshape(shape) + offset.reshape(shape)).astype(x.dtype)


class Dense(nn.Module):
    """A dense layer on the last axis."""

    features: int
    use_bias: bool = True
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.lecun_normal()
        dense = nn.Dense(
            self.features,
            self.use_bias,
            dtype=self.dtype,
            kernel_init=init,
            dot_general=dot_general,
            name="dense",
        )
        return dense(x)


def conv(
    features: int,
    kernel: int,
    dtype: Any,
    name: str,
    *,
    zero_init: bool = False,
    strides: int = 1,
    padding: Any = "SAME",
) -> nn.Conv:
    """A square 2-D convolution; `zero_init` starts a residual branch at zero."""
    init = nn.initializers.zeros_init() if zero_init else nn.initializers.lecun_normal()
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=strides,
        padding=padding,
        dtype=dtype,
        kernel_init=init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class UpsampleConv(nn.Module):
    """Each pixel repeated to a square of four, and a 3x3 convolution, at 4/9 of its cost.

    Where pixels are repeated, the 3x3 kernel meets only 2x2 different ones, others for each of the
    four pixels of a square: so there are four 2x2 kernels, sums of the 3x3 kernel's entries, and
    the larger image is never stored. They are one convolution to four times the channels, but on
    CPUs, where XLA would take fifty times as long for its weight gradient.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2H, 2W, features]."""
        b, h, w, c = x.shape
        shape = (3, 3, c, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        kernels = [[_folded(kernel, row, column) for column in (0, 1)] for row in (0, 1)]
        kernels = jax.tree.map(lambda k: k.astype(self.dtype), kernels)
        y = context_mesh.by_platform(
            x.astype(self.dtype), kernels, cpu=_four_convolutions, default=_one_convolution
        )  # [B, H, 2, W, 2, features]
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias.astype(self.dtype)


def _folded(kernel: jax.Array, row: int, column: int) -> jax.Array:
    """The 2x2 kernel of one pixel of a square, of a 3x3 kernel's entries.

    The even pixels look back, [k0, k1 + k2]; the odd ones ahead, [k0 + k1, k2].
    """
    folded = jnp.stack([kernel[: 1 + row].sum(0), kernel[1 + row :].sum(0)])
    before, after = folded[:, : 1 + column], folded[:, 1 + column :]
    return jnp.stack([before.sum(1), after.sum(1)], axis=1)


def _four_convolutions(x: jax.Array, kernels: list[list[jax.Array]]) -> jax.Array:
    def of_row(row: int) -> jax.Array:
        return jnp.stack([of_pixel(row, column) for column in (0, 1)], axis=3)

    def of_pixel(row: int, column: int) -> jax.Array:
        padding = ((1 - row, row), (1 - column, column))
        return _convolved(x, kernels[row][column], padding)

    return jnp.stack([of_row(0), of_row(1)], axis=2)


def _one_convolution(x: jax.Array, kernels: list[list[jax.Array]]) -> jax.Array:
    """Of all four kernels at all places: those of the odd pixels are taken one place further."""
    h, w = x.shape[1:3]
    joined = jnp.concatenate([kernel for row in kernels for kernel in row], axis=-1)
    y = _convolved(x, joined, ((1, 1), (1, 1)))
    y = y.reshape(*y.shape[:-1], 2, 2, -1)  # [B, H + 1, W + 1, 2, 2, features]

    def of_row(row: int) -> jax.Array:
        columns = [y[:, row : row + h, i : i + w, row, i] for i in (0, 1)]
        return jnp.stack(columns, axis=3)

    return jnp.stack([of_row(0), of_row(1)], axis=2)


def _convolved(x: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    return conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def average_pool(x: jax.Array) -> jax.Array:
    """Means of squares of four pixels: [B, 2h, 2w, C] -> [B, h, w, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def repeat_pixels(x: jax.Array) -> jax.Array:
    """Each pixel as a square of four: [B, h, w, C] -> [B, 2h, 2w, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def timestep_embedding(
    t: jax.Array,
    width: int,
    max_period: float = 10_000.0,
    *,
    as_in_ddpm: bool = False,
) -> jax.Array:
    """Sinusoidal embedding of timesteps.

    Args:
      t: timesteps [B], integer or float.
      width: size of the embedding.
      max_period: of the slowest sinusoid, over 2 pi timesteps; LDM's come close to it.
      as_in_ddpm: sines first and the slowest sinusoid at `max_period` itself, as in DDPM's code;
        LDM has cosines first.

    Returns:
      Embedding [B, width], float32.
    """
    half = width // 2
    steps = half - 1 if as_in_ddpm else half
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / steps)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)] if as_in_ddpm else [jnp.cos(angles), jnp.sin(angles)]
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))
