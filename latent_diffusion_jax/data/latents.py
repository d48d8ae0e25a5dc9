"""Datasets encoded once: posteriors' moments with captions and labels, as ArrayRecord.

A folder of latents has `latents.json`, which says what they are of, and for each of the splits
`train` and `test` files `train-00000-of-00012.array_record`. A record is the length of its header
in bytes (uint32), the header (JSON with `captions`, `label` and `name`) and the moments, C order;
all numbers are little-endian. Their shape is [crops, flips, h, w, c]: crops of the image (the
first is the centre, where there is one alone), each as it is and, with two flips, mirrored.
"""

import contextlib
import copy
import json
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from latent_diffusion_jax.data import identity
from latent_diffusion_jax.data.patience import Patience
from latent_diffusion_jax.data.record_files import RecordFiles
from latent_diffusion_jax.runtime import files
from latent_diffusion_jax.runtime.errors import StorageError, UserError
from latent_diffusion_jax.runtime.texts import first_line

INDEX_FILE = "latents.json"
MAX_INDEX = 2**26  # bytes of it
FORMAT = 1
SPLITS = ("train", "test")
DTYPES = ("float16", "float32")  # the first where nothing is said
# One record a group, for random access. Noise does not shrink: compressed, records are 8 % smaller
# and take four times as long to read.
WRITER_OPTIONS = "group_size:1,uncompressed"


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """A record with `moments`, `captions`, `label` and `name` as the module's docstring says."""
    header = json.dumps({key: record[key] for key in ("captions", "label", "name")}).encode()
    moments = np.ascontiguousarray(record["moments"])
    moments = moments.astype(moments.dtype.newbyteorder("<"), copy=False)
    return struct.pack("<I", len(header)) + header + moments.tobytes()


def from_bytes(data: bytes, shape: Sequence[int], dtype: str) -> dict[str, Any]:
    """The record that `to_bytes` wrote.

    Raises:
      ValueError: it is damaged, or its moments have another shape or dtype.
    """
    (length,) = struct.unpack_from("<I", data) if len(data) >= 4 else (0,)
    header = json.loads(data[4 : 4 + length])
    moments = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=4 + length)
    return header | {"moments": moments.astype(dtype, copy=False).reshape(shape)}


def shard_path(folder: pathlib.Path, split: str, index: int, count: int) -> pathlib.Path:
    return folder / f"{split}-{index:05d}-of-{count:05d}.array_record"


class ShardWriter:
    """Writes one file under another name and renames it when it is whole."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._partial = path.with_suffix(".partial")
        with self._writing():
            self._writer = ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises StorageError where it cannot, as all methods do."""
        with self._writing():
            self._writer.write(to_bytes(record))

    def close(self, *, whole: bool) -> None:
        """Ends the file; one that is not whole is deleted, whatever is the matter with it."""
        if not whole:
            with contextlib.suppress(OSError, RuntimeError):
                self._writer.close()
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)
            return
        with self._writing():
            self._writer.close()
            self._partial.replace(self._path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # the latter from the writer's own code
            reason = getattr(error, "strerror", None) or first_line(error)
            raise StorageError(f"cannot write latents {self._path}: {reason}") from error


def count_records(path: pathlib.Path) -> int:
    """Number of records in a file.

    Raises:
      UserError: it is damaged.
    """
    try:
        files.check_ordinary(path)
        reader = ArrayRecordReader(str(path))
        try:
            return int(reader.num_records())
        finally:
            reader.close()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"latents {path} are damaged ({first_line(error)}); delete this file and encode again"
        ) from error


