"""Sources: TFDS datasets by name, and what is said about broken ones."""

import json
import logging
import os
import pathlib
import re
import resource
import shutil
from concurrent import futures

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from latent_diffusion_jax import conditions
from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError


class TinyCaptioned(tfds.core.GeneratorBasedBuilder):
    """Eight grey images, each with one caption that names its level."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 8), "test": self._generate_examples(8, 11)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"image": Image.new("RGB", (4, 4), (i, i, i)), "caption": f"grey level {i}"}


class TinyLabelled(tfds.core.GeneratorBasedBuilder):
    """Six images with class labels and no text, under names of features that are not ours."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "animal": tfds.features.ClassLabel(names=["cat", "dog", "cow"]),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield i, {"picture": Image.new("RGB", (4, 4), (i % 3,) * 3), "animal": i % 3}


class TinyBands(tfds.core.GeneratorBasedBuilder):
    """Two images of five bands as arrays of any size, and one feature that is no image."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "bands": tfds.features.Tensor(
                    shape=(None, None, 5), dtype=np.uint8, encoding="zlib"
                ),
                "heights": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(2):
            yield i, {"bands": bands(i), "heights": np.zeros((4, 4), np.float32)}


def bands(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(256, size=(6, 8 + i, 5)).astype(np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    for builder in (TinyCaptioned, TinyLabelled, TinyBands):
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def level(record) -> int:
    """The grey level that a record's image shows."""
    return images.decode(record["image"]).getpixel((0, 0))[0]


def everything(source) -> list:
    return [source[i] for i in range(len(source))]


