"""Files of records that go away and come back, such as ArrayRecord files on a mount.

Their readers keep files open. When a mount is back, what they had open stays dead, though the files
are there: the readers are made anew, and only a record that these cannot give either is damaged.
"""

import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from latent_diffusion_jax.runtime.texts import first_line

# "pread() failed: Stale file handle; reading ...", as the readers say it.
SYSTEM_CALL_FAILED = re.compile(r"\b[a-z0-9_]+\(\) failed: ")


class RecordFiles:
    """Random access to records, from several threads.

    Raises (on access):
      OSError: the files are not there, or the system cannot read them.
      Exception: of any other kind, the record is damaged.
    """

    def __init__(self, records: Any, reopen: Callable[[Any], Any], files: Sequence[str]):
        """`reopen` makes records like others, with readers of their own; they are in `files`."""
        self._records, self._reopen, self._files = records, reopen, list(files)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        records = self._records
        try:
            return records[index]
        except Exception:  # of any kind, by the format
            with self._lock:
                return self._read_anew(index, records)

    def _read_anew(self, index: int, failed: Any) -> Any:
        """A record that could not be read from `failed`."""
        if self._records is not failed:  # another thread was here before
            try:
                return self._records[index]
            except Exception:
                pass  # they have gone away again, or the record is damaged
        try:
            self._check_there()
            fresh = self._reopen(self._records)
        except OSError:
            raise
        except Exception as error:
            raise OSError(first_line(error)) from error
        try:
            found = fresh[index]
        except Exception as error:
            self._check_there()
            if SYSTEM_CALL_FAILED.search(reason := first_line(error)):
                raise OSError(reason) from error
            raise
        self._records = fresh
        return found

    def _check_there(self) -> None:
        for file in self._files:
            os.stat(file)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
