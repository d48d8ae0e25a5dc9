"""Frechet distance: known Gaussians, SciPy's matrix root, few features, features in batches."""

import numpy as np
import pytest
import scipy.linalg

from latent_diffusion_jax.evaluation.fid import Moments, frechet_distance


def features(count: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated, skewed and not centred."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return np.maximum(mixed, -1.0)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """As the literature's scripts compute it."""
    difference = x.mean(axis=0) - y.mean(axis=0)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return difference @ difference + np.trace(a) + np.trace(b) - 2.0 * np.trace(root).real


@pytest.mark.parametrize("counts", [(100, 100), (40, 500)])
def test_equals_the_definition(counts):
    x, y = features(counts[0], seed=1), features(counts[1], seed=2)
    expected = by_definition(x, y)
    assert expected > 1.0
    found = frechet_distance(Moments.of(x), Moments.of(y))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(Moments.of(y), Moments.of(x)), found, rtol=1e-9)


def gaussian(mean: np.ndarray, deviations: np.ndarray, turn: np.ndarray) -> Moments:
    return Moments(101, mean, 100 * turn @ np.diag(deviations**2) @ turn.T)


def test_gaussians_with_common_axes():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    means, deviations = rng.normal(size=(2, 6)), rng.uniform(0.1, 3.0, size=(2, 6))
    a, b = (gaussian(m, d, turn) for m, d in zip(means, deviations, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)


def test_fewer_features_than_dimensions():
    """Gaussians in planes at right angles: the root of the product is zero."""
    x, y = np.zeros((8, 400)), np.zeros((9, 400))
    x[:, :5], y[:, 5:9] = features(8, 5), features(9, 4)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 400)))[0]
    x, y = 1e3 * x @ turn, 1e3 * y @ turn
    a, b = Moments.of(x), Moments.of(y)
    difference = x.mean(axis=0) - y.mean(axis=0)
    expected = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [5, 300])
def test_distance_to_itself_is_zero(count):
    moments = Moments.of(100.0 * features(count, dim=40))
    assert 0.0 <= frechet_distance(moments, moments) <= 1e-10 * np.trace(moments.covariance)


def test_batches_give_the_moments_of_the_whole():
    x = 1e4 + features(57).astype(np.float32)  # far from zero, where sums of squares lose digits
    parts = [Moments.of(part) for part in (x[:1], x[1:20], x[20:22], x[22:])]
    forth, back = parts[0], parts[-1]
    for part in parts[1:]:
        forth = forth + part
    for part in parts[-2::-1]:
        back = back + part
    exact = x.astype(np.float64)
    for joined in (forth, back):
        assert joined.count == 57
        np.testing.assert_allclose(joined.mean, exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(joined.covariance, np.cov(exact, rowvar=False), atol=1e-9)


def test_one_feature_has_no_covariance():
    one, many = Moments.of(features(1)), Moments.of(features(5))
    for pair in ((one, many), (many, one)):
        with pytest.raises(ValueError, match="at least two"):
            frechet_distance(*pair)
