"""The bundled photographs: what the patches are cut from, and that the splits share no pixel."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image

from latent_diffusion_jax.data import photos
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [photo.name for photo in photos.PHOTOS]
SHRUNK = ("galaxies", "retina")  # the others keep their pixels

# As the packages themselves give them, rows and columns in pixels.
ORIGINALS = {
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "astronaut": skimage_data.astronaut,
    "cat": skimage_data.cat,
    "coffee": skimage_data.coffee,
    "rocket": skimage_data.rocket,
    "galaxies": skimage_data.hubble_deep_field,
    "retina": skimage_data.retina,
    "tissue": skimage_data.immunohistochemistry,
    "motorcycle": lambda: skimage_data.stereo_motorcycle()[0],
}


@pytest.fixture(scope="module")
def splits(photos_dir):
    """All records of both splits by the photo's name, images decoded by Pillow."""
    builder = tfds.builder_from_directory(photos_dir / "bundled_photos" / "1.0.0")
    found = {}
    for split, source in builder.as_data_source().items():
        found[split] = collections.defaultdict(list)
        for record in (source[i] for i in range(len(source))):
            found[split][NAMES[record["label"]]].append(record)
    return found


def covered(records, margin: int = 0) -> np.ndarray:
    """How many patches show each pixel of a photo, [rows, columns]; without a margin of them."""
    counts = np.zeros((1000, 1000), int)
    for record in records:
        top, left = int(record["top"]) + margin, int(record["left"]) + margin
        counts[top : top + 128 - 2 * margin, left : left + 128 - 2 * margin] += 1
    return counts


def test_every_photo_is_in_both_splits(splits):
    for found in splits.values():
        assert found.keys() == set(NAMES) == ORIGINALS.keys()
        for records in found.values():
            assert {np.asarray(record["image"]).shape for record in records} == {(128, 128, 3)}
    assert {name: sum(map(len, found.values())) for name, found in splits.items()} == {
        "train": 387,
        "test": 68,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_share_no_pixel(splits, name):
    train, test = covered(splits["train"][name]), covered(splits["test"][name])
    assert not ((train > 0) & (test > 0)).any()
    assert 0.15 < (test > 0).sum() / ((train > 0) | (test > 0)).sum() < 0.35
    centres = covered(splits["test"][name], margin=32)
    assert centres.max() == 1 and centres.sum() == len(splits["test"][name]) * 64 * 64


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHRUNK])
def test_patches_are_the_pixels_of_the_photo(splits, name):
    original = ORIGINALS[name]()
    for record in splits["train"][name] + splits["test"][name]:
        top, left = int(record["top"]), int(record["left"])
        np.testing.assert_array_equal(
            np.asarray(record["image"]), original[top : top + 128, left : left + 128]
        )


@pytest.mark.parametrize("name", SHRUNK)
def test_large_photos_are_shrunk(splits, name):
    original = Image.fromarray(ORIGINALS[name]())
    if name == "retina":
        original = original.crop((218, 218, 1193, 1193))
    scale = 512 / min(original.size)
    size = [round(length * scale) for length in original.size]
    whole = np.asarray(original.resize(size, Image.Resampling.LANCZOS), np.int64)
    for record in splits["train"][name] + splits["test"][name]:
        patch = np.asarray(record["image"], np.int64)
        top, left = int(record["top"]), int(record["left"])
        expected = whole[top : top + 128, left : left + 128]
        assert np.abs(patch - expected).mean() < 2.0  # shrunk in two parts, not in one


def test_every_crop_of_64_is_inside_some_training_patch(splits):
    for name, records in splits["train"].items():
        corners = {(int(record["top"]), int(record["left"])) for record in records}
        rows, columns = (sorted({corner[axis] for corner in corners}) for axis in (0, 1))
        assert len(corners) == len(rows) * len(columns), name
        for places in (rows, columns):
            gaps = np.diff(places)
            assert (gaps > 0).all() and gaps.max() <= 128 - 64


@pytest.mark.parametrize("side", ["left", "right", "bottom"])
@pytest.mark.parametrize("size", [(300, 260), (1100, 1500)], ids=["as it is", "shrunk"])
def test_no_part_has_a_share_in_the_other(side, size):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3)).astype(np.uint8)
    whole = [np.asarray(part) for part, _ in photos.cut(Image.fromarray(pixels), side)]
    strip = round(128 * max(1.0, min(size) / 512))
    held_out = {
        "left": np.s_[:, :strip],
        "right": np.s_[:, -strip:],
        "bottom": np.s_[-strip:],
    }[side]
    changed = pixels.copy()
    changed[held_out] = 255 - changed[held_out]
    train, test = (np.asarray(part) for part, _ in photos.cut(Image.fromarray(changed), side))
    np.testing.assert_array_equal(train, whole[0])
    assert (np.abs(test.astype(int) - whole[1]) > 0).mean() > 0.9


def test_captions_name_what_is_on_the_photo(splits):
    for found in splits.values():
        for name, records in found.items():
            words = photos.PHOTOS[NAMES.index(name)].words
            for record in records:
                captions = [caption.decode() for caption in record["captions"]]
                assert captions[0] == f"a photograph of {words}"
                assert len(set(captions)) == 3 and all(words in caption for caption in captions)
    assert len({photo.words for photo in photos.PHOTOS}) == len(NAMES)


def test_opened_by_name(photos_dir):
    source = open_source("bundled_photos", "test", data_dir=str(photos_dir))
    assert len(source) == 68 and list(source.label_names) == NAMES
    record = source[3]
    assert photos.PHOTOS[record["label"]].words in record["captions"][0]
    assert images.decode(record["image"]).size == (128, 128)


PREPARE = """
import pathlib, sys, time
from latent_diffusion_jax.data.sources import open_source
number, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
(folder / f"ready{number}").touch()
while len(list(folder.glob("ready*"))) < 2:  # both begin together
    time.sleep(0.01)
source = open_source("bundled_photos", "train[:5]", data_dir=str(folder / "tfds"))
print(len(source), hash(tuple(source[i]["image"] for i in range(5))))
"""


def test_processes_may_prepare_it_at_once(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(i), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    done = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    said = {output.splitlines()[-1] for output, _ in done}
    assert len(said) == 1 and said.pop().startswith("5 ")
    assert [path.name for path in (tmp_path / "tfds" / "bundled_photos").iterdir()] == ["1.0.0"]


def test_a_package_without_its_photos_is_named(tmp_path, monkeypatch):
    empty = photos.PHOTOS[2]._replace(file="data/nothing.png")
    monkeypatch.setattr(photos, "PHOTOS", (empty,))
    with pytest.raises(UserError, match=r"^data bundled_photos.*nothing\.png.*skimage[^\n]*$"):
        open_source("bundled_photos", "train", data_dir=str(tmp_path))
    assert not (tmp_path / "bundled_photos" / "1.0.0").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package sklearn; install it"):
        photos.read(photos.PHOTOS[0])
