"""Precision and recall: small cases by hand, random ones by brute force."""

import numpy as np
import pytest

from latent_diffusion_jax.evaluation.precision_recall import coverage, precision_recall


def normal(count, dimensions=8, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimensions))


def brute_force(points, references, k):
    """All differences, as the definition says."""
    radii = [
        np.sort(np.linalg.norm(np.delete(references, i, axis=0) - reference, axis=1))[k - 1]
        for i, reference in enumerate(references)
    ]
    distances = np.linalg.norm(points[:, None] - references[None], axis=-1)
    return (distances <= radii).any(axis=1).mean()


def test_by_hand():
    # On a line: radii to the nearest other reference are 1, 1 and 4.
    references = np.array([[0.0], [1.0], [5.0]])
    points = np.array([[-1.5], [-0.5], [1.5], [8.5], [9.5], [2.5]])
    # -1.5 and 9.5 are outside; 2.5 and 8.5 lie in the large ball alone.
    assert coverage(points, references, k=1) == pytest.approx(4 / 6)
    # To the second nearest: 5, 4, 5.
    assert coverage(np.array([[-5.5], [-4.5], [9.5], [10.5]]), references, k=2) == 0.5


def test_a_point_may_lie_in_a_far_references_ball():
    references = np.array([[0.0], [0.1], [100.0]])
    assert coverage(np.array([[50.0]]), references, k=1) == 1.0  # nearest to 0.1, and outside it


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dimensions", [1, 3, 16])
def test_agrees_with_brute_force(k, dimensions):
    references, points = normal(60, dimensions), 1.5 * normal(80, dimensions, seed=1)
    expected = brute_force(points, references, k)
    assert 0.0 < expected < 1.0
    assert coverage(points, references, k) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1500])
def test_any_number_of_points(count):
    references, points = normal(30), 2.0 * normal(count, seed=1)
    expected = brute_force(points, references, 3)
    assert coverage(points, references, 3) == pytest.approx(expected)


def test_identical_sets_are_covered():
    real = normal(200)
    assert precision_recall(real, real, real) == (1.0, 1.0)


def test_sets_of_one_distribution_score_high():
    precision, recall = precision_recall(
        normal(400, 2), normal(300, 2, seed=1), normal(400, 2, seed=2)
    )
    assert precision > 0.9 and recall > 0.9


def test_far_sets_score_zero():
    real = normal(100)
    assert precision_recall(real, real, real + 100.0) == (0.0, 0.0)


def test_samples_of_half_the_data_have_precision_and_half_the_recall():
    left, right = normal(200, 2), normal(200, 2, seed=1) + 50.0
    held_out = np.concatenate([normal(100, 2, seed=2), normal(100, 2, seed=3) + 50.0])
    samples = normal(200, 2, seed=4)
    precision, recall = precision_recall(np.concatenate([left, right]), held_out, samples)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_half_of_the_samples_wrong_is_half_the_precision():
    real, held_out = normal(200, 2), normal(100, 2, seed=1)
    samples = np.concatenate([normal(200, 2, seed=2), normal(200, 2, seed=3) + 50.0])
    precision, recall = precision_recall(real, held_out, samples)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert recall > 0.9


def test_copies_of_repeated_images_are_covered():
    # Every image five times, so that all radii are 0.
    images = np.random.default_rng(0).random((50, 1024)).repeat(5, axis=0)
    assert precision_recall(images, images, images) == (1.0, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_references(count):
    with pytest.raises(ValueError, match=f"{count} references .* k=3"):
        coverage(normal(10), normal(count), k=3)
    assert coverage(normal(4), normal(4), k=3) == 1.0
