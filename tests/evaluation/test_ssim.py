"""SSIM against the paper's formula, written with Torch's convolution."""

import numpy as np
import pytest
import torch

from latent_diffusion_jax.evaluation.ssim import ssim


def by_definition(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Equation 13 of Wang et al. (2004) for uint8 [N, H, W, C], averaged for each image."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def average(images: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(images[:, None], window[None, None])  # no padding

    n, h, w, c = x.shape
    x, y = (
        torch.tensor(images).double().permute(0, 3, 1, 2).reshape(n * c, h, w) for images in (x, y)
    )
    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = found / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.reshape(n, -1).mean(1).numpy()


@pytest.mark.parametrize("shape", [(3, 24, 31, 3), (2, 11, 11, 1), (1, 16, 40, 4)])
def test_equals_the_paper(shape):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shape)
    images = np.cumsum(images - 128, axis=2) // 8 % 256  # neighbours resemble each other
    other = np.clip(images + rng.normal(scale=60, size=shape), 0, 255)
    images, other = images.astype(np.uint8), other.astype(np.uint8)
    expected = by_definition(images, other)
    assert (expected > 0.2).all() and (expected < 0.95).all()
    np.testing.assert_allclose(ssim(images, other), expected, rtol=1e-9)


def test_an_image_resembles_itself_most():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(ssim(images, images), 1.0, rtol=1e-12)
    assert (ssim(images, 255 - images) < 0).all()


def test_threads_change_nothing():
    x, y = np.random.default_rng(0).integers(0, 256, (2, 9, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(ssim(x, y, 1), ssim(x, y, 4))


def test_images_smaller_than_the_window_are_refused():
    images = np.zeros((1, 10, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(images, images)
