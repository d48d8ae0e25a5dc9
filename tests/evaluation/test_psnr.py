"""PSNR of known differences."""

import numpy as np
import pytest

from latent_diffusion_jax.evaluation.psnr import psnr


def images(seed=0):
    return np.random.default_rng(seed).integers(100, 150, size=(3, 8, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize("level", [1, 10, 51, 100])
def test_constant_difference(level):
    for other in (images() + np.uint8(level), images() - np.uint8(level)):
        expected = np.full(3, 20 * np.log10(255 / level))
        np.testing.assert_allclose(psnr(images(), other), expected)


def test_black_against_white():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(psnr(black, black + np.uint8(255)), [0.0], atol=1e-12)


def test_gaussian_noise():
    noise = np.random.default_rng(1).normal(scale=8.0, size=(2, 64, 64, 3))
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    noisy = np.round(grey + noise).astype(np.uint8)
    np.testing.assert_allclose(psnr(grey, noisy), 20 * np.log10(255 / 8), atol=0.3)


def test_one_value_for_each_image():
    other = images()
    other[1] += 10
    other[2, 0, 0, 0] += 10
    found = psnr(images(), other)
    expected = [100.0, 20 * np.log10(255 / 10), 20 * np.log10(255 / 10) + 10 * np.log10(8 * 9 * 3)]
    np.testing.assert_allclose(found, expected)


def test_same_images_are_capped():
    np.testing.assert_allclose(psnr(images(), images()), 100.0)


def test_order_does_not_matter():
    np.testing.assert_array_equal(psnr(images(0), images(1)), psnr(images(1), images(0)))
