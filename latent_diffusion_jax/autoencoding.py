"""An autoencoder from Python: images to latents and back, at any size.

autoencoder = autoencoding.load("runs/kl_f8")
latents = autoencoder.encode(images)  # uint8 [B, H, W, C] -> float32 [B, H/f, W/f, c]
images = autoencoder.decode(latents)

What is larger than a tile goes through tile by tile, with the memory of one.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from latent_diffusion_jax import first_stages
from latent_diffusion_jax.first_stages import FirstStage
from latent_diffusion_jax.models import tiling
from latent_diffusion_jax.models.layers import NORM_STATISTICS
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.sampling import bounded, to_pictures


class Autoencoder:
    """A trained first stage.

    Attributes:
      stage: its network and parameters.
      tile: side of a tile in pixels; 0: everything at once.
      overlap: pixels that neighbouring tiles share.
    """

    def __init__(self, stage: FirstStage, tile: int = 512, overlap: int = 128):
        self.stage, self.tile, self.overlap = stage, tile, overlap
        if tile:
            tiling.check_tiles(stage.network.downsampling_factor, tile, overlap)
        self._encode, self._decode = jax.jit(self._encode_any), jax.jit(self._decode_any)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [B, H, W, C] -> the posterior's mean, not scaled, [B, H/f, W/f, c].

        Raises:
          UserError: the channels are not the network's, f does not divide height and width, or
            the latents are not finite.
        """
        network, factor = self.stage.network, self.stage.network.downsampling_factor
        if images.ndim != 4 or images.shape[-1] != network.image_channels:
            raise UserError(
                f"images of shape {images.shape} do not fit; expected [B, H, W, "
                f"{network.image_channels}]"
            )
        height, width = images.shape[1:3]
        if height % factor or width % factor:
            raise UserError(
                f"images of {width}x{height} pixels cannot be encoded: width and height must be "
                f"multiples of the downsampling factor {factor}"
            )
        latents = np.asarray(self._encode(self.stage.params, images))
        if not np.isfinite(latents).all():
            raise UserError(
                "what the autoencoder encoded is not finite: its weights are damaged, or too large "
                f"for {np.dtype(network.dtype).name}"
            )
        return latents

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [B, h, w, c], not scaled -> uint8 images [B, h*f, w*f, C].

        Raises:
          UserError: the channels are not the network's, or the images are not finite.
        """
        channels = self.stage.network.embed_dim
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise UserError(
                f"latents of shape {latents.shape} do not fit; expected [B, h, w, {channels}]"
            )
        images = np.asarray(self._decode(self.stage.params, latents))
        return to_pictures(images, "what the autoencoder decoded", self.stage.network.dtype)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [B, H, W, C] there and back; raises as `encode`."""
        return self.decode(self.encode(images))

    def _encode_any(self, params: Any, images: jax.Array) -> jax.Array:
        x, factor = to_float(images), self.stage.network.downsampling_factor

        def encode(x: jax.Array, statistics: Any) -> tuple[jax.Array, Any]:
            posterior, found = self._apply(params, x, statistics, "encode")
            return posterior.mean, found

        if not self._needs_tiles(images.shape[1], images.shape[2]):
            return encode(x, {})[0]
        sizes = dict(tile=self.tile, overlap=self.overlap)
        _, statistics = encode(tiling.collage(x, self.tile), {})
        return tiling.tiled_encode(
            lambda tile: encode(tile, statistics)[0], x, factor=factor, **sizes
        )

    def _decode_any(self, params: Any, latents: jax.Array) -> jax.Array:
        factor = self.stage.network.downsampling_factor

        def decode(z: jax.Array, statistics: Any) -> tuple[jax.Array, Any]:
            return self._apply(params, z, statistics, "decode")

        if self._needs_tiles(latents.shape[1] * factor, latents.shape[2] * factor):
            sizes = dict(factor=factor, tile=self.tile, overlap=self.overlap)
            _, statistics = decode(tiling.collage(latents, self.tile // factor), {})
            images = tiling.tiled_decode(lambda z: decode(z, statistics)[0], latents, **sizes)
        else:
            images = decode(latents, {})[0]
        return bounded(images)

    def _apply(self, params: Any, x: jax.Array, statistics: Any, method: str) -> tuple[Any, Any]:
        """(result, statistics of the normalisation); see `tiling.collage`."""
        variables = {"params": params, **statistics}
        return self.stage.network.apply(variables, x, method=method, mutable=[NORM_STATISTICS])

    def _needs_tiles(self, height: int, width: int) -> bool:
        return bool(self.tile) and max(height, width) > self.tile


def load(path: str | pathlib.Path, *, tile: int = 512, overlap: int = 128) -> Autoencoder:
    """Opens a first stage: a workdir, a diffusers folder or a file of CompVis' layout.

    Args:
      path: see `first_stages.open_first_stage`.
      tile: images with a longer side are worked on in tiles of this side, in pixels; 0: never.
      overlap: pixels that neighbouring tiles share.

    Raises:
      UserError: it cannot be opened, or the tiles do not fit its downsampling factor.
    """
    return Autoencoder(first_stages.open_first_stage(path), tile, overlap)
