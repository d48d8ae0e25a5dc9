"""Which checkpoints of a stage stay when a new one has been written, and how the others go."""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import checkpoint_managers

DELETED = ".deleted"  # at the end of names, while what is there is being removed


@dataclasses.dataclass
class Kept(checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay when a new one has been written.

    Attributes:
      last: so many of the last ones.
      every: those whose step it divides; 0: none.
      best: the one with the lowest of `scores`.
      regular: of the last ones only those count whose step it divides, and the very last.
      scores: of checkpoints, by their steps; one without cannot be the best.
    """

    last: int = 1
    every: int = 0
    best: bool = False
    regular: int = 1
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        lasting = [step for step in steps[:-1] if step % self.regular == 0] + steps[-1:]
        stay = set(lasting[-self.last :])
        stay |= {step for step in steps if self.every and step % self.every == 0}
        scored = [step for step in steps if math.isfinite(self.scores.get(step, math.nan))]
        if self.best and scored:
            stay.add(min(scored, key=lambda step: self.scores[step]))
        return [step in stay for step in steps]


class Deleter:
    """Removes checkpoints, in the place of Orbax's own, for which a failure is one of the save.

    They first get another name: what is left by a process that is killed, or by disks of other
    machines where somebody reads, is never taken for a checkpoint.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def delete(self, step: int) -> None:
        """Removes one, or warns."""
        if jax.process_index() != 0:
            return
        path = self._directory / str(step)
        try:
            path = path.rename(path.with_suffix(DELETED))
            shutil.rmtree(path)
        except OSError as error:
            logging.warning("cannot delete %s: %s; remove it", path, error.strerror or error)

    def delete_steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.delete(step)

    def clear(self) -> None:
        """Removes what could not be before."""
        if jax.process_index() == 0:
            for path in self._directory.glob(f"*{DELETED}"):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        pass
