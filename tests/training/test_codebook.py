"""Codebooks that learn by moving averages, and how a codebook is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models.quantizer import nearest
from latent_diffusion_jax.training.codebook import (
    CodebookAverage,
    statistics,
    usage,
    usage_figures,
)

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def steps(average: CodebookAverage, codebook, batches):
    """The codebook and averages after training on batches of latents."""

    @jax.jit
    def step(codebook, averages, z, key):
        found = statistics(z, nearest(z, codebook), len(codebook))
        return average.update(averages, found, z.reshape(-1, z.shape[-1]), key)

    averages = average.init(jnp.asarray(codebook))
    for i, z in enumerate(batches):
        codebook, averages = step(codebook, averages, z, jax.random.fold_in(KEY, i))
    return np.asarray(codebook), averages


def test_updates_equal_the_recursion_of_the_paper_in_float64():
    """Appendix A.1: counts N and sums m of each code decay, and the code is m / N."""
    n, count, decay = 6, 40, 0.9
    codebook = normal(0, n, 3)
    batches = normal(1, 8, count, 3)
    counts, sums, codes = np.full(n, count / n), codebook * count / n, codebook.astype(float)
    for z in batches.astype(float):
        chosen = np.square(z[:, None] - codes).sum(-1).argmin(-1)
        for i in range(n):
            mine = z[chosen == i]
            counts[i] = decay * counts[i] + (1 - decay) * len(mine)
            sums[i] = decay * sums[i] + (1 - decay) * mine.sum(0)
            codes[i] = sums[i] / counts[i]
    found, averages = steps(CodebookAverage(decay, 0.0), codebook, batches)
    np.testing.assert_allclose(found, codes, rtol=0, atol=1e-5)
    np.testing.assert_allclose(averages["shares"] * count, counts, rtol=1e-5)
    np.testing.assert_allclose(averages["sums"] * count, sums, rtol=0, atol=1e-5 * count)


def clusters(seed: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of clusters, and batches of points around them."""
    centres = np.array([[2.0, 2.0], [-2.0, 2.0], [0.0, -2.0]], np.float32)
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(0, 3, (batches, 90))] + 0.1 * normal(seed, batches, 90, 2)
    return centres, points.astype(np.float32)


def test_codes_converge_to_the_means_of_clusters():
    centres, batches = clusters(0, 80)
    start = np.array([[0.5, 0.3], [-0.3, 0.5], [0.0, -0.5]], np.float32)
    found, averages = steps(CodebookAverage(0.9, 0.0), start, batches)
    np.testing.assert_allclose(found, centres, atol=0.03)
    np.testing.assert_allclose(averages["shares"], np.full(3, 1 / 3), atol=0.05)


@pytest.mark.parametrize("revive_below", [0.0, 0.1])
def test_dead_codes_are_revived_where_latents_are(revive_below):
    """All start far off but one, which then takes all the latents of three clusters."""
    centres, batches = clusters(1, 80)
    start = np.array([[0.0, 0.0], [90.0, 90.0], [80.0, 80.0]], np.float32)
    found, averages = steps(CodebookAverage(0.8, revive_below), start, batches)
    if revive_below:
        distances = np.linalg.norm(found[:, None] - batches.reshape(-1, 2), axis=-1)
        assert distances.min(axis=1).max() < 1.0
        assert (np.asarray(averages["shares"]) > 0.01).all()
    else:  # they stay where they are, and the sums agree with them
        np.testing.assert_allclose(found[1:], start[1:], rtol=1e-5)
        np.testing.assert_allclose(found[0], centres.mean(0), atol=0.3)


def test_a_revived_code_is_one_of_the_candidates_and_starts_with_an_even_share():
    average = CodebookAverage(0.5, 0.5)
    averages = {
        "shares": jnp.asarray([0.97, 0.02, 0.01]),
        "sums": jnp.asarray([[0.97], [0.02], [0.01]]),
    }
    found = {"shares": jnp.asarray([1.0, 0.0, 0.0]), "sums": jnp.asarray([[1.0], [0.0], [0.0]])}
    candidates = jnp.asarray([[5.0], [6.0], [7.0], [8.0]])
    seen = set()
    for i in range(20):
        codebook, new = average.update(averages, found, candidates, jax.random.key(i))
        assert {float(c[0]) for c in codebook[1:]} <= {5.0, 6.0, 7.0, 8.0}
        seen |= {float(c[0]) for c in codebook[1:]}
        np.testing.assert_allclose(new["shares"], [0.985, 1 / 3, 1 / 3], rtol=1e-6)
        np.testing.assert_allclose(new["sums"], codebook * new["shares"][:, None], rtol=1e-6)
        np.testing.assert_allclose(codebook[0], 1.0, rtol=1e-6)
    assert seen == {5.0, 6.0, 7.0, 8.0}


def test_codes_that_nobody_used_yet_keep_their_place():
    codebook = normal(2, 5, 3)
    average = CodebookAverage(0.99, 0.0)
    averages = average.init(jnp.asarray(codebook))
    np.testing.assert_allclose(averages["sums"] / averages["shares"][:, None], codebook, rtol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, averages)
    found, _ = average.update(averages, nothing, jnp.zeros((1, 3)), KEY)
    np.testing.assert_allclose(found, codebook, rtol=1e-5)


def test_statistics_equal_numpy_and_average_over_micro_batches():
    z = normal(3, 4, 3, 2, 5)
    indices = np.random.default_rng(0).integers(0, 6, (4, 3, 2)).astype(np.int32)
    indices[indices == 4] = 5  # one that nobody uses
    ours = statistics(jnp.asarray(z), jnp.asarray(indices), 6)
    for i in range(6):
        mine = z[indices == i]
        np.testing.assert_allclose(ours["shares"][i], len(mine) / 24, rtol=1e-6)
        np.testing.assert_allclose(ours["sums"][i], mine.sum(0) / 24, rtol=1e-5, atol=1e-7)
    halves = [statistics(jnp.asarray(z[i::2]), jnp.asarray(indices[i::2]), 6) for i in (0, 1)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), mean, ours)


@pytest.mark.parametrize(
    ("indices", "used", "perplexity"),
    [
        ([0, 1, 2, 3], 1.0, 4.0),
        ([2, 2, 2, 2], 0.25, 1.0),
        ([0, 0, 3, 3], 0.5, 2.0),
        ([0, 0, 0, 1], 0.5, float(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))),
    ],
)
def test_usage_and_perplexity(indices, used, perplexity):
    shares = usage(jnp.asarray(indices, jnp.int32).reshape(1, 2, 2), 4)
    np.testing.assert_allclose(shares, np.bincount(indices, minlength=4) / 4)
    figures = usage_figures(shares)
    np.testing.assert_allclose(figures["codebook_usage"], used)
    np.testing.assert_allclose(figures["perplexity"], perplexity, rtol=1e-6)
