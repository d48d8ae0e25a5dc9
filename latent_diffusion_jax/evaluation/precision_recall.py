"""Precision and recall of a set of samples (Kynkaanniemi et al., 2019)."""

import numpy as np
from sklearn.neighbors import NearestNeighbors


def coverage(points: np.ndarray, references: np.ndarray, k: int) -> float:
    """Share of points that lie within some reference's distance to its k-th nearest other one.

    Args:
      points: [N, D].
      references: [M, D], M > k.
      k: which neighbour's distance is a reference's radius.
    """
    if len(references) <= k:
        raise ValueError(f"{len(references)} references are too few for k={k}")
    neighbours = NearestNeighbors(n_neighbors=k).fit(references)
    radii = neighbours.kneighbors()[0][:, -1]  # without the reference itself
    # A point may lie in a far reference's large ball, so all pairs count, in blocks of memory.
    covered = 0
    norms = np.einsum("ij,ij->i", references, references)
    for block in np.array_split(points, max(1, len(points) // 512)):
        squared = np.einsum("ij,ij->i", block, block)[:, None] + norms - 2 * block @ references.T
        covered += int((squared <= np.square(radii)).any(axis=1).sum())
    return covered / len(points)


def precision_recall(
    real: np.ndarray, held_out: np.ndarray, samples: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Precision: samples among the real points. Recall: held-out real points among the samples.

    Args:
      real: features of real images [M, D], float64 for exact distances.
      held_out: features of real images that the model never saw [H, D].
      samples: features of samples [N, D].
      k: as in `coverage`.
    """
    return coverage(samples, real, k), coverage(held_out, samples, k)
