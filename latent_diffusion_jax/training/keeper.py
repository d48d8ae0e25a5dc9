"""The checkpoints of a stage while it trains: where it goes on, what is saved, which ones stay."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from latent_diffusion_jax.runtime import checkpoints
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.retention import Kept
from latent_diffusion_jax.training.state import State

SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Which checkpoints of a stage stay.

    Attributes:
      last: so many of the last ones.
      every: those whose step it divides; 0: none.
      best: figure of held-out data that one more has the lowest of, or the highest where it begins
        with "-"; "" for none.
      regular: of the last ones only those count whose step it divides, and the very last.
    """

    last: int = 1
    every: int = 0
    best: str = ""
    regular: int = 1

    @property
    def figure(self) -> str:
        return self.best.removeprefix("-")

    def check(self, figures: Sequence[str], key: str) -> None:
        """Raises UserError, naming the config's key, where a stage has no such figure."""
        if self.best and self.figure not in figures:
            raise UserError(
                f"{key}={self.best!r} is no figure of the stage's held-out data; it has "
                f"{', '.join(figures)}, where the highest is the best as -{figures[0]}"
            )


class Keeper:
    """A stage's checkpoints."""

    def __init__(self, folder: pathlib.Path, manager: Any, keeping: Keeping, kept: Any):
        self._folder, self._manager, self._keeping, self._kept = folder, manager, keeping, kept
        self._writing = False

    def restore(self, shapes: Any, shardings: Any) -> tuple[State, Any, dict[str, Any]]:
        """The last one's state, the data's position and what else is noted of it."""
        wanted, last = checkpoints.abstract(shapes, shardings), self.last()
        state = checkpoints.restore_state(self._manager, last, wanted)
        position, info = (checkpoints.read_json(self._folder, last, k) for k in ("data", "info"))
        return state, position, info

    def save(self, step: int, state: State, items: Mapping[str, Any]) -> None:
        """Starts to save a state, but for what is frozen, and JSON items beside it."""
        trained = dataclasses.replace(state, frozen=None)
        checkpoints.save(self._manager, step, trained, dict(items))
        self._writing = True

    def check(self) -> None:
        """Raises StorageError where a save has failed in the meantime."""
        if self._writing:
            self._writing = not checkpoints.is_whole(self._manager)

    def wait(self) -> None:
        """Until what was started to be saved is whole."""
        with checkpoints.saving(self._manager):
            self._manager.wait_until_finished()

    def last(self) -> int:
        """Step of the last checkpoint that is whole by now; 0 where there is none."""
        return int(self._manager.latest_step() or 0)

    def has_score(self, step: int) -> bool:
        """Whether it is noted what a checkpoint is worth."""
        return step in self._kept.scores

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Notes what a checkpoint's weights are worth; one that is not finite is never the best."""
        if not self._keeping.best:
            return
        sign = -1.0 if self._keeping.best.startswith("-") else 1.0
        scores = self._kept.scores
        if not math.isfinite(figures[self._keeping.figure]):
            return
        scores[step] = sign * figures[self._keeping.figure]
        if scores[step] == min(scores.values()):
            logging.info("step %d has the best %s so far", step, self._keeping.figure)
        if jax.process_index() == 0:
            written = {"figure": self._keeping.best, "scores": scores}
            checkpoints.write_json(self._folder / SCORES, written)


@contextlib.contextmanager
def open_keeper(folder: pathlib.Path, keeping: Keeping) -> Iterator[Keeper]:
    """The checkpoints in a stage's folder, which is made; waits for saves at the end."""
    scores = _scores(folder / SCORES, keeping.best) if keeping.best else {}
    kept = Kept(keeping.last, keeping.every, bool(keeping.best), keeping.regular, scores)
    with checkpoints.open_manager(folder, kept=kept, create=True) as manager:
        for step in [step for step in scores if step > (manager.latest_step() or 0)]:
            del scores[step]  # of a checkpoint that a kill has prevented, and that comes anew
        yield Keeper(folder, manager, keeping, kept)


def _scores(path: pathlib.Path, best: str) -> dict[int, float]:
    """Those that earlier calls have noted; none of another figure."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["figure"] != best:
            return {}
        return {int(step): float(score) for step, score in found["scores"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s is damaged (%s); the best checkpoint is looked for anew", path, error)
        return {}
