"""SSIM of image pairs (Wang et al., 2004)."""

from concurrent import futures

import numpy as np
from skimage.metrics import structural_similarity

WINDOW = 11  # pixels: side of the Gaussian window


def ssim(images: np.ndarray, reconstructions: np.ndarray, num_threads: int = 8) -> np.ndarray:
    """Structural similarity of uint8 pairs [N, H, W, C], mean over pixels and channels: [N].

    Gaussian window of 11x11 pixels with sigma 1.5 at every place where it lies inside the image,
    covariances of the population, K1 = 0.01, K2 = 0.03, as in the paper.

    Raises:
      ValueError: the images are smaller than the window.
    """
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} pixels a side")

    def pair(x: np.ndarray, y: np.ndarray) -> float:
        return structural_similarity(
            x,
            y,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )

    with futures.ThreadPoolExecutor(num_threads, thread_name_prefix="ssim") as pool:
        return np.array(list(pool.map(pair, images, reconstructions)))
