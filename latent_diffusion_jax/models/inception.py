"""InceptionV3 as the Frechet inception distance has it (Heusel et al., 2017, appendix A1).

The network of Szegedy et al. (2015) in the form of TensorFlow's graph of 2015-12-05, which differs
from torchvision's in its average pooling, the last block's pooling, its resize and its 1008
classes. Modules are named as in the PyTorch port of that graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

INPUT_SIZE = 299  # pixels
NUM_CLASSES = 1008

# Figures are compared across machines: without it accelerators multiply in fewer bits.
PRECISION = jax.lax.Precision.HIGHEST


class Outputs(NamedTuple):
    """What Inception tells of a batch.

    Attributes:
      features: averages of the last feature maps [B, 2048]; FID compares these.
      unbiased_logits: [B, 1008] without the bias; the Inception score is defined on these.
      logits: [B, 1008].
    """

    features: jax.Array
    unbiased_logits: jax.Array
    logits: jax.Array


def resize(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize as TensorFlow 1 does it: [B, H, W, C] -> [B, size, size, C], float32.

    Output pixel i lies at i * H / size, corner on corner, and no filter precedes shrinking.
    """
    height, width = (_interpolation(side, size) for side in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum("ah,bhwc->bawc", height, x, precision=PRECISION)
    return jnp.einsum("dw,bawc->badc", width, x, precision=PRECISION)


def _interpolation(before: int, after: int) -> np.ndarray:
    """Weights [after, before] of the pixels of a line in those of the resized line."""
    position = np.arange(after, dtype=np.float32) * np.float32(before / after)
    low = position.astype(int)
    fraction = position - low.astype(np.float32)
    weights, rows = np.zeros((after, before), np.float32), np.arange(after)
    np.add.at(weights, (rows, low), 1.0 - fraction)
    np.add.at(weights, (rows, np.minimum(low + 1, before - 1)), fraction)
    return weights


class BatchNorm(nn.Module):
    """Normalisation by stored statistics, which are parameters here."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


class ConvNorm(nn.Module):
    """Convolution, normalisation, ReLU."""

    features: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.Conv(
            self.features,
            self.kernel,
            strides=self.strides,
            padding=self.padding,
            use_bias=False,
            precision=PRECISION,
            name="conv",
        )
        return nn.relu(BatchNorm(name="bn")(conv(x)))


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of each pixel's 3x3 neighbours, of those alone that lie inside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def max_pool(x: jax.Array, strides: int = 2, padding: str = "VALID") -> jax.Array:
    """Maximum of 3x3 pixels."""
    return nn.max_pool(x, (3, 3), strides=(strides, strides), padding=padding)


class BlockA(nn.Module):
    """Branches of 1x1, 5x5 and two 3x3 convolutions, at 35x35 pixels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(64, (1, 1), name="branch1x1")(x)
        five = ConvNorm(48, (1, 1), name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        three = ConvNorm(64, (1, 1), name="branch3x3dbl_1")(x)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(three)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_features, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = ConvNorm(64, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, max_pool(x)], axis=-1)


class BlockC(nn.Module):
    """Branches with 7x7 convolutions taken apart into 1x7 and 7x1, at 17x17 pixels."""

    width: int  # channels within the branches

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(192, (1, 1), name="branch1x1")(x)
        seven = ConvNorm(self.width, (1, 1), name="branch7x7_1")(x)
        seven = ConvNorm(self.width, (1, 7), name="branch7x7_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7_3")(seven)
        double = ConvNorm(self.width, (1, 1), name="branch7x7dbl_1")(x)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_2")(double)
        double = ConvNorm(self.width, (1, 7), name="branch7x7dbl_3")(double)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_4")(double)
        double = ConvNorm(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = ConvNorm(192, (1, 1), name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(192, (1, 1), name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, (1, 1), name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, max_pool(x)], axis=-1)


class BlockE(nn.Module):
    """Branches that end in 1x3 beside 3x1, at 8x8 pixels."""

    pool: str  # "average" or "max"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(320, (1, 1), name="branch1x1")(x)
        three = ConvNorm(384, (1, 1), name="branch3x3_1")(x)
        double = ConvNorm(448, (1, 1), name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(double)
        ends = [
            ConvNorm(384, kernel, name=name)(branch)
            for branch, kernel, name in (
                (three, (1, 3), "branch3x3_2a"),
                (three, (3, 1), "branch3x3_2b"),
                (double, (1, 3), "branch3x3dbl_3a"),
                (double, (3, 1), "branch3x3dbl_3b"),
            )
        ]
        pooled = average_pool(x) if self.pool == "average" else max_pool(x, 1, "SAME")
        pooled = ConvNorm(192, (1, 1), name="branch_pool")(pooled)
        return jnp.concatenate([one, *ends, pooled], axis=-1)


class Classes(nn.Module):
    """Features [B, 2048] -> logits [B, 1008] without and with their bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], NUM_CLASSES)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        logits = jnp.dot(x, kernel, precision=PRECISION)
        return logits, logits + bias


class InceptionV3(nn.Module):
    """Images [B, H, W, 3] with levels 0 to 255, uint8 or float -> `Outputs`, float32."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        x = (resize(images, INPUT_SIZE) - 128.0) / 128.0
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvNorm(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = max_pool(ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        blocks: Sequence[nn.Module] = (
            BlockA(32, name="Mixed_5b"),
            BlockA(64, name="Mixed_5c"),
            BlockA(64, name="Mixed_5d"),
            BlockB(name="Mixed_6a"),
            BlockC(128, name="Mixed_6b"),
            BlockC(160, name="Mixed_6c"),
            BlockC(160, name="Mixed_6d"),
            BlockC(192, name="Mixed_6e"),
            BlockD(name="Mixed_7a"),
            BlockE("average", name="Mixed_7b"),
            BlockE("max", name="Mixed_7c"),  # a slip of the graph, kept: features depend on it
        )
        for block in blocks:
            x = block(x)
        features = jnp.mean(x, axis=(1, 2))
        return Outputs(features, *Classes(name="fc")(features))