def read_index(folder: pathlib.Path) -> dict[str, Any] | None:
    """What `latents.json` says; None where there is none.

    Raises:
      UserError: it is damaged, or of another version of the format.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(files.read_text(path, MAX_INDEX))
        version = index["format"]
        if version == FORMAT:
            _check_index(index)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}, this version reads {FORMAT}")
    return index


def _check_index(index: Mapping[str, Any]) -> None:
    """Raises ValueError where something that is needed is missing, or is something else."""

    def check(where: str, value: Any, valid: bool) -> None:
        if not valid:
            raise ValueError(f"{where} is {str(value)[:80]}")

    def is_sizes(value: Any, length: int) -> bool:
        whole = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        return whole and length in (0, len(value))

    for key, kind in {"done": bool, "image_size": int, "label_names": list, "splits": dict,
                      "autoencoder": dict}.items():  # fmt: skip
        check(key, index.get(key), isinstance(index.get(key), kind))
    names = index["label_names"]
    check("label_names", names, all(isinstance(name, str) for name in names))
    check("dtype", index.get("dtype"), index.get("dtype") in DTYPES)
    shape, encoder = index.get("moments_shape"), index["autoencoder"]
    check("moments_shape", shape, is_sizes(shape, 3))
    for key in ("fingerprint", "source"):
        check(f"autoencoder.{key}", encoder.get(key), isinstance(encoder.get(key), str))
    for name in SPLITS:
        split = index["splits"].get(name)
        check(f"splits.{name}", split, isinstance(split, dict))
        check(f"splits.{name}.views", split.get("views"), is_sizes(split.get("views"), 2))
        if index["done"]:
            records = split.get("records")
            check(f"splits.{name}.records", records, is_sizes(records, 0))


class LatentSource:
    """One split of a folder of latents: random access to records, with `moments` in the images'
    place, as `to_bytes` takes them. It is used as a `pipeline.DecodedSource` is.

    Attributes:
      index: contents of `latents.json`.
      label_names: names of the labels.
      damaged: none; latents of damaged images are not written.

    Raises:
      UserError: the folder is not there, not finished or damaged, found when it is opened; or a
        record is, found when it is read.
      DataError: the folder is not there any more when a record is read.
    """

    def __init__(self, folder: str | pathlib.Path, split: str, retry_seconds: float = 0.0):
        """`retry_seconds`: how long to wait where the folder is not there any more."""
        self._patience = Patience(retry_seconds)
        self._folder = pathlib.Path(folder).expanduser()
        index = read_index(self._folder)
        if index is None:
            raise UserError(
                f"{self._folder} holds no latents (there is no {INDEX_FILE}); write them with "
                "python -m latent_diffusion_jax.encode"
            )
        if not index["done"]:
            raise UserError(
                f"the latents in {self._folder} are not finished; the command that began them "
                "(python -m latent_diffusion_jax.encode) goes on where it was"
            )
        self.index: dict[str, Any] = index
        self.label_names: Sequence[str] = list(index["label_names"])
        self.damaged: dict[int, str] = {}
        self._dtype, self._shape = index["dtype"], (*index["splits"][split]["views"],
                                                    *index["moments_shape"])  # fmt: skip
        counts = index["splits"][split]["records"]
        paths = [shard_path(self._folder, split, i, len(counts)) for i in range(len(counts))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise UserError(
                f"the latents in {self._folder} lack {len(missing)} of {len(paths)} files of "
                f"{split!r}, the first is {missing[0]}"
            )
        for path, count in zip(paths, counts, strict=True):
            if (found := count_records(path)) != count:
                raise UserError(f"latents {path} have {found} records, {count} were written")
        shards = [str(p) for p, count in zip(paths, counts, strict=True) if count]
        if not shards:
            raise UserError(f"split {split!r} of the latents in {self._folder} is empty")
        records = grain.sources.ArrayRecordDataSource(shards)
        self._records = RecordFiles(records, copy.copy, shards)  # a copy opens its own
        self._split = split

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._patience.read(lambda: self._read(index))

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return from_bytes(self._records[index], self._shape, self._dtype)
        except OSError:
            raise
        except Exception as error:  # of any kind
            raise UserError(
                f"record {index} of the split {self._split!r} of the latents in {self._folder} is "
                f"damaged ({first_line(error)}); delete that folder and encode again"
            ) from error

    def captions(self, index: int) -> list[str]:
        return self[index]["captions"]

    @property
    def identity(self) -> str:
        """Which records these are, in which order; see `sources.Source`."""
        encoder = self.index.get("autoencoder", {}).get("fingerprint")
        about = [encoder, self.index.get("data"), self.index["splits"][self._split]]
        return identity.digest([self._split, json.dumps(about, sort_keys=True)])

    @property
    def records(self) -> "LatentSource":
        """The source itself: no image is to be decoded."""
        return self


def latent_example(
    record: Mapping[str, Any], rng: np.random.Generator | None, random_flip: bool
) -> np.ndarray:
    """A record's moments [h, w, c] of one crop, mirrored or not; without `rng` the first as it is.

    Draws from `rng` as `pipeline.image_example` does for an image that has one crop alone.
    """
    views = record["moments"]
    if rng is None:
        return views[0, 0]
    crop = int(rng.integers(len(views)))
    return views[crop, int(random_flip and rng.random() < 0.5)]


def check_use(index: Mapping[str, Any], where: str, image_size: int, random_flip: bool) -> None:
    """Raises UserError where latents were not made for what they are to be used for.

    Args:
      index: contents of `latents.json`.
      where: the latents are.
      image_size: pixels of the images that are to be drawn.
      random_flip: whether examples are mirrored half of the time.
    """
    if index["image_size"] != image_size:
        raise UserError(
            f"the latents in {where} are of images of {index['image_size']} pixels, "
            f"data.image_size={image_size}; encode again, or change the config"
        )
    if random_flip and index["splits"]["train"]["views"][1] < 2:
        raise UserError(
            f"data.random_flip=True, but the latents in {where} are of no mirrored images; encode "
            "again with data.random_flip=True, or turn it off"
        )
