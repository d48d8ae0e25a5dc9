"""Real images of a data set, held in memory, and the grey pixels on which they are compared."""

import numpy as np
from PIL import Image

from latent_diffusion_jax.data.pipeline import DecodedSource, image_example

FEATURE_SIZE = 32  # pixels: side of the grey images


def read_split(
    source: DecodedSource, size: int, resize: int, limit: int
) -> tuple[np.ndarray, list, np.ndarray]:
    """Images uint8 [N, size, size, C], captions and labels (-1: none) of a split's first images.

    Args:
      source: the split.
      size: of the crops in their middle, in pixels.
      resize: of the images before, see `images.resize_and_crop`.
      limit: on N.
    """
    pixels, captions, labels = [], [], []
    for i in range(min(len(source), limit)):
        record = source[i]
        pixels.append(image_example(record, None, size, random_flip=False, resize=resize))
        captions.append(record["captions"])
        labels.append(-1 if record["label"] is None else record["label"])
    return np.stack(pixels), captions, np.array(labels)


def grey_features(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C], C = 1, 3 or 4 -> grey levels in [0, 1] at 32x32, float64 [N, 1024]."""
    size = (FEATURE_SIZE, FEATURE_SIZE)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    grey = [Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX)
            for image in pixels]  # fmt: skip
    return np.stack([np.asarray(image, np.float64).ravel() for image in grey]) / 255.0
