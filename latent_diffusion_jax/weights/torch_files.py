"""Tensors in files that `torch.save` wrote, read without Torch and without executing the pickle.

Both of Torch's formats are known: the zip archive (1.6 and later) and the older stream of pickles.
In either a pickle says which tensors there are and where in which storage they lie, see
`weights.torch_pickles`. What would take more memory than the file can be meant to is refused before
it does.
"""

import functools
import io
import math
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import IO, Any, BinaryIO

import numpy as np

from latent_diffusion_jax.weights import torch_pickles
from latent_diffusion_jax.weights.torch_pickles import FormatError, Tensor

ZIP_MAGIC = b"PK\x03\x04"
ZIP_HEADER = 30  # bytes before each member's name, whose length is in the last four
CHUNK = 1 << 20  # bytes of an archive that are checked at once
MAX_GROWTH = 8  # times the file's bytes that its tensors may take
MIN_GROWTH = 64 << 20  # bytes that they may take in any case
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


def is_torch(head: bytes) -> bool:
    """Whether a file that starts with these 16 bytes may be one of Torch's."""
    # A safetensors file has its header's size first, which may look like a pickle, then a {.
    return head.startswith(ZIP_MAGIC) or (head[:1] == b"\x80" and head[8:9] != b"{")


def read(path: pathlib.Path, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Tensors by name, those of the dict at the top or of its `state_dict`.

    Args:
      path: the file.
      skip: beginnings of names whose tensors are not read.

    Raises:
      FormatError: the file is none of Torch's.
      Exception: of any kind, where it is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) == ZIP_MAGIC:
            with zipfile.ZipFile(file) as archive:
                return _read_zip(archive, mapped(path), skip)
        file.seek(0)
        return _read_legacy(file, mapped(path), skip)


def _check_growth(what: str, size: int, data: np.ndarray) -> None:
    """Raises FormatError where something takes so many bytes, of which the file has too few."""
    if size > max(MIN_GROWTH, MAX_GROWTH * len(data)):
        raise FormatError(f"{what} would take {size} bytes, and the file has only {len(data)}")


def mapped(path: pathlib.Path) -> np.ndarray:
    """The bytes of a file, uint8 and read-only, read as they are used."""
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _read_zip(
    archive: zipfile.ZipFile, data: np.ndarray, skip: tuple[str, ...]
) -> dict[str, np.ndarray]:
    names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(names) != 1:
        raise FormatError("it is a zip archive, but not one that torch.save wrote")
    root = names[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist():
        with _open(archive, root + "byteorder") as member:
            if member.read(len(b"little") + 1) != b"little":
                raise FormatError("its numbers are big-endian")
    if archive.getinfo(names[0]).file_size > torch_pickles.MAX_PICKLE:
        raise FormatError(f"its pickle has more than {torch_pickles.MAX_PICKLE >> 20} MiB")
    pickled = _unpacked(archive, archive.getinfo(names[0]))
    loaded, _ = torch_pickles.load(io.BytesIO(pickled.tobytes()))
    unpacked = 0

    def load(key: str) -> np.ndarray:
        nonlocal unpacked
        info = archive.getinfo(f"{root}data/{key}")
        unpacked += info.file_size  # of parts that are not compressed too: they may overlap
        _check_growth(f"its parts up to {info.filename}", unpacked, data)
        return _member(archive, data, info)

    return _arrays(_tensors(loaded, skip), data, load)


def _member(archive: zipfile.ZipFile, data: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an archive's member, mapped unless they are compressed; they are checked."""
    if info.compress_type != zipfile.ZIP_STORED:
        return _unpacked(archive, info)
    with _open(archive, info.filename) as member:
        while member.read(CHUNK):  # which ends with an error where the sum is wrong
            pass
    end = info.header_offset + ZIP_HEADER
    start = end + int(data[end - 4 : end].view("<u2").sum(dtype=int))
    return data[start : start + info.file_size]


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an archive's member; no more than it says, whatever it unpacks to."""
    content, end = np.empty(info.file_size, np.uint8), 0
    with _open(archive, info.filename) as member:
        while part := member.read(CHUNK):  # `archive.read` would unpack all, and then look
            if end + len(part) > len(content):
                raise FormatError(f"it is damaged: {info.filename} has more bytes than it says")
            content[end : end + len(part)] = np.frombuffer(part, np.uint8)
            end += len(part)
    return content[:end]


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member of an archive. Other ways of packing cannot be unpacked a part at a time."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(f"{name} in it is packed in a way that archives of Torch are not")
    return archive.open(name)


def _read_legacy(file: BinaryIO, data: np.ndarray, skip: tuple[str, ...]) -> dict[str, np.ndarray]:
    if torch_pickles.load(file)[0] != LEGACY_MAGIC or torch_pickles.load(file)[0] != LEGACY_VERSION:
        raise FormatError("it is a pickle, but not one that torch.save wrote")
    system, _ = torch_pickles.load(file)
    if not system.get("little_endian", True):
        raise FormatError("its numbers are big-endian")
    loaded, dtypes = torch_pickles.load(file)
    tensors = _tensors(loaded, skip)
    places = {}
    for key in torch_pickles.load(file)[0]:  # each storage is its size, then its numbers
        size = int.from_bytes(file.read(8), "little", signed=True)
        if size < 0:
            raise FormatError("it is damaged: a storage has a negative size")
        places[str(key)] = file.tell(), size * dtypes[str(key)].itemsize
        file.seek(places[str(key)][1], os.SEEK_CUR)
    end, size = file.tell(), file.seek(0, os.SEEK_END)
    if end > size:
        raise FormatError(f"it is cut short: it has {size} bytes and should have {end}")

    def load(key: str) -> np.ndarray:
        start, size = places[key]
        return data[start : start + size]

    return _arrays(tensors, data, load)


def _tensors(loaded: Any, skip: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors in an unpickled dict or its `state_dict`."""
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise FormatError("it holds no dict of tensors")
    return {
        name: tensor
        for name, tensor in loaded.items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and not name.startswith(skip)
    }


def _arrays(
    tensors: dict[str, Tensor], data: np.ndarray, load: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays (read-only views) of tensors; the bytes of each storage are looked up once."""
    load = functools.cache(load)
    arrays, total = {}, 0
    for name, tensor in tensors.items():
        storage = tensor.storage
        values = load(storage.key).view(storage.dtype)
        if len(values) < storage.first + storage.size:
            raise FormatError(f"it is cut short: the numbers of {name!r} are not all there")
        values = values[storage.first : storage.first + storage.size]
        arrays[name] = _view(name, values, tensor)
        total += math.prod(tensor.shape) * values.itemsize
        _check_growth("its tensors", total, data)
    return arrays


def _view(name: str, values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The part of a storage that is a tensor, never beyond the storage's bounds."""
    steps = [tensor.offset, *tensor.shape, *tensor.strides]
    if not all(isinstance(n, int) and n >= 0 for n in steps):
        raise FormatError(f"tensor {name!r} has no valid shape")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, values.dtype)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if last >= len(values):
        raise FormatError(f"tensor {name!r} reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(
        values[tensor.offset :],
        tensor.shape,
        [stride * values.itemsize for stride in tensor.strides],
        writeable=False,
    )
