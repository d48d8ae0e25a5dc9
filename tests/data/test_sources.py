"""Sources: TFDS datasets by name, folders with captions, and what is said about broken ones."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

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


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    for builder in (TinyCaptioned, TinyLabelled):
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


@pytest.mark.parametrize("wrong", ["image_key", "caption_key"])
def test_unknown_feature_names_the_known_ones(data_dir, wrong):
    keys = {"image_key": "image", "caption_key": "caption", wrong: "nonsense"}
    with raises_user_error("tiny_captioned", "'nonsense'", "caption", "image", f"data.{wrong}"):
        open_source("tiny_captioned", "train", data_dir=data_dir, **keys)


@pytest.mark.parametrize("split", ["validation", "train[:1", "train[a:b]"])
def test_unknown_split_names_the_known_ones(data_dir, split):
    with raises_user_error(repr(split), "train, test"):
        open_source("tiny_captioned", split, data_dir=data_dir, caption_key="caption")


# Folders.


def table(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def captions(folder: pathlib.Path, split: str, **options) -> dict[str, list[str]]:
    """Captions by file name."""
    records = everything(open_source(str(folder), split, **options))
    found = {str(pathlib.Path(r["name"]).relative_to(folder)): r["captions"] for r in records}
    assert len(found) == len(records)
    return found


def all_captions(folder: pathlib.Path, **options) -> dict[str, list[str]]:
    return captions(folder, "train", **options) | captions(folder, "test", **options)


def test_metadata_table(make_folder, png):
    folder = make_folder(
        {
            "a.png": png(1),
            "deep/er/b.png": png(2),
            "metadata.jsonl": table(
                {"file_name": "a.png", "text": "one", "seed": 3},
                {"file_name": "deep/er/b.png", "text": ["two", "zwei"]},
            )
            + "\n",
        }
    )
    assert all_captions(folder) == {"a.png": ["one"], "deep/er/b.png": ["two", "zwei"]}
    for split in ("train", "test"):
        for record in everything(open_source(str(folder), split)):
            assert level(record) == (1 if record["captions"] == ["one"] else 2)
            assert record["label"] is None


def test_metadata_tables_in_subfolders(make_folder):
    folder = make_folder(
        {
            "x/a.png": None,
            "x/metadata.jsonl": table({"file_name": "a.png", "text": "one"}),
            "y/a.png": None,
            "y/metadata.jsonl": table({"file_name": "a.png", "text": "two"}),
        }
    )
    assert all_captions(folder) == {"x/a.png": ["one"], "y/a.png": ["two"]}


def test_text_files_beside_images(make_folder):
    folder = make_folder(
        {"a.png": None, "a.txt": " one\n", "sub/B.JPG": None, "sub/B.txt": "zwölf", "x.md": "no"}
    )
    assert all_captions(folder) == {"a.png": ["one"], "sub/B.JPG": ["zwölf"]}


def test_caption_with_unusual_line_separators(make_folder):
    # They are no line ends in JSON Lines, and json.dumps(ensure_ascii=False) leaves them as is.
    text = "first\u2028second\x85third"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    folder = make_folder({"a.png": None, "metadata.jsonl": row + "\n"})
    assert captions(folder, "test", holdout_share=1.0) == {"a.png": [text]}


def test_caption_template_for_folders(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "one", "b.png": None, "b.txt": "{}"})
    found = all_captions(folder, caption_template="a photo of {}")
    assert found == {"a.png": ["a photo of one"], "b.png": ["a photo of {}"]}


@pytest.mark.parametrize("held_out", ["test", "validation", "valid", "val"])
def test_split_subfolders(make_folder, held_out):
    folder = make_folder(
        {
            "train/a.png": None,
            "train/a.txt": "one",
            f"{held_out}/b.png": None,
            f"{held_out}/b.txt": "two",
        }
    )
    assert captions(folder, "train") == {"train/a.png": ["one"]}
    assert captions(folder, "test") == {f"{held_out}/b.png": ["two"]}


def many(count: int, prefix: str = "") -> dict[str, str | None]:
    """Files of a folder with `count` captioned images."""
    files: dict[str, str | None] = {}
    for i in range(count):
        files |= {f"{prefix}{i:04d}.png": None, f"{prefix}{i:04d}.txt": f"number {i}"}
    return files


@pytest.mark.parametrize("prefixes", [("train/",), ("test/", "")], ids=["no test/", "no train/"])
def test_nothing_is_in_both_splits_where_one_subfolder_is_missing(make_folder, prefixes):
    for prefix in prefixes:
        folder = make_folder(many(60, prefix))
    train = captions(folder, "train", holdout_share=0.3)
    test = captions(folder, "test", holdout_share=0.3)
    assert train and test
    assert not train.keys() & test.keys()


def test_hash_holdout_is_a_partition_of_about_the_asked_share(make_folder):
    folder = make_folder(many(600))
    for share in (0.05, 0.3):
        train = captions(folder, "train", holdout_share=share)
        test = captions(folder, "test", holdout_share=share)
        assert not train.keys() & test.keys()
        assert len(train) + len(test) == 600
        assert len(test) / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)


def test_hash_holdout_stays_when_images_are_added(make_folder):
    folder = make_folder(many(100))
    before = {split: captions(folder, split, holdout_share=0.2) for split in ("train", "test")}
    make_folder(many(100, "a_") | many(100, "new/"))
    after = {split: captions(folder, split, holdout_share=0.2) for split in ("train", "test")}
    for split in ("train", "test"):
        assert before[split].keys() < after[split].keys()


def test_a_small_folder_still_holds_one_image_out(make_folder):
    folder = make_folder(many(3))
    assert len(captions(folder, "test", holdout_share=0.0)) == 1
    assert len(captions(folder, "train", holdout_share=0.0)) == 2


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_folder(name):
    with raises_user_error(name, "does not exist"):
        open_source(name, "train")


def test_empty_folder(make_folder):
    folder = make_folder({"readme.md": "nothing here"})
    with raises_user_error(str(folder), "'train'", "metadata.jsonl", ".txt"):
        open_source(str(folder), "train")


def test_folder_with_one_image_has_nothing_to_train_on(make_folder):
    folder = make_folder(many(1))
    with raises_user_error(str(folder), "'train'"):
        open_source(str(folder), "train")


def test_unknown_split_of_a_folder(make_folder):
    with raises_user_error("'train[:50%]'", "train and test"):
        open_source(str(make_folder(many(2))), "train[:50%]")


GOOD_ROW = '{"file_name": "a.png", "text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param('{"image": "a.png", "text": "x"}', ["image", "file_name"], id="no file_name"),
        pytest.param('{"file_name": "a.png", "caption": "x"}', ["caption", "text"], id="no text"),
        pytest.param("[1, 2]", ["list", "file_name", "text"], id="a list"),
        pytest.param("{'file_name': 'a.png'}", ["JSON"], id="not JSON"),
        pytest.param('{"file_name": "a.png", "text": "x', ["JSON"], id="cut off"),
        pytest.param('{"file_name": "a.png", "text": 3}', ["text", "string"], id="a number"),
        pytest.param('{"file_name": "a.png", "text": []}', ["text", "string"], id="no caption"),
        pytest.param('{"file_name": "a.png", "text": ["x", 1]}', ["text"], id="mixed captions"),
        pytest.param('{"file_name": "b.png", "text": "x"}', ["'b.png'", "exist"], id="missing"),
        pytest.param('{"file_name": "../b.png", "text": "x"}', ["'../b.png'"], id="out of it"),
        pytest.param('{"file_name": "/b.png", "text": "x"}', ["'/b.png'"], id="absolute"),
    ],
)
def test_bad_row_is_named_by_file_and_line(make_folder, png, line, said):
    folder = make_folder({"a.png": None, "metadata.jsonl": GOOD_ROW + line + "\n"})
    (folder.parent / "b.png").write_bytes(png())  # there, and still not to be read
    with raises_user_error(f"{folder / 'metadata.jsonl'}, line 2", *said):
        open_source(str(folder), "train")


def test_link_out_of_the_folder(make_folder, tmp_path, png):
    (tmp_path / "secret.png").write_bytes(png())
    folder = make_folder({"metadata.jsonl": GOOD_ROW})
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    with raises_user_error(f"{folder / 'metadata.jsonl'}, line 1", "'a.png'"):
        open_source(str(folder), "train")


def test_image_without_caption(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "one", "sub/b.png": None, "sub/c.png": None})
    with raises_user_error(str(folder), "2 of 3", "sub/b.png", "b.txt"):
        open_source(str(folder), "train")


def test_caption_file_that_is_not_utf8(make_folder):
    folder = make_folder({"a.png": None, "a.txt": "schön".encode("latin-1")})
    with raises_user_error(str(folder / "a.txt"), "UTF-8"):
        open_source(str(folder), "train")


def test_table_that_is_not_utf8(make_folder):
    row = '{"file_name": "a.png", "text": "schön"}\n'.encode("latin-1")
    folder = make_folder({"a.png": None, "metadata.jsonl": row})
    with raises_user_error(str(folder / "metadata.jsonl"), "UTF-8"):
        open_source(str(folder), "train")


def test_image_that_vanishes_is_named(make_folder):
    folder = make_folder(many(2))
    source = open_source(str(folder), "train")
    for path in folder.glob("*.png"):
        path.unlink()
    with raises_user_error(str(folder), ".png"):
        source[0]


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


def test_images_that_no_table_lists_are_counted(tmp_path, monkeypatch):
    from absl import logging

    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    for i in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) + "\n" for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    assert len(open_source(str(tmp_path), "train", holdout_share=0.0)) == 2
    assert said and "1 images" in said[0] and "3.png" in said[0]
