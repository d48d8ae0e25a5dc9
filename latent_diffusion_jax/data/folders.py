"""A folder of images as a source: its splits, and captions in `metadata.jsonl` or `.txt` files."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import check_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TRAIN, TEST = "train", ("test", "validation", "valid", "val")  # subfolders that are splits
CAPTION_COLUMNS = ("file_name", "text")


class FolderSource:
    """Images in a folder (subfolders too) with `metadata.jsonl` or a `.txt` beside each image.

    Not `captioned`, all images are used and have the caption "". Their labels are then the
    subfolders that they lie in, where there are two or more and no image lies beside them.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        holdout_share: float,
        template: str,
        captioned: bool = True,
    ):
        if split not in ("train", "test"):
            raise UserError(f"a data folder has the splits train and test, not {split!r}")
        root, pairs = _split(folder, split, holdout_share, captioned)
        if not pairs:
            expected = "image files"
            if captioned:
                expected += " with a metadata.jsonl (file_name, text) or a .txt beside each"
            raise UserError(
                f"data folder {folder} has no {'captioned ' * captioned}images for split "
                f"{split!r}: expected {expected}"
            )
        self._template = template if captioned else "{}"
        self._paths = [path for path, _ in pairs]
        self._captions = [caption for _, caption in pairs]
        self.label_names: Sequence[str] = () if captioned else _classes(folder)
        self._labels = _labels(self._paths, root, self.label_names)
        if not self._labels:
            self.label_names = ()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            data = images.read_bytes(path)
        except ValueError as error:
            raise RecordError(str(path), str(error)) from error
        except OSError as error:
            if _has_files(path.parent):
                raise RecordError(str(path), error.strerror or str(error)) from error
            raise
        return {
            "image": data,
            "captions": self.captions(index),
            "label": self._labels[index] if self._labels else None,
            "name": str(path),
        }

    def captions(self, index: int) -> list[str]:
        return [self._template.format(caption) for caption in self._captions[index]]


def _has_files(folder: pathlib.Path) -> bool:
    """Whether there is something in a folder: a mount's is empty, or gone, when that is away."""
    try:
        return any(path.exists() for path in folder.iterdir())
    except OSError:
        return False


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Image files, sorted; where there are none, the arrays (.npy)."""
    paths = sorted(folder.rglob("*"))
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    return found or [path for path in paths if path.suffix.lower() == ".npy"]


def _captions(folder: pathlib.Path, captioned: bool) -> list[tuple[pathlib.Path, list[str]]]:
    """Image paths with their captions, sorted by path."""
    if not captioned:
        return [(path, [""]) for path in _image_files(folder)]
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
            except OSError as error:
                raise UserError(f"cannot read caption file {text}: {error.strerror}") from error
            check_text(pairs[-1][1][0], f"caption file {text}")
        else:
            without.append(path)
    if without:
        raise UserError(
            f"{len(without)} of {len(pairs) + len(without)} images in {folder} have no caption, "
            f"the first is {without[0].relative_to(folder)}: expected {without[0].stem}.txt "
            "beside it, or a metadata.jsonl (data.caption_key='' is for images without captions)"
        )
    return pairs


def _read_table(table: pathlib.Path) -> list[tuple[pathlib.Path, list[str]]]:
    """Rows of a `metadata.jsonl`, checked."""
    root, pairs = table.parent.resolve(), []
    try:
        lines = table.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # too long a number, too deep a list
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
        for text in texts:
            check_text(text, f"{where}: text")
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


def _classes(folder: pathlib.Path) -> list[str]:
    """Names of the subfolders that stand for classes; none where there are not two."""
    root = folder / TRAIN if (folder / TRAIN).is_dir() else folder
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    names = [name for name in names if name not in TEST and not name.startswith(".")]
    for name in names:
        check_text(name, f"the name of the class folder {name!r} in {root}")
    return names if len(names) > 1 else []


def _labels(
    paths: Sequence[pathlib.Path], root: pathlib.Path, names: Sequence[str]
) -> list[int] | None:
    """Label of each image, by the subfolder of `root`; None where one lies in none.

    Raises:
      UserError: a subfolder is no class of the training images.
    """
    numbers = {name: i for i, name in enumerate(names)}
    parts = [path.relative_to(root).parts for path in paths]
    if not names or any(len(part) < 2 for part in parts):
        return None
    unknown = sorted({part[0] for part in parts} - numbers.keys())
    if unknown:
        raise UserError(
            f"{root} has the class {unknown[0]!r}, which the training images have not: "
            f"{len(numbers)} classes, {names[0]!r} to {names[-1]!r}"
        )
    return [numbers[part[0]] for part in parts]


def _split(
    folder: pathlib.Path, split: str, holdout_share: float, captioned: bool
) -> tuple[pathlib.Path, list[tuple[pathlib.Path, list[str]]]]:
    """The images of a split: a subfolder's, or a share by file name where there is none for it.

    Returns:
      The folder that they lie in, and their paths with captions.
    """
    train, test = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in ((TRAIN,), TEST)
    )
    if test is not None:
        if split == "test":
            return test, _captions(test, captioned)
        if train is not None:
            return train, _captions(train, captioned)
        pairs = _captions(folder, captioned)
        return folder, [pair for pair in pairs if not pair[0].is_relative_to(test)]
    root = train or folder
    pairs = _captions(root, captioned)

    def is_test(path: pathlib.Path) -> bool:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        return int.from_bytes(digest[:8], "big") < holdout_share * 2**64

    # By name, so that adding images moves none; a folder too small for its share gives its first.
    held_out = {path for path, _ in pairs if is_test(path)} or {path for path, _ in pairs[:1]}
    return root, [pair for pair in pairs if (pair[0] in held_out) == (split == "test")]
