"""Softmax attention in numpy, for tests to compare with."""

import numpy as np
import scipy.special


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(d)) v for each batch row and head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = q[b, :, head] @ k[b, :, head].T / np.sqrt(q.shape[-1])
            if causal:
                scores = np.where(np.tri(*scores.shape), scores, -np.inf)
            out[b, :, head] = scipy.special.softmax(scores, axis=-1) @ v[b, :, head]
    return out
