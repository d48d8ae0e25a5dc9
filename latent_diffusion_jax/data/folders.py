"""A folder of images as a source: its splits, and captions in `metadata.jsonl` or `.txt` files."""

import errno
import hashlib
import heapq
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from latent_diffusion_jax.data import identity
from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.runtime import files, images
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import check_text, escaped

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TRAIN, TEST = "train", ("test", "validation", "valid", "val")  # subfolders that are splits
CAPTION_COLUMNS = ("file_name", "text")
MAX_CAPTION = 2**20  # bytes of a .txt file, characters in a metadata.jsonl
MAX_ROW, MAX_TABLE = 2**24, 2**32  # characters of a line of a metadata.jsonl, bytes of all
MAX_DEPTH = 100  # folders one within the other
LOST_AND_FOUND = "lost+found"  # on every disk of Linux', and for its administrator alone
SHOWN = 200  # characters of what a table has in place of the columns that it should have
# What is the matter with one file. All else (EIO, ESTALE, EMFILE, ...) may be over soon.
FILE_ERRORS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)


class FolderSource:
    """Images in a folder (subfolders too) with `metadata.jsonl` or a `.txt` beside each image.

    Not `captioned`, all images are used and have the caption "". Their labels are then the
    subfolders that they lie in, where there are two or more and no image lies beside them.

    Links are followed, as large data are often put together of links; a folder that is reached in
    several ways is read once. What a table names must be in the folder it is in, by its real path
    too: tables are others' texts. An image in several rows is one image with all their captions.
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
        self._root, self._split = root, split
        self._template = template if captioned else "{}"
        self._paths = [path for path, _ in pairs]
        self._captions = [caption for _, caption in pairs]
        self.label_names: Sequence[str] = () if captioned else _classes(folder)
        self._labels = _labels(self._paths, root, self.label_names)
        if not self._labels:
            self.label_names = ()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def identity(self) -> str:
        """Which images these are, in which order; see `sources.Source`."""
        start = len(str(self._root / "x")) - 1  # `relative_to` is slow for a million
        names = (str(path)[start:] for path in self._paths)
        return identity.digest(itertools.chain([self._split], names))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            data = _read_image(path)
        except ValueError as error:
            raise RecordError(str(path), str(error)) from error
        return {
            "image": data,
            "captions": self.captions(index),
            "label": self._labels[index] if self._labels else None,
            "name": str(path),
        }

    def captions(self, index: int) -> list[str]:
        return [self._template.format(caption) for caption in self._captions[index]]


def _read_image(path: pathlib.Path) -> bytes:
    """What an image file holds.

    Raises:
      OSError: the folder is not there, or something is the matter that may be over soon.
      ValueError: there is something wrong with this file alone, and still at a second try: a mount
        may be away at the first one and back when its folder is looked at.
    """
    try:
        return images.read_bytes(path)
    except OSError as error:
        if error.errno not in FILE_ERRORS or not _has_files(path.parent):
            raise
    try:
        return images.read_bytes(path)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        raise ValueError(error.strerror) from error


def _has_files(folder: pathlib.Path) -> bool:
    """Whether there is something in a folder: a mount's is empty, or gone, when that is away."""
    try:
        return any(path.exists() for path in folder.iterdir())
    except OSError:
        return False


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files in a folder and its subfolders, those that are links too.

    Each real folder is read once, under its own path where that is in `root`, else under the first
    link's in the alphabet: links can double the paths to it at every level.

    Raises:
      UserError: a folder cannot be read, whose images would be missing without a word, or lies too
        deep.
    """
    seen: set[str] = set()  # by their real paths: on some mounts inodes are no identity
    folders = [(root, os.path.realpath(root))]
    links: list[pathlib.Path] = []  # a heap: the smallest first
    twice: list[pathlib.Path] = []
    while folders or links:
        if folders:
            folder, real = folders.pop()
        else:
            folder = heapq.heappop(links)
            real = os.path.realpath(folder)
        if real in seen:
            twice.append(folder)
            continue
        seen.add(real)
        below = folder.relative_to(root)
        if len(below.parts) > MAX_DEPTH:
            raise UserError(
                f"data folder {root} has over {MAX_DEPTH} folders one within the other: "
                f"{escaped(str(below))[:SHOWN]}..."
            )
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            if folder.name == LOST_AND_FOUND and error.errno in (errno.EACCES, errno.EPERM):
                continue
            raise UserError(f"cannot read data folder {folder}: {error.strerror}") from error
        for entry in found:
            path = folder / entry.name
            if not _is_folder(entry):
                yield path
            elif entry.is_symlink():
                heapq.heappush(links, path)
            else:
                folders.append((path, os.path.join(real, entry.name)))
    if twice:
        logging.warning(
            "%d folders in %s, %s the first, are read once, under their other names",
            *(len(twice), root, escaped(str(min(twice).relative_to(root)))),
        )


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _image_files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The image files of some; where there are none, the arrays (.npy)."""
    found = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    return found or [path for path in paths if path.suffix.lower() == ".npy"]


