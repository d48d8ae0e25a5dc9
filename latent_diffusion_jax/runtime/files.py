"""Files of users: what is no file, or far too large, is refused before it is read."""

import errno
import os
import pathlib
import stat


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