def raises_user_error(*parts: str):
    """Expects a UserError of one line that says each of these."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(UserError, match=rf"^{pattern}[^\n]*$")


# TFDS datasets.


def test_text_feature(data_dir):
    source = open_source("tiny_captioned", "train", data_dir=data_dir, caption_key="caption")
    records = everything(source)
    assert sorted(level(record) for record in records) == list(range(8))
    for record in records:
        assert record["captions"] == [f"grey level {level(record)}"]
        assert record["label"] is None
    assert len({record["name"] for record in records}) == 8
    assert source.label_names == ()


def test_class_label_as_caption(data_dir):
    source = open_source(
        "tiny_labelled",
        "train",
        data_dir=data_dir,
        image_key="picture",
        caption_key="animal",
        caption_template="a photo of a {}",
    )
    assert list(source.label_names) == ["cat", "dog", "cow"]
    for record in everything(source):
        assert record["label"] == level(record)
        assert record["captions"] == [f"a photo of a {source.label_names[record['label']]}"]


def test_sequence_of_captions_beside_a_label(digits_dir):
    source = open_source("handwritten_digits", "test", data_dir=str(digits_dir))
    assert len(source) == 297
    for record in everything(source):
        assert len(record["captions"]) == 8
        assert record["captions"][0] == f"a handwritten {source.label_names[record['label']]}"


def test_split_slicing(data_dir):
    def read(split):
        source = open_source("tiny_captioned", split, data_dir=data_dir, caption_key="caption")
        return [level(record) for record in everything(source)]

    train = read("train")
    assert read("train[:50%]") == train[:4]
    assert read("train[50%:]") == train[4:]
    assert read("train[2:3]") == train[2:3]
    assert sorted(read("test")) == [8, 9, 10]


def test_default_data_is_prepared_on_first_use(tmp_path):
    source = open_source("handwritten_digits", "train[:3]", data_dir=str(tmp_path))
    assert len(source) == 3
    assert (tmp_path / "handwritten_digits").is_dir()


def test_version_after_a_colon(data_dir):
    keys = {"data_dir": data_dir, "caption_key": "caption"}
    assert len(open_source("tiny_captioned:1.0.0", "train", **keys)) == 8
    with raises_user_error("tiny_captioned:2.0.0", "tiny_captioned/1.0.0"):
        open_source("tiny_captioned:2.0.0", "train", **keys)


def test_newest_version_is_opened(data_dir, tmp_path):
    # Two-digit numbers come after one-digit ones, though not in the alphabet.
    for version in ("1.9.0", "1.10.0"):
        folder = tmp_path / "tiny_captioned" / version
        shutil.copytree(pathlib.Path(data_dir) / "tiny_captioned" / "1.0.0", folder)
        info = json.loads((folder / "dataset_info.json").read_text())
        info["version"] = version
        if version == "1.10.0":  # told apart by its splits
            info["splits"] = [split for split in info["splits"] if split["name"] == "test"]
        (folder / "dataset_info.json").write_text(json.dumps(info))
    source = open_source("tiny_captioned", "test", data_dir=str(tmp_path), caption_key="caption")
    assert len(source) == 3
    with raises_user_error("train", "splits: test)"):
        open_source("tiny_captioned", "train", data_dir=str(tmp_path), caption_key="caption")


def test_unknown_dataset_names_what_is_there(data_dir):
    with raises_user_error(
        "'imagenet2012'", data_dir, "tiny_captioned/1.0.0", "tiny_labelled/1.0.0"
    ):
        open_source("imagenet2012", "train", data_dir=data_dir)


def test_unknown_dataset_where_nothing_is_there(tmp_path):
    with raises_user_error("'imagenet2012'", str(tmp_path), "none"):
        open_source("imagenet2012", "train", data_dir=str(tmp_path))


EVIL = "import pathlib; pathlib.Path({!r}).touch()"


@pytest.fixture
def evil(tmp_path, monkeypatch) -> pathlib.Path:
    """A file that is there where what lies in the working directory was imported."""
    ran = tmp_path / "ran"
    for module in ("evil.py", "data/ds/evil.py"):
        path = tmp_path / "cwd" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EVIL.format(str(ran)))
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend("")  # as `python -m` has it
    return ran


def of_class(name: str) -> dict:
    return {"pythonClassName": name, "jsonFeature": {"json": "{}"}}


@pytest.mark.parametrize(
    "feature",
    [
        of_class("data.ds.evil.X"),
        of_class("evil.X"),
        {"python_class_name": "evil.X", "jsonFeature": {"json": "{}"}},  # as protobuf reads too
        {"type": "evil.X", "content": {}},
        {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
         "jsonFeature": {"json": json.dumps({"x": {"type": "evil.X", "content": {}}})}},
    ],
    ids=["nested folders", "module", "other spelling", "older", "JSON within JSON"],
)  # fmt: skip
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_no_code_is_imported_for_what_a_dataset_says(copied_dir, evil, file, feature):
    path = copied_dir / "tiny_captioned" / "1.0.0" / file
    whole = json.loads(path.read_text())
    if file == "features.json":
        whole["featuresDict"]["features"]["more"] = feature
    else:
        whole["features"] = feature
    path.write_text(json.dumps(whole))
    with raises_user_error(str(path), "evil.X", "not one of tensorflow_datasets.core.features."):
        open_copied(copied_dir)
    assert not evil.exists()


@pytest.mark.parametrize("name", ["evil", "data.ds.evil", "data/ds/evil", "evil:1.0.0"])
def test_no_code_is_imported_for_a_name(data_dir, evil, name):
    with raises_user_error("neither a folder nor a TFDS dataset"):
        open_source(name, "train", data_dir=data_dir)
    assert not evil.exists()


def test_what_tfds_writes_is_of_classes_that_are_known():
    found = list(tfds.features.FeatureConnector._registered_features)
    assert [name for name in found if name.startswith("tensorflow_datasets.core.")]
    for name in found:
        if name.startswith("tensorflow_datasets.") and "testing" not in name:
            assert name.startswith("tensorflow_datasets.core.features."), name


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("dataset_info.json", b"{"),
        ("dataset_info.json", b"[]"),
        ("dataset_info.json", b"\xff"),
        ("dataset_info.json", b"{}"),
        ("dataset_info.json", b"[" * 100_000),
        ("dataset_info.json", b'{"version": 3}'),
        ("dataset_info.json", None),
        ("features.json", b""),
        ("features.json", b"[]"),
        ("features.json", b"3"),
        ("features.json", json.dumps(of_class("tensorflow_datasets.core.features.no.X")).encode()),
        ("features.json",
         json.dumps(of_class("tensorflow_datasets.core.features.text_feature.Text")).encode()),
        ("features.json", None),
    ],
)  # fmt: skip
def test_damaged_info_files_are_named(copied_dir, file, contents):
    path = copied_dir / "tiny_captioned" / "1.0.0" / file
    path.unlink()
    if contents is None:
        os.mkfifo(path)  # of which reading would wait for ever
    else:
        path.write_bytes(contents)
    with raises_user_error(f"cannot use {path}: "):
        open_copied(copied_dir)


def test_a_missing_info_file_is_named(copied_dir):
    path = copied_dir / "tiny_captioned" / "1.0.0" / "features.json"
    path.unlink()
    with raises_user_error(f"cannot read {path}: No such file or directory"):
        open_copied(copied_dir)


def test_damaged_info_of_bundled_data_is_named(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "handwritten_digits", tmp_path / "handwritten_digits")
    path = tmp_path / "handwritten_digits" / "1.0.0" / "dataset_info.json"
    path.write_text("{")
    with raises_user_error(f"cannot use {path}: "):
        open_source("handwritten_digits", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("wrong", ["image_key", "caption_key"])
def test_unknown_feature_names_the_known_ones(data_dir, wrong):
    keys = {"image_key": "image", "caption_key": "caption", wrong: "nonsense"}
    with raises_user_error("tiny_captioned", "'nonsense'", "caption", "image", f"data.{wrong}"):
        open_source("tiny_captioned", "train", data_dir=data_dir, **keys)


@pytest.mark.parametrize("split", ["validation", "train[:1", "train[a:b]"])
def test_unknown_split_names_the_known_ones(data_dir, split):
    with raises_user_error(repr(split), "train, test"):
        open_source("tiny_captioned", split, data_dir=data_dir, caption_key="caption")


# Without captions, and arrays.


def test_dataset_without_captions(data_dir):
    keys = {"data_dir": data_dir, "image_key": "picture", "caption_key": ""}
    source = open_source("tiny_labelled", "train", caption_template="a photo of a {}", **keys)
    assert len(source) == 6
    for i, record in enumerate(everything(source)):
        assert record["captions"] == source.captions(i) == [""]
        assert record["label"] == level(record)


def test_arrays_of_any_size_come_through(data_dir):
    keys = {"data_dir": data_dir, "image_key": "bands", "caption_key": ""}
    records = everything(open_source("tiny_bands", "train", **keys))
    assert len(records) == 2
    for record in sorted(records, key=lambda record: record["image"].shape):
        np.testing.assert_array_equal(record["image"], bands(record["image"].shape[1] - 8))


def test_a_tensor_that_is_no_image_is_refused(data_dir):
    keys = {"data_dir": data_dir, "image_key": "heights", "caption_key": ""}
    with raises_user_error("no image feature 'heights'", "uint8 [H, W, C]", "bands"):
        open_source("tiny_bands", "train", **keys)


# Nested features.


class TinyNested(tfds.core.GeneratorBasedBuilder):
    """Images with captions inside a sequence of features, as coco_captions has them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(
                    {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):  # the first image has no caption at all
            captions = [{"id": 10 * i + j, "text": f"text {i} {j}"} for j in range(i)]
            yield i, {"image": Image.new("RGB", (4, 4), (i, i, i)), "captions": captions}


@pytest.fixture(scope="module")
def nested_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("nested"))
    TinyNested(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_captions_inside_a_sequence_of_features(nested_dir):
    source = open_source("tiny_nested", "train", data_dir=nested_dir, caption_key="captions/text")
    found = {level(record): record["captions"] for record in everything(source)}
    assert found == {0: [""], 1: ["text 1 0"], 2: ["text 2 0", "text 2 1"]}
    assert [source.captions(i) for i in range(3)] == [r["captions"] for r in everything(source)]


@pytest.mark.parametrize("key", ["captions", "captions/id", "captions/nothing", "image"])
def test_features_that_are_no_captions_are_refused(nested_dir, key):
    with pytest.raises(UserError, match=f"no text or class label feature '{key}'.*captions/text"):
        open_source("tiny_nested", "train", data_dir=nested_dir, caption_key=key)


def test_an_ambiguous_dataset_is_refused(nested_dir, tmp_path):
    for config in ("small", "large"):
        shutil.copytree(pathlib.Path(nested_dir) / "tiny_nested", tmp_path / "twice" / config)
    shutil.copytree(tmp_path / "twice" / "small" / "1.0.0", tmp_path / "cut" / "1.0.0.incompleteX")
    with pytest.raises(UserError, match="several configs, name one: twice/large, twice/small"):
        open_source("twice", "train", data_dir=str(tmp_path), caption_key="captions/text")
    key = {"data_dir": str(tmp_path), "caption_key": "captions/text"}
    assert len(open_source("twice/small", "train", **key)) == 3
    with pytest.raises(UserError, match="neither a folder nor a TFDS dataset"):
        open_source("cut", "train", **key)


@pytest.mark.parametrize("template", ["photo", "{x}", "{} {}", "{0.x}", "{"])
def test_a_template_without_a_place_for_the_caption_is_refused(nested_dir, template):
    with pytest.raises(UserError, match="caption_template"):
        open_source("tiny_nested", "train", data_dir=nested_dir, caption_template=template)


class TinyRude(TinyNested):
    """Its second caption would move a terminal's cursor."""

    def _generate_examples(self):
        for i, text in enumerate(("a", "b\x1b[2J", "c")):
            image = Image.new("RGB", (4, 4), (i, i, i))
            yield i, {"image": image, "captions": [{"id": i, "text": text}]}


def test_captions_with_control_characters_are_damaged_records(tmp_path, caplog):
    TinyRude(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    key = {"data_dir": str(tmp_path), "caption_key": "captions/text"}
    source = open_source("tiny_rude", "train", **key)
    failed = []
    for i in range(3):
        try:
            source[i]
        except RecordError as error:
            failed.append(error.name)
            assert "its caption has the control character '\\x1b' at place 2" in str(error)
            with pytest.raises(RecordError, match="its caption has"):
                source.captions(i)
    assert len(failed) == 1
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert sorted(conditions.captions_of(source, 3)) == ["a", "c"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("cannot use the caption of tiny_rude")


# Files that go away and come back.


@pytest.fixture
def copied_dir(data_dir, tmp_path) -> pathlib.Path:
    """A data_dir of one's own with `tiny_captioned`."""
    shutil.copytree(pathlib.Path(data_dir) / "tiny_captioned", tmp_path / "tiny_captioned")
    return tmp_path


def open_copied(copied_dir, split="train"):
    return open_source("tiny_captioned", split, data_dir=str(copied_dir), caption_key="caption")


def test_records_come_back_when_what_was_open_is_dead(copied_dir, kill_handles):
    source = open_copied(copied_dir)
    wanted = [level(record) for record in everything(source)]
    for _ in range(2):
        assert kill_handles(copied_dir)
        with futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(source.__getitem__, range(8)))
        assert [level(record) for record in found] == wanted


def test_files_that_are_away_are_no_damaged_records(copied_dir, kill_handles):
    source = open_copied(copied_dir)
    wanted = level(source[3])
    kill_handles(copied_dir)
    (copied_dir / "tiny_captioned").rename(copied_dir / "away")
    with pytest.raises(FileNotFoundError, match="tiny_captioned"):
        source[3]
    (copied_dir / "away").rename(copied_dir / "tiny_captioned")
    assert level(source[3]) == wanted


def test_a_system_that_cannot_open_files_is_no_damaged_record(copied_dir, kill_handles):
    source = open_copied(copied_dir)
    wanted = level(source[3])
    kill_handles(copied_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            source[3]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert level(source[3]) == wanted


def test_a_record_that_new_readers_cannot_read_is_damaged(copied_dir):
    (path,) = (copied_dir / "tiny_captioned" / "1.0.0").glob("*train.array_record*")
    data = path.read_bytes()
    place = data.index(b"grey level")
    path.write_bytes(data[:place] + b"GREY" + data[place + 4 :])
    source = open_copied(copied_dir)
    damaged = []
    for i in range(8):
        try:
            source[i]
        except RecordError as error:
            damaged.append(error.name)
    assert len(damaged) == 1 and damaged[0].startswith("tiny_captioned/train[")


def test_identity_is_of_the_dataset_the_split_and_its_length(data_dir, copied_dir, digits_dir):
    one = open_copied(copied_dir).identity
    assert re.fullmatch("[0-9a-f]{16}", one) and open_copied(data_dir).identity == one
    decoded = pipeline.DecodedSource(open_copied(copied_dir), 0.0)
    assert decoded.identity == one
    others = [open_copied(data_dir, split).identity for split in ("test", "train[:50%]")]
    others.append(open_source("handwritten_digits", "train", data_dir=str(digits_dir)).identity)
    assert len({one, *others}) == 4
