"""Where examples come from: a TFDS dataset by name, or a folder of images with captions.

A source is a random-access sequence of records `{"image": encoded bytes or an array, "captions":
[str, ...], "label": int or None, "name": what to call it in messages}`, with `label_names` beside
it. A record has at least one caption, "" where the data has none for it.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from latent_diffusion_jax.data import digits, identity, photos
from latent_diffusion_jax.data.folders import FolderSource
from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.data.record_files import RecordFiles
from latent_diffusion_jax.runtime import files, processes
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import check_text, escaped, first_line

BUNDLED: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {  # prepared on first use
    "handwritten_digits": digits.HandwrittenDigits,
    "bundled_photos": photos.BundledPhotos,
}
INFO, FEATURES = "dataset_info.json", "features.json"  # what TFDS says of a prepared dataset
MAX_INFO, SHOWN = 2**26, 300  # bytes of each; characters of what is the matter with one
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last of older versions
KNOWN_CLASSES = "tensorflow_datasets.core.features."


class Source(Protocol):
    """Random access to records; see the module's docstring.

    Where a record is damaged, it raises a RecordError; where the source is not there any more, an
    OSError.
    """

    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def identity(self) -> str:
        """Which records these are, in which order: the same on all processes; reads no record."""
        ...

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
        `handwritten_digits` and `bundled_photos` are prepared on first use.
      split: a TFDS split (`train[:90%]` works), or `train` or `test` of a folder.
      data_dir: where TFDS keeps its datasets; None is its default.
      image_key: TFDS feature with the image: an Image, or a Tensor of uint8 [H, W, C].
      caption_key: TFDS feature with the caption: text, a sequence of texts, or a class label;
        `captions/text` for the feature `text` within `captions`. "" is for images without
        captions, in a folder too: all captions are "".
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
        folder, captioned = pathlib.Path(name).expanduser(), bool(caption_key)
        return FolderSource(folder, split, holdout_share, caption_template, captioned)
    if name.startswith((".", "/", "~")):
        raise UserError(f"data folder {name} does not exist")
    return TfdsSource(name, split, data_dir, image_key, caption_key, caption_template)


def _open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """A builder whose data is prepared in a format with random access."""
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if name in BUNDLED:

        def bundled() -> tfds.core.DatasetBuilder:
            with _reading(root / name / str(BUNDLED[name].VERSION) / INFO):
                return BUNDLED[name](data_dir=data_dir, file_format="array_record")

        tfds.disable_progress_bar()
        with (
            processes.first_one_first(f"prepare {name}"),
            contextlib.redirect_stdout(io.StringIO()),  # TFDS speaks of a download
        ):
            builder = bundled()
            try:
                builder.download_and_prepare()
            except OSError:  # perhaps another run was faster
                builder = bundled()
                if not builder.is_prepared():
                    raise
        return builder
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
    return _prepared(folders[-1])


def _prepared(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared dataset's folder, by its files alone.

    Raises:
      UserError: one of them is damaged, or would have code imported: TFDS takes the classes of
        features from wherever the file says, the working directory too.
    """
    with _reading(folder / FEATURES):
        features = json.loads(files.read_text(folder / FEATURES, MAX_INFO))
        _check_classes(features)
        for path in folder.glob("*.txt"):  # names of classes, which come with the features
            files.check_ordinary(path, MAX_INFO)
        found = tfds.features.FeatureConnector.from_config(folder)
        if not isinstance(found, tfds.features.FeaturesDict):
            raise ValueError(f"it is of a {type(found).__name__}, not of a FeaturesDict")
    with _reading(folder / INFO):
        info = json.loads(files.read_text(folder / INFO, MAX_INFO))
        _check_classes(info.get("features"))
        return tfds.builder_from_directory(folder)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # of any kind, by what TFDS makes of it
        raise UserError(f"cannot use {path}: {escaped(first_line(error))[:SHOWN]}") from error


def _check_classes(value: Any) -> None:
    """Raises ValueError where a description of features names a class that is not TFDS's own."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):  # some are JSON within JSON
            _check_classes(json.loads(value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            named = key in CLASS_KEYS and isinstance(inner, str)
            if named and not inner.startswith(KNOWN_CLASSES):
                raise ValueError(f"it names the class {inner!r}, not one of {KNOWN_CLASSES}*")
            _check_classes(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_classes(inner)


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


def _is_image(feature: Any) -> bool:
    """Whether a feature holds images, encoded or as arrays."""
    if isinstance(feature, tfds.features.Image):
        return True
    if not isinstance(feature, tfds.features.Tensor):
        return False
    return feature.np_dtype == np.uint8 and len(feature.shape) in (2, 3)


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
    """One split of a prepared TFDS dataset, images left encoded (arrays come as they are)."""

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
        caption_feature = _caption_feature(features, caption_key) if caption_key else None
        is_image = image_key in features and _is_image(features[image_key])
        for key, kind, found in (
            (image_key, "image", is_image),
            (caption_key, "text or class label", not caption_key or caption_feature is not None),
        ):
            if not found:
                raise UserError(
                    f"dataset {name!r} has no {kind} feature {key!r}; it has "
                    f"{', '.join(_feature_names(features))} (set data.image_key, to an Image or a "
                    "Tensor of uint8 [H, W, C], and data.caption_key, '' for no captions)"
                )
        encoded = isinstance(features[image_key], tfds.features.Image)
        decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None
        try:
            records = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UserError(
                f"cannot read split {split!r} of dataset {name!r} (splits: "
                f"{', '.join(builder.info.splits)}): {str(error).splitlines()[0]}"
            ) from error
        shards = [str(path) for path in builder.info.splits[split].filepaths]
        self._records = RecordFiles(records, dataclasses.replace, shards)
        self._full_name, self._split = builder.info.full_name, split
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

    @property
    def identity(self) -> str:
        return identity.digest([self._full_name, self._split, str(len(self))])

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        return {
            "image": record[self._image_key],
            "captions": self._captions_of(record, index),
            "label": int(record[self._label_key]) if self._label_key else None,
            "name": f"{self._name}[{index}]",
        }

    def captions(self, index: int) -> list[str]:
        return self._captions_of(self._record(index), index) if self._caption_key else [""]

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except OSError:
            raise
        except Exception as error:  # of any kind, by the format
            raise RecordError(f"{self._name}[{index}]", first_line(error)) from error

    def _captions_of(self, record: dict[str, Any], index: int) -> list[str]:
        if not self._caption_key:
            return [""]
        value: Any = record
        for part in self._caption_key.split("/"):
            value = value[part]
        values = [value] if isinstance(value, str | bytes | int | np.integer) else list(value)
        if isinstance(self._caption_feature, tfds.features.ClassLabel):
            texts = [self._caption_feature.int2str(int(v)) for v in values]
        else:
            texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        try:
            for text in texts:
                check_text(str(text), "its caption")
        except UserError as error:
            raise RecordError(f"{self._name}[{index}]", str(error)) from error
        return [self._template.format(text) for text in texts] or [""]
