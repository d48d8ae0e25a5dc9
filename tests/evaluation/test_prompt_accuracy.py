"""The reader of samples, and the prompts that it is asked about."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from latent_diffusion_jax.evaluation.prompt_accuracy import balanced_prompts, fit_reader


@pytest.fixture(scope="module")
def digits():
    """Features and labels of scans to fit on, and of others."""
    scans = load_digits()
    order = np.random.default_rng(1).permutation(len(scans.target))
    features, labels = scans.data[order] / 16, scans.target[order]
    return features[:1500], labels[:1500], features[1500:], labels[1500:]


@pytest.fixture(scope="module")
def reader(digits):
    return fit_reader(*digits)


def test_reader_reads_held_out_digits(reader, digits):
    _, _, features, labels = digits
    assert reader.held_out_accuracy >= 0.97
    assert reader.accuracy(features, labels) == reader.held_out_accuracy


def test_accuracy_is_the_share_of_right_labels(reader, digits):
    features, labels, _, _ = digits
    right = features[:100], labels[:100]
    assert reader.accuracy(*right) == 1.0
    some_wrong = np.where(np.arange(100) < 30, (labels[:100] + 1) % 10, labels[:100])
    assert reader.accuracy(features[:100], some_wrong) == pytest.approx(0.7)
    assert reader.accuracy(np.roll(features[:100], 1, axis=0), labels[:100]) < 0.3


def test_reader_cannot_read_noise(reader):
    noise = np.random.default_rng(0).random((500, 64))
    assert reader.accuracy(noise, np.arange(500) % 10) < 0.2


def captions_of(label):
    return [f"{wording} {label}" for wording in ("a", "one", "the")]


LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 1])
CAPTIONS = [captions_of(label) for label in LABELS]


def test_prompts_are_balanced_and_name_their_label():
    prompts, labels = balanced_prompts(CAPTIONS, LABELS, num_classes=3, per_class=7)
    assert len(prompts) == len(labels) == 21
    assert np.bincount(labels).tolist() == [7, 7, 7]
    for prompt, label in zip(prompts, labels, strict=True):
        assert prompt in captions_of(label)


def test_prompts_cover_all_wordings_alike():
    prompts, labels = balanced_prompts(CAPTIONS, LABELS, num_classes=3, per_class=7)
    for label in range(3):
        of_label = [prompt for prompt, other in zip(prompts, labels, strict=True) if other == label]
        counts = [of_label.count(caption) for caption in captions_of(label)]
        assert sorted(counts) == [2, 2, 3]


def test_prompts_come_from_all_examples_of_a_label():
    captions = [["first"], ["other"], ["second"], ["second"]]
    prompts, _ = balanced_prompts(captions, np.array([0, 1, 0, 0]), num_classes=2, per_class=4)
    assert prompts == ["first", "second", "first", "second", "other", "other", "other", "other"]
