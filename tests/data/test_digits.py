"""The embedded data: what is in it, and that preparing it needs no TensorFlow."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from latent_diffusion_jax.data import digits

ROOT = pathlib.Path(__file__).parents[2]
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def splits(digits_dir):
    """All records of both splits, images decoded by Pillow."""
    builder = tfds.builder_from_directory(digits_dir / "handwritten_digits" / "1.0.0")
    source = builder.as_data_source()
    return {name: [source[name][i] for i in range(len(source[name]))] for name in source}


def test_sizes_and_disjoint_ids(splits):
    ids = {name: {int(record["id"]) for record in records} for name, records in splits.items()}
    assert {name: len(records) for name, records in splits.items()} == {"train": 1500, "test": 297}
    assert not ids["train"] & ids["test"]
    assert ids["train"] | ids["test"] == set(range(1797))


def test_both_splits_have_every_digit(splits):
    for records in splits.values():
        counts = np.bincount([record["label"] for record in records], minlength=10)
        assert counts.min() > 0.05 * len(records)


def test_pixels_are_pillows_bicubic_of_the_scans(splits):
    scans = load_digits()
    for record in splits["train"] + splits["test"]:
        grey = np.round(scans.images[record["id"]] / 16 * 255).astype(np.uint8)
        expected = Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC)
        image = np.asarray(record["image"])
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, np.asarray(expected)[..., None].repeat(3, axis=2))


def test_captions_name_the_digit(splits):
    labels = load_digits().target
    for record in splits["train"] + splits["test"]:
        digit = int(labels[record["id"]])
        assert record["label"] == digit
        captions = [caption.decode() for caption in record["captions"]]
        assert len(set(captions)) == len(captions) == 8
        for caption in captions:
            words = re.findall(r"\w+", caption)
            named = [w for w in words if w in NUMERALS or w.isdigit()]
            assert named in ([str(digit)], [NUMERALS[digit]]), caption


def test_wordings_use_words_and_numerals():
    assert any("{word}" in caption for caption in digits.CAPTIONS)
    assert any("{digit}" in caption for caption in digits.CAPTIONS)


def test_format_has_random_access(digits_dir):
    folder = digits_dir / "handwritten_digits" / "1.0.0"
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    assert len(list(folder.glob("*.array_record*"))) == 2


def test_tensorflow_is_never_imported(tmp_path):
    # A module that raises on import would also be found where TensorFlow is not installed.
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys\n"
        "from latent_diffusion_jax.data.sources import open_source\n"
        f"source = open_source('handwritten_digits', 'test', data_dir={str(tmp_path / 'd')!r})\n"
        "assert len(source) == 297 and source[0]['captions'], source[0]\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
