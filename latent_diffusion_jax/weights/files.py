"""Files of named tensors: `.safetensors` in and out, Torch's files in."""

import contextlib
import json
import math
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from latent_diffusion_jax.runtime.errors import StorageError, UserError
from latent_diffusion_jax.runtime.files import check_ordinary
from latent_diffusion_jax.runtime.texts import first_line
from latent_diffusion_jax.weights import torch_files
from latent_diffusion_jax.weights.messages import in_short
from latent_diffusion_jax.weights.torch_pickles import FormatError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


def read(
    path: str | pathlib.Path, skip: tuple[str, ...] = (), what: str = "weights"
) -> dict[str, np.ndarray]:
    """Tensors of a file by name, in the file's dtypes and read-only.

    Which format a file has is seen from its contents: safetensors, or Torch's (`.ckpt`, `.pt`,
    `.pth`, `.bin`), of which the pickle is not executed. Where a Torch file has a `state_dict`,
    its tensors are meant.

    The file is mapped into memory: what is not used is not read, and what is used stays there until
    `release`.

    Args:
      path: the file.
      skip: beginnings of names whose tensors are not read.
      what: the file holds, for messages.

    Raises:
      UserError: there is no such file, or it is damaged, cut short or of another kind.
    """
    path = pathlib.Path(path).expanduser()
    try:
        _check_file(path)
        with path.open("rb") as file:
            head = file.read(16)
        if not head:
            raise FormatError("it is empty")
        if torch_files.is_torch(head):
            tensors = torch_files.read(path, skip)
        else:
            tensors = _read_safetensors(path, skip)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except FormatError as error:
        raise UserError(f"cannot read {what} {path}: {in_short(str(error))}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(
            f"cannot read {what} {path}: it is damaged or cut short ({in_short(first_line(error))})"
        ) from error
    return tensors


def _check_file(path: pathlib.Path) -> None:
    try:
        check_ordinary(path)
    except ValueError as error:
        raise FormatError(str(error)) from error


def release(tensor: np.ndarray) -> None:
    """Lets go of the memory that the file of a tensor takes; what is used again is read again.

    Nothing happens where it is of no file that is mapped, or the system knows no such thing.
    """
    base: Any = tensor
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """What a safetensors file's header says of tensors, its free texts, and its size in bytes."""
    unknown = "it is neither a safetensors file nor one that torch.save wrote"
    with path.open("rb") as file:
        head = file.read(9)
        size = int.from_bytes(head[:8], "little")
        total = path.stat().st_size
        if head[8:] != b"{" or size > MAX_HEADER:
            raise FormatError(unknown)
        if 8 + size > total:
            raise FormatError(f"it is cut short: its header of {size} bytes is not all there")
        file.seek(8)
        try:
            header = json.loads(file.read(size), object_pairs_hook=_without_repeats)
        except FormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise FormatError(unknown) from error
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FormatError("it is damaged: its __metadata__ is not of texts")
    return header, texts, size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("it is damaged: its header has a name twice")
    return found


def _read_safetensors(path: pathlib.Path, skip: tuple[str, ...]) -> dict[str, np.ndarray]:
    header, _, size = _header(path)
    total = path.stat().st_size
    expected = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != total:
        reason = "it is cut short" if total < expected else "it is damaged"
        raise FormatError(f"{reason}: it has {total} bytes and should have {expected}")
    _check_places(header)
    data = torch_files.mapped(path)
    tensors = {}
    for name, entry in header.items():
        if name.startswith(skip):
            continue
        if entry["dtype"] not in DTYPES:
            raise FormatError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise FormatError(f"it is damaged: tensor {name!r} has the wrong number of bytes")
        part = data[8 + size + begin : 8 + size + end]
        tensors[name] = part.view(dtype).reshape(shape)
    return tensors


def _check_places(header: Mapping[str, Any]) -> None:
    """Raises FormatError where tensors do not lie one after the other, as the format has them."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, behind = entry["data_offsets"]
        if not (type(begin) is type(behind) is int and begin == end <= behind):
            raise FormatError(f"it is damaged: tensor {name!r} does not follow the one before it")
        end = behind


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """The free texts in a safetensors file's header, by key; none in files of Torch.

    Raises:
      UserError: there is no such file, or its header is damaged.
    """
    path = pathlib.Path(path).expanduser()
    try:
        _check_file(path)
        with path.open("rb") as file:
            if torch_files.is_torch(file.read(16)):
                return {}
        return _header(path)[1]
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from error
    except FormatError as error:
        raise UserError(f"cannot read weights {path}: {in_short(str(error))}") from error


def write(
    path: str | pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, all of it or nothing; makes the folder that it is in.

    Raises:
      StorageError: the file cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    partial = path.with_name(path.name + ".partial")
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(whole, str(partial), dict(metadata) if metadata else None)
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(f"cannot write weights {path}: {reason}") from error
