"""PSNR of image pairs."""

import numpy as np


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 pairs [N, H, W, C]: [N], at most 100."""
    difference = (images.astype(np.float64) - reconstructions.astype(np.float64)) / 255.0
    mse = np.mean(np.square(difference), axis=(1, 2, 3))
    return -10.0 * np.log10(np.maximum(mse, 1e-10))
