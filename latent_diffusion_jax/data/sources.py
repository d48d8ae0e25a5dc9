"""Where examples come from: a TFDS dataset by name, or a folder of images with captions.

A source is a random-access sequence of records `{"image": encoded bytes, "captions": [str, ...],
"label": int or None, "name": what to call it in messages}`, with `label_names` beside it. A record
has at least one caption, "" where the data has none for it.
"""

import contextlib
import hashlib
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from latent_diffusion_jax.data import digits  # registers the builder
from latent_diffusion_jax.runtime.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_COLUMNS = ("file_name", "text")


class Source(Protocol):
    """Random access to records; see the module's docstring."""

    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> list[str]:
        """A record's captions alone, without reading its image where that can be."""
        ...


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_key: str = "image",
    caption_key: str = "captions",
    caption_template: str = "{}",
    holdout_share: float = 0.05,
) -> Source:
    """Opens one split of a dataset.

    Args:
      name: an existing folder, or the name of a TFDS dataset that is prepared under `data_dir`.
        `handwritten_digits` is prepared on first use.
      split: a TFDS split (`train[:90%]` works), or `train` or `test` of a folder.
      data_dir: where TFDS keeps its datasets; None is its default.
      image_key: TFDS feature with the image.
      caption_key: TFDS feature with the caption: text, a sequence of texts, or a class label;
        `captions/text` for the feature `text` within `captions`.
      caption_template: what becomes of a caption: "a photo of a {}", say, for class names.
      holdout_share: share of a folder that is kept for `test`, where it has no such subfolder.

    Raises:
      UserError: nothing is there, a feature or split is missing, or a caption file is damaged.
    """
    if not name:
        raise UserError("data.name is empty; give a folder or the name of a TFDS dataset")
    try:
        complete = "caption" in caption_template.format("caption")
    except (KeyError, IndexError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"data.caption_template={caption_template!r} must have one {{}}")
    if pathlib.Path(name).expanduser().is_dir():
        return FolderSource(pathlib.Path(name).expanduser(), split, holdout_share, caption_template)
    if name.startswith((".", "/", "~")):
        raise UserError(f"data folder {name} does not exist")
    return TfdsSource(name, split, data_dir, image_key, caption_key, caption_template)


def _open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """A builder whose data is prepared in a format with random access."""
    if name == "handwritten_digits":
        builder = digits.HandwrittenDigits(data_dir=data_dir, file_format="array_record")
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of a download
                builder.download_and_prepare()
        except OSError:  # perhaps another process was faster
            builder = digits.HandwrittenDigits(data_dir=data_dir, file_format="array_record")
            if not builder.is_prepared():
                raise
        return builder
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    path, _, version = name.partition(":")
    # From its files alone: needs neither the dataset's code nor what that imports.
    folders = [info.parent for info in (root / path).glob("**/dataset_info.json")]
    folders = [folder for folder in folders if tfds.core.Version.is_valid(folder.name)]
    folders.sort(key=lambda folder: tfds.core.Version(folder.name))
    if version:
        folders = [folder for folder in folders if folder.name == version]
    if not folders:
        prepared = sorted(
            str(info.parent.relative_to(root)) for info in root.glob("*/**/dataset_info.json")
        )
        raise UserError(
            f"data {name!r} is neither a folder nor a TFDS dataset prepared under {root} "
            f"(prepared there: {', '.join(prepared) or 'none'})"
        )
    kinds = sorted({str(folder.parent.relative_to(root)) for folder in folders})
    if len(kinds) > 1:
        raise UserError(f"data {name!r} has several configs, name one: {', '.join(kinds)}")
    return tfds.builder_from_directory(folders[-1])


def _caption_feature(features: Any, path: str) -> Any:
    """The text or class label at a path such as `captions/text`; None where there is none."""
    feature: Any = features
    for part in path.split("/"):
        feature = getattr(feature, "feature", feature)  # of a sequence's elements
        if not isinstance(feature, tfds.features.FeaturesDict) or part not in feature:
            return None
        feature = feature[part]
    feature = getattr(feature, "feature", feature)
    return feature if isinstance(feature, (tfds.features.Text, tfds.features.ClassLabel)) else None


def _feature_names(features: Any, prefix: str = "") -> list[str]:
    """Names of all features, of nested ones as paths."""
    names = []
    for key, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, tfds.features.FeaturesDict):
            names += _feature_names(inner, f"{prefix}{key}/")
        else:
            names.append(prefix + key)
    return names


