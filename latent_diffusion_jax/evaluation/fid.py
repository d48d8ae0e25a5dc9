"""Frechet inception distance (Heusel et al., 2017), from features that come in batches."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and scatter of a set of features, in float64; sets are joined without their features.

    Attributes:
      count: N, number of features.
      mean: [D].
      scatter: sum of the outer products of the deviations from the mean [D, D].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features [N, D], N at least 1."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = np.outer(shift, shift * (self.count * other.count / count))
        scatter += self.scatter
        scatter += other.scatter
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased estimate [D, D] of the covariance, from 2 features or more."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^0.5).

    The trace of the root is the sum of the singular values of C_a^0.5 C_b^0.5: a sum of numbers
    that are not negative whatever the rounding, and exact for covariances of low rank (fewer
    features than dimensions), where roots of products have noise in place of zeros.

    Raises:
      ValueError: a set has fewer than two features.
    """
    if min(a.count, b.count) < 2:
        raise ValueError("the Frechet distance needs at least two features in each set")
    root_a, root_b = _half(a.covariance), _half(b.covariance)
    root_of_product = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    difference = a.mean - b.mean
    # Traces are the squared norms of the halves.
    traces = np.square(root_a).sum() + np.square(root_b).sum()
    return max(float(difference @ difference + traces - 2.0 * root_of_product), 0.0)


def _half(covariance: np.ndarray) -> np.ndarray:
    """H [D, rank] with H H^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
