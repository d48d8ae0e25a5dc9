"""One run at a time in a folder: a second one would clear away what the first is saving."""

import contextlib
import errno
import fcntl
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator

from absl import logging

from latent_diffusion_jax.runtime import processes, stopping
from latent_diffusion_jax.runtime.errors import StorageError

FILE = "lock"
RUN = "config.json"  # that the folder of a run has
SECONDS = 90.0  # for which a run that is ending, or whose host is gone, is waited for
SEEN_SECONDS = 90.0  # in which all hosts see a new file; some look a minute later
TRIES = 5  # to read it, a second apart
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[str]:
    """The block has the folder to itself; where the file system has no locks, nothing is sure.

    A lock ends with its process, however that ends.

    Yields:
      Text that is in the folder's file `FILE` as long as it is this process'.

    Raises:
      StorageError: another process still has it after `SECONDS`, or it cannot be written.
    """
    text = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n"
    start, told = time.monotonic(), False
    while True:
        try:
            file = (folder / FILE).open("a+")
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in TAKEN:
                    if time.monotonic() - start >= SECONDS or stopping.asked():
                        raise StorageError(
                            f"another run is at work in {folder} ({_of(folder)}): wait for it, or "
                            "stop it"
                        ) from error
                    if not told:
                        logging.warning("another run is at work in %s: waiting for its end", folder)
                    told = True
                    time.sleep(0.2)
                    continue
            try:
                file.truncate(0)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                reason = error.strerror or error
                raise StorageError(f"cannot write to {folder}: {reason}") from error
            if _is_there(folder, text):
                yield text
                return
        # The file that was opened has been deleted meanwhile.
        if time.monotonic() - start >= SECONDS:
            raise StorageError(f"cannot write to {folder}: {FILE} in it is not what was written")
        time.sleep(0.2)


def _of(folder: pathlib.Path) -> str:
    """Whose a folder is."""
    try:
        host, process, _ = (folder / FILE).read_text().split()
    except (OSError, ValueError):
        return "of whom nothing is known"
    return f"process {process} on {host}"


def _is_there(folder: pathlib.Path, text: str) -> bool:
    for left in reversed(range(TRIES)):
        try:
            return (folder / FILE).read_text() == text
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # disks of other machines are away for a moment
            if not left:
                raise
            time.sleep(1.0)
    return False


def _remove_if_empty(folder: pathlib.Path, text: str) -> None:
    """Removes a folder where nothing came of the run that has it."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [FILE] and _is_there(folder, text):
            (folder / FILE).unlink()
            folder.rmdir()


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """`alone_in` for a run of one or several processes, which all have to see the folder.

    Yields:
      What raises StorageError where the folder is not that of this run any more.

    Raises:
      StorageError: as `alone_in` does; or a process sees another folder.
    """
    first = processes.process_index() == 0
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(alone_in(folder)) if first else ""
        if first:
            stack.callback(_remove_if_empty, folder, own)
        text = processes.from_the_first("lock", own)
        until = time.monotonic() + SEEN_SECONDS
        while not _is_there(folder, text):
            if time.monotonic() > until:
                raise StorageError(
                    f"{folder} is not the folder that process 0 has there: the workdir must be one "
                    "that all processes see"
                )
            time.sleep(0.5)

        def check() -> None:
            nonlocal text
            try:
                if not first or _is_there(folder, text):
                    return
                if not (folder / FILE).exists() and (folder / RUN).exists():  # somebody tidies up
                    logging.warning("%s was deleted, and is written anew", folder / FILE)
                    text = stack.enter_context(alone_in(folder))
                    return
            except OSError as error:
                raise StorageError(f"cannot read {folder}: {error.strerror or error}") from error
            raise StorageError(
                f"{folder} is not that of this run any more: it was removed, moved or taken by "
                "another one; nothing is written to it"
            )

        yield check