class TfdsSource:
    """One split of a prepared TFDS dataset, images left encoded."""

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None,
        image_key: str,
        caption_key: str,
        caption_template: str,
    ):
        builder = _open_builder(name, data_dir)
        features = builder.info.features
        caption_feature = _caption_feature(features, caption_key)
        is_image = image_key in features and isinstance(features[image_key], tfds.features.Image)
        for key, kind, found in (
            (image_key, "image", is_image),
            (caption_key, "text or class label", caption_feature is not None),
        ):
            if not found:
                raise UserError(
                    f"dataset {name!r} has no {kind} feature {key!r}; it has "
                    f"{', '.join(_feature_names(features))} (set data.image_key and "
                    "data.caption_key)"
                )
        try:
            self._records = builder.as_data_source(
                split=split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UserError(
                f"cannot read split {split!r} of dataset {name!r} (splits: "
                f"{', '.join(builder.info.splits)}): {str(error).splitlines()[0]}"
            ) from error
        self._name, self._template = f"{name}/{split}", caption_template
        self._image_key, self._caption_key = image_key, caption_key
        labels = {
            key: list(feature.names)
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel) and feature.names
        }
        self._caption_feature = caption_feature
        self._label_key = "label" if "label" in labels else next(iter(labels), None)
        self.label_names: Sequence[str] = labels.get(self._label_key, ())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return {
            "image": record[self._image_key],
            "captions": self._captions_of(record),
            "label": int(record[self._label_key]) if self._label_key else None,
            "name": f"{self._name}[{index}]",
        }

    def captions(self, index: int) -> list[str]:
        return self._captions_of(self._records[index])

    def _captions_of(self, record: dict[str, Any]) -> list[str]:
        value: Any = record
        for part in self._caption_key.split("/"):
            value = value[part]
        values = [value] if isinstance(value, str | bytes | int | np.integer) else list(value)
        if isinstance(self._caption_feature, tfds.features.ClassLabel):
            texts = [self._caption_feature.int2str(int(v)) for v in values]
        else:
            texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        return [self._template.format(text) for text in texts] or [""]


class FolderSource:
    """Images in a folder (subfolders too) with `metadata.jsonl` or a `.txt` beside each image."""

    label_names: Sequence[str] = ()

    def __init__(self, folder: pathlib.Path, split: str, holdout_share: float, template: str):
        if split not in ("train", "test"):
            raise UserError(f"a data folder has the splits train and test, not {split!r}")
        pairs = _split(folder, split, holdout_share)
        if not pairs:
            raise UserError(
                f"data folder {folder} has no captioned images for split {split!r}: expected "
                "image files with a metadata.jsonl (file_name, text) or a .txt beside each"
            )
        self._template = template
        self._paths = [path for path, _ in pairs]
        self._captions = [caption for _, caption in pairs]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        return {
            "image": data,
            "captions": self.captions(index),
            "label": None,
            "name": str(path),
        }

    def captions(self, index: int) -> list[str]:
        return [self._template.format(caption) for caption in self._captions[index]]


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def _captions(folder: pathlib.Path) -> list[tuple[pathlib.Path, list[str]]]:
    """Image paths with their captions, sorted by path."""
    tables = sorted(folder.rglob("metadata.jsonl"))
    if tables:
        pairs = [pair for table in tables for pair in _read_table(table)]
        listed = {path for path, _ in pairs}
        unlisted = [path for path in _image_files(folder) if path not in listed]
        if unlisted:
            logging.warning(
                "%d images in %s are in no metadata.jsonl and not used, the first is %s",
                *(len(unlisted), folder, unlisted[0].relative_to(folder)),
            )
        return sorted(pairs, key=lambda pair: pair[0])
    pairs, without = [], []
    for path in _image_files(folder):
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                pairs.append((path, [text.read_text("utf-8").strip()]))
            except UnicodeDecodeError as error:
                raise UserError(f"caption file {text} is not UTF-8 text: {error}") from error
        else:
            without.append(path)
    if without:
        raise UserError(
            f"{len(without)} of {len(pairs) + len(without)} images in {folder} have no caption, "
            f"the first is {without[0].relative_to(folder)}: expected {without[0].stem}.txt "
            "beside it, or a metadata.jsonl"
        )
    return pairs


def _read_table(table: pathlib.Path) -> list[tuple[pathlib.Path, list[str]]]:
    """Rows of a `metadata.jsonl`, checked."""
    root, pairs = table.parent.resolve(), []
    try:
        lines = table.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not a JSON object: {error}") from error
        columns = list(row) if isinstance(row, dict) else [type(row).__name__]
        missing = [column for column in CAPTION_COLUMNS if column not in columns]
        if missing:
            raise UserError(
                f"{where}: no column {' and '.join(missing)}; found {', '.join(columns)}, "
                f"expected {', '.join(CAPTION_COLUMNS)}"
            )
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: text must be a string or a list of strings")
        path = table.parent / str(row["file_name"])
        try:
            inside, exists = path.resolve().is_relative_to(root), path.is_file()
        except (OSError, ValueError):  # too long a name, or one with a zero byte
            inside, exists = True, False
        if not inside:
            raise UserError(f"{where}: file_name {row['file_name']!r} leads out of {table.parent}")
        if not exists:
            raise UserError(f"{where}: image {row['file_name']!r} does not exist in {table.parent}")
        pairs.append((path, texts))
    return pairs


def _split(
    folder: pathlib.Path, split: str, holdout_share: float
) -> list[tuple[pathlib.Path, list[str]]]:
    """The images of a split: a subfolder's, or a share by file name where there is none for it."""
    train, test = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (("train",), ("test", "validation", "valid", "val"))
    )
    if test is not None:
        if split == "test":
            return _captions(test)
        if train is not None:
            return _captions(train)
        return [pair for pair in _captions(folder) if not pair[0].is_relative_to(test)]
    root = train or folder
    pairs = _captions(root)

    def is_test(path: pathlib.Path) -> bool:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        return int.from_bytes(digest[:8], "big") < holdout_share * 2**64

    # By name, so that adding images moves none; a folder too small for its share gives its first.
    held_out = {path for path, _ in pairs if is_test(path)} or {path for path, _ in pairs[:1]}
    return [pair for pair in pairs if (pair[0] in held_out) == (split == "test")]
