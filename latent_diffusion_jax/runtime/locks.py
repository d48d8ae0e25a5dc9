"""One run at a time in a folder: a second one would clear away what the first is saving."""

import contextlib
import errno
import fcntl
import pathlib
import time
from collections.abc import Iterator

from absl import logging

from latent_diffusion_jax.runtime import stopping
from latent_diffusion_jax.runtime.errors import StorageError

FILE = "lock"
SECONDS = 90.0  # for which a run that is ending, or whose host is gone, is waited for
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[None]:
    """The block has the folder to itself; where the file system has no locks, nothing is sure.

    A lock ends with its process, however that ends.

    Raises:
      StorageError: another process still has it after `SECONDS`, or it cannot be written.
    """
    try:
        file = (folder / FILE).open("a")
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in TAKEN:
                    break
                if time.monotonic() - start >= SECONDS or stopping.asked():
                    raise StorageError(
                        f"another run is at work in {folder}: wait for it, or stop it"
                    ) from error
            else:
                break
            if not told:
                logging.warning("another run is at work in %s: waiting for its end", folder)
            told = True
            time.sleep(0.2)
        yield
