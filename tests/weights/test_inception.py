"""Inception weights: the table, and the loader's errors; parity is in tests/models."""

import numpy as np
import pytest

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, inception, mapping


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A complete file's tensors, all zero and without memory of their own."""
    found = {}
    table = inception.table()
    for name, shape in inception.shapes().items():
        theirs, layout = table[name]
        zeros = np.broadcast_to(np.float32(0), shape)
        found[theirs] = mapping.TO_THEIRS[layout](zeros)
    return found


@pytest.fixture
def load(monkeypatch):
    """Loads tensors as if they were in a file."""

    def load(tensors):
        monkeypatch.setattr(files, "read", lambda path: tensors)
        return inception.load("inception.pth")

    return load


def test_names_and_shapes_are_the_published_ones(tensors):
    assert len(tensors) == 94 * 5 + 2  # convolutions with their normalisation, and the classes
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.running_mean": (32,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6c.branch7x7dbl_3.conv.weight": (160, 160, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }.items():
        assert tensors[name].shape == shape


def test_counters_of_training_steps_are_passed_over(tensors, load):
    counter = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    params = load(tensors | counter)
    assert params["Mixed_5b"]["branch1x1"]["bn"].keys() == {"scale", "bias", "mean", "var"}
    assert params["fc"]["kernel"].shape == (2048, 1008)


def test_missing_misshapen_and_extra_tensors_are_named(tensors, load):
    wrong = {"fc.bias": np.zeros(1000, np.float32), "AuxLogits.fc.bias": np.zeros(5, np.float32)}
    wrong = {name: x for name, x in tensors.items() if name != "fc.weight"} | wrong
    with pytest.raises(UserError) as error:
        load(wrong)
    for part in ("Inception weights inception.pth", "'fc.weight' (1008, 2048)", "'fc.bias' (1000,)",
                 "(1008,)", "'AuxLogits.fc.bias' (5,)"):  # fmt: skip
        assert part in str(error.value)


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth"):
        inception.load(tmp_path / "none.pth")
