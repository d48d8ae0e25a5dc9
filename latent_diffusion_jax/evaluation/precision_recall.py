"""Precision and recall of a set of samples (Kynkaanniemi et al., 2019)."""

import numpy as np
from scipy.spatial.distance import cdist

BLOCK = 512  # rows whose distances are in memory at once


def coverage(points: np.ndarray, references: np.ndarray, k: int) -> float:
    """Share of points that lie within some reference's distance to its k-th nearest other one.

    Args:
      points: [N, D].
      references: [M, D], M > k.
      k: which neighbour's distance is a reference's radius.
    """
    if len(references) <= k:
        raise ValueError(f"{len(references)} references are too few for k={k}")

    def blocks(x: np.ndarray) -> list[np.ndarray]:
        return [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]

    # The nearest one of each is itself, at distance 0.
    radii = np.concatenate(
        [np.partition(cdist(block, references), k, axis=1)[:, k] for block in blocks(references)]
    )
    covered = sum(int((cdist(block, references) <= radii).any(1).sum()) for block in blocks(points))
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
