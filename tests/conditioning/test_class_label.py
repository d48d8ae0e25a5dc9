"""Classes as conditions: a record's label, and labels as they are asked for."""

import numpy as np
import pytest

from latent_diffusion_jax.conditioning.class_label import guided_labels, label_conditioning
from latent_diffusion_jax.runtime.errors import UserError


def test_a_records_label():
    found = label_conditioning(3, [2, 0])
    assert found.prepare({"label": 2}, None) == {"label": 2}
    assert found.prepare({"label": 2}, None)["label"].dtype == np.int32
    assert found.null["label"] == 3 and found.null["label"].shape == ()
    np.testing.assert_array_equal(found.previews["label"], [2, 0])


def test_a_record_without_a_label():
    with pytest.raises(UserError, match=r"image a\.png has no label"):
        label_conditioning(3, [0]).prepare({"label": None, "name": "a.png"}, None)


def test_labels_asked_for():
    inputs, null = guided_labels(["cat", 1, "2"], ["dog", "horse", "cat"], 3, null_label=3)
    np.testing.assert_array_equal(inputs["label"], [2, 1, 2])
    np.testing.assert_array_equal(null["label"], [3, 3, 3])
    assert guided_labels([0], [], 3, None)[1] is None


def test_names_come_before_numbers():
    inputs, _ = guided_labels(["1"], ["1", "0"], 2, None)
    np.testing.assert_array_equal(inputs["label"], [0])


@pytest.mark.parametrize(
    ("label", "names", "said"),
    [
        ("bird", ["dog", "cat"], "unknown label 'bird'; known: dog, cat"),
        ("bird", [], "by number alone"),
        (2, ["dog", "cat"], r"label 2 must be in 0\.\.1"),
        ("2", ["dog", "cat"], r"label 2 must be in 0\.\.1"),
        (-1, [], r"label -1 must be in 0\.\.1"),
    ],
)
def test_labels_that_are_not_there(label, names, said):
    with pytest.raises(UserError, match=said):
        guided_labels([label], names, 2, None)