def _captions(folder: pathlib.Path, captioned: bool) -> list[tuple[pathlib.Path, list[str]]]:
    """Image paths with their captions, sorted by path."""
    paths = sorted(_files(folder))
    if not captioned:
        return [(path, [""]) for path in _image_files(paths)]
    tables = [path for path in paths if path.name == "metadata.jsonl"]
    if tables:
        listed: dict[pathlib.Path, list[str]] = {}
        for table in tables:
            for path, texts in _rows(table):
                listed.setdefault(path, []).extend(texts)
        unlisted = [path for path in _image_files(paths) if path not in listed]
        if unlisted:
            logging.warning(
                "%d images in %s are in no metadata.jsonl and not used, the first is %s",
                *(len(unlisted), folder, unlisted[0].relative_to(folder)),
            )
        return sorted(listed.items())
    pairs, without = [], []
    for path in _image_files(paths):
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                pairs.append((path, [files.read_text(text, MAX_CAPTION).strip()]))
            except UnicodeDecodeError as error:
                raise UserError(f"caption file {text} is not UTF-8 text: {error}") from error
            except OSError as error:
                raise UserError(f"cannot read caption file {text}: {error.strerror}") from error
            except ValueError as error:
                raise UserError(f"cannot read caption file {text}: {error}") from error
            check_text(pairs[-1][1][0], f"caption file {text}")
        else:
            without.append(path)
    if without:
        raise UserError(
            f"{len(without)} of {len(pairs) + len(without)} images in {folder} have no caption, "
            f"the first is {escaped(str(without[0].relative_to(folder)))}: expected "
            f"{escaped(without[0].stem)}.txt beside it, or a metadata.jsonl (data.caption_key='' "
            "is for images without captions, and models without prompts)"
        )
    return pairs


def _is_inside(path: pathlib.Path, root: pathlib.Path) -> bool:
    return pathlib.Path(os.path.realpath(path)).is_relative_to(root)


def _lines(table: pathlib.Path) -> Iterator[str]:
    try:
        files.check_ordinary(table, MAX_TABLE)
        with table.open(encoding="utf-8-sig") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_ROW + 1)
                if len(line) > MAX_ROW:
                    raise ValueError(f"line {number} has more than {MAX_ROW} characters")
                if not line:
                    return
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read {table}: {error}") from error


def _rows(table: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Rows of a `metadata.jsonl`, checked."""
    root = pathlib.Path(os.path.realpath(table.parent))
    for number, line in enumerate(_lines(table), 1):
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
                f"{where}: no column {' and '.join(missing)}; found "
                f"{escaped(', '.join(columns))[:SHOWN]}, expected {', '.join(CAPTION_COLUMNS)}"
            )
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: text must be a string or a list of strings")
        for text in texts:
            if len(text) > MAX_CAPTION:
                raise UserError(f"{where}: text has more than {MAX_CAPTION} characters")
            check_text(text, f"{where}: text")
        name = pathlib.Path(str(row["file_name"]))
        path = table.parent / name
        try:
            inside = not name.is_absolute() and ".." not in name.parts and _is_inside(path, root)
            exists = path.is_file()
        except (OSError, ValueError):  # too long a name, or one with a zero byte
            inside, exists = True, False
        if not inside:
            raise UserError(f"{where}: file_name {row['file_name']!r} leads out of {table.parent}")
        if not exists:
            raise UserError(f"{where}: image {row['file_name']!r} does not exist in {table.parent}")
        yield path, texts


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
        name = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(name).digest()
        return int.from_bytes(digest[:8], "big") < holdout_share * 2**64

    # By name, so that adding images moves none; a folder too small for its share gives its first.
    held_out = {path for path, _ in pairs if is_test(path)} or {path for path, _ in pairs[:1]}
    return root, [pair for pair in pairs if (pair[0] in held_out) == (split == "test")]
