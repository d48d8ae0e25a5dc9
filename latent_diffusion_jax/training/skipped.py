"""Steps that changed nothing, as a loss or gradient was not finite: told, counted, stopped at."""

import math
from collections.abc import Iterable, Mapping

from absl import logging

from latent_diffusion_jax.runtime.errors import UserError


class SkippedSteps:
    """What there is to say of a stage's steps, those of `state.finite_steps_alone`.

    Attributes:
      count: of skipped steps since it was last set to 0.
    """

    def __init__(self, name: str, batch_size: int, most: int):
        """`most` of stage `name`'s steps may be skipped in a row."""
        self._name, self._batch_size, self._most = name, batch_size, most
        self._in_row: list[int] = []
        self.count = 0

    def look(self, figures: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tells of the skipped ones among steps that follow those of before.

        Args:
          figures: of each step, by its number.

        Raises:
          UserError: too many have been skipped in a row; names them, their samples and figures.
        """
        for step, values in figures:
            if not values["skipped"]:
                self._in_row = []
                continue
            broken = ", ".join(f"{k}={v:g}" for k, v in values.items() if not math.isfinite(v))
            self.count += 1
            self._in_row.append(step)
            logging.warning(
                "%s: step %d is skipped, as %s (%s)",
                *(self._name, step, broken, self._samples(step, step)),
            )
            if len(self._in_row) > self._most:
                first = self._in_row[0]
                raise UserError(
                    f"{self._name}: {broken} at step {step}, and no step since {first} has been "
                    f"finite ({self._samples(first, step)}). They changed nothing, and the last "
                    "checkpoint is kept. Try a lower learning rate in another --workdir, or look "
                    "at those samples"
                )

    def _samples(self, first: int, last: int) -> str:
        size = self._batch_size
        return f"samples {(first - 1) * size} to {last * size - 1} in the run's order"


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Those that can be logged."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
