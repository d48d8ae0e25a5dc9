"""Reading from folders that may go away for a while, such as mounts of other machines' disks."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from latent_diffusion_jax.runtime import stopping
from latent_diffusion_jax.runtime.errors import DataError

PAUSE = 1.0  # seconds between tries
STOPPING_SECONDS = 5.0  # for which is tried where the process was asked to stop
FORGOTTEN_SECONDS = 60.0  # after which one that has given up, or nobody, has tried any more
SAY_EVERY = 10.0  # seconds between warnings, of all threads together
# For warnings that the first process cannot give for the others, which read records of their own.
OF_ANY_PROCESS = {"of_any_process": True}

T = TypeVar("T")


class RecordError(ValueError):
    """One record cannot be read, of a source that is there otherwise.

    Attributes:
      name: of the record.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name = name


class Patience:
    """Tries again for some time where a source is not there.

    Sources raise OSError where they are not there, RecordError where one record is damaged.
    """

    def __init__(self, seconds: float):
        """`seconds` is how long."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._said = -SAY_EVERY
        self._away_since: float | None = None  # for all threads together
        self._stopping_since: float | None = None
        self._failed = 0.0  # when somebody last could not read

    def read(self, read: Callable[[], T]) -> T:
        """What `read` gives.

        Raises:
          DataError: nothing, in all that time; soon where the process was asked to stop.
        """
        while True:
            begun = time.monotonic()
            try:
                found = read()
                if self._away_since is not None:
                    with self._lock:
                        self._away_since = self._stopping_since = None
                return found
            except OSError as error:
                waited, stopped = self._waited(begun)
                reason = f"{error.strerror or error}"
                if error.filename:
                    reason = f"{error.filename}: {reason}"
                if stopped or waited >= self._seconds:
                    raise DataError(
                        f"cannot read the data, tried for {waited:.0f} s "
                        f"(data.retry_seconds={self._seconds:g}"
                        f"{', and was asked to stop' if stopped else ''}): {reason}"
                    ) from error
                self._say(reason, self._seconds - waited)
            _pause(min(PAUSE, self._seconds))

    def _waited(self, begun: float) -> tuple[float, bool]:
        """For how many seconds nothing could be read, and whether too long for one that stops.

        Threads do not count on their own: each would begin anew with the next record.

        Args:
          begun: when the try began that has failed now, which may itself have taken minutes.
        """
        with self._lock:
            now = time.monotonic()
            if self._away_since is None or begun - self._failed > FORGOTTEN_SECONDS:
                self._away_since, self._stopping_since = now, None
            self._failed = now
            if stopping.asked() and self._stopping_since is None:
                self._stopping_since = now
            since = self._stopping_since
            return now - self._away_since, since is not None and now - since >= STOPPING_SECONDS

    def _say(self, reason: str, left: float) -> None:
        with self._lock:
            if time.monotonic() - self._said < SAY_EVERY:
                return
            self._said = time.monotonic()
        said = "cannot read the data; trying for %.0f s more: %s"
        logging.warning(said, left, reason, extra=OF_ANY_PROCESS)

    def __getstate__(self) -> float:
        return self._seconds

    def __setstate__(self, seconds: float) -> None:
        self.__init__(seconds)  # type: ignore[misc]


def _pause(seconds: float) -> None:
    """Waits, not for long where the process was asked to stop meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.1, seconds))
        if stopping.asked():
            return
