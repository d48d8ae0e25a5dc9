"""Batches on the mesh: to train on, ahead of the loop; and a source's first examples in order."""

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.runtime import processes, sharding
from latent_diffusion_jax.runtime.errors import DataError, UserError
from latent_diffusion_jax.runtime.stopping import Stopped


def in_order(
    source: pipeline.Examples,
    prepare: pipeline.Prepare,
    mesh: Mesh,
    batch_size: int,
    num_examples: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, int]]:
    """A source's first examples on the mesh: (global batch, number of its rows that count).

    Raises:
      Stopped: in all processes at the same batch, where one was asked to stop or cannot read on.
      UserError: it cannot be read on, in the process that has tried.
    """
    batches = pipeline.eval_batches(
        source,
        prepare,
        batch_size=batch_size,
        num_examples=num_examples,
        rows=sharding.own_rows(batch_size, mesh),
    )
    while True:
        found, failed = None, None
        try:
            found = next(batches, None)
        except UserError as error:
            failed = error
        if found is None and failed is None:
            return
        asked = should_stop()
        if processes.highest(asked or failed is not None):
            if failed is not None and not (asked and isinstance(failed, DataError)):
                raise failed
            raise Stopped
        assert found is not None
        yield sharding.put_batch(found[0], mesh, batch_size), found[1]


class Ahead:
    """Batches ahead of the loop, one of them on the devices.

    Attributes:
      batch: the next one to train on; None where there is none.
      position: of the loader before that one: where a run goes on that is stopped now.
      error: why there are none after the spare ones; None where nothing is the matter.
    """

    def __init__(self, loader: Any, put: Callable[[Any], Any], count: int, spare: int):
        """Takes the first ones.

        Args:
          loader: gives them.
          put: rows of this process -> batch on the devices.
          count: how many will be trained on.
          spare: how many more than the next one wait on the host, for processes that have to go on
            a little when one of them cannot read any more.

        Raises:
          Exception: one of them cannot be read. Where a run would begin with fewer spare ones, the
            processes could not agree to stop in time.
        """
        self._loader, self._put, self._left, self._spare = loader, put, count, spare
        self._waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        self._end = loader.get_state()  # behind those that wait
        self.batch: Any = None
        self.error: Exception | None = None
        self.advance()
        if self.error is not None:
            raise self.error

    def advance(self) -> float:
        """Takes the batch after; gives the seconds for which the loader let it wait.

        After the last one only the position goes on.
        """
        start = time.perf_counter()
        while self._left and self.error is None and len(self._waiting) <= self._spare:
            try:
                self._waiting.append((self._end, next(self._loader)))
            except Exception as error:  # whatever it is, what was learned is saved first
                self.error = error
            else:
                self._end = self._loader.get_state()
                self._left -= 1
        waited = time.perf_counter() - start
        self.position, self.batch = self._end, None
        if self._waiting:
            self.position, rows = self._waiting.popleft()
            self.batch = self._put(rows)
        return waited
