"""LPIPS: perceptual distance from VGG16 features (Zhang et al., 2018)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.models.precision import precise

# Convolutions of VGG16 up to relu5_3, by block; features are taken at the end of each.
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class VGG16(nn.Module):
    """Images [B, H, W, 3], already shifted and scaled -> features of the five blocks."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for block, widths in enumerate(VGG_BLOCKS):
            if block:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i, width in enumerate(widths):
                x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{block}_{i}")(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Two batches of images [B, H, W, 3] in [-1, 1], at least 16 pixels a side -> distance [B].

    Squared differences of unit-length features, weighted for each channel, averaged over pixels
    and summed over the five blocks. The weights of the channels are learned and not negative.
    """

    dtype: Any = jnp.float32
    precision: str = "highest"  # of products in float32: figures are compared across machines

    @precise
    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        vgg = VGG16(self.dtype, name="vgg")
        # One after the other: where `x` is constant, nothing is kept of it for the gradient.
        features = [vgg((images - SHIFT) / SCALE) for images in (x, y)]
        distance = jnp.zeros(x.shape[0])
        for i, pair in enumerate(zip(*features, strict=True)):
            a, b = (_unit_length(feature.astype(jnp.float32)) for feature in pair)
            weights = self.param(f"channel_weights_{i}", nn.initializers.ones, a.shape[-1:])
            distance += jnp.mean(jnp.sum(jnp.square(a - b) * weights, axis=-1), axis=(1, 2))
        return distance


def _unit_length(feature: jax.Array) -> jax.Array:
    """Each pixel's vector [..., C] divided by its length."""
    norm = jnp.sqrt(jnp.sum(jnp.square(feature), axis=-1, keepdims=True))
    return feature / (norm + 1e-10)
