"""Files of users: what cannot be read, or written, is refused before any work is done."""

import contextlib
import errno
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import first_line


def check_ordinary(path: pathlib.Path, maximum: int | None = None) -> None:
    """Looks whether a file can be read to its end: of a pipe, reading would wait for ever.

    Args:
      path: the file.
      maximum: bytes that it may have; None: any number.

    Raises:
      OSError: it is not there, or is a folder.
      ValueError: it is a pipe, a device, or larger.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no ordinary file")
    if maximum is not None and found.st_size > maximum:
        mib = -(-found.st_size >> 20)  # rounded up
        raise ValueError(f"its {mib} MiB are more than the {maximum >> 20} allowed")


def read_bytes(path: pathlib.Path, maximum: int) -> bytes:
    """What a file of at most so many bytes holds; raises what `check_ordinary` does."""
    check_ordinary(path, maximum)
    return path.read_bytes()


def read_text(path: pathlib.Path, maximum: int) -> str:
    """`read_bytes` as UTF-8 text, without the mark (BOM) that some editors begin it with.

    A line ends with a line feed alone, whatever it does in the file. Raises UnicodeDecodeError too.
    """
    text = read_bytes(path, maximum).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_folder(folder: pathlib.Path, flag: str) -> None:
    """Makes a folder, and looks whether files can be written to it, before work is done for them.

    Args:
      folder: it.
      flag: that names it, as typed.

    Raises:
      UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {flag}: {error.strerror}") from error


def check_file(path: pathlib.Path, flag: str) -> None:
    """`check_folder` of the folder that a file is to be written to, and the file itself."""
    check_folder(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {flag}: the file that is there may not be changed")


@contextlib.contextmanager
def unusable(path: str | pathlib.Path) -> Iterator[None]:
    """Turns whatever others' files make a reader of them raise into a UserError with the path.

    They can hold anything: what is known to happen has messages of its own, this is for the rest.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot use {path}: {reason:.300}") from error
