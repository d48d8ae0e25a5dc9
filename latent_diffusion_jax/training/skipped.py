"""Steps that changed nothing, as a loss or gradient was not finite: told, counted, stopped at."""

import math
from collections.abc import Callable, Iterable, Mapping

from absl import logging

from latent_diffusion_jax.runtime.errors import UserError

NAMED = 64  # records; more are counted


class SkippedSteps:
    """What there is to say of a stage's steps, those of `state.finite_steps_alone`.

    Attributes:
      count: of skipped steps since it was last set to 0.
      since: the first of those in a row that the last step that was looked at is one of, or None.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        most: int,
        records: Callable[[range], list[int]],
        since: int | None = None,
    ):
        """What it needs to know.

        Args:
          name: of the stage.
          batch_size: of its steps.
          most: that may be skipped in a row.
          records: numbers of samples in the run's order -> those of the data's records.
          since: see above, where a run goes on.
        """
        self._name, self._batch_size, self._most = name, batch_size, most
        self._records = records
        self.since, self.count = since, 0

    def look(self, figures: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tells of the skipped ones among steps that follow those of before.

        Args:
          figures: of each step, by its number.

        Raises:
          UserError: too many have been skipped in a row; names them, their samples and figures.
        """
        for step, values in figures:
            if not values["skipped"]:
                self.since = None
                continue
            broken = ", ".join(f"{k}={v:g}" for k, v in values.items() if not math.isfinite(v))
            self.count += 1
            self.since = self.since or step
            logging.warning(
                "%s: step %d is skipped, as %s (%s)",
                *(self._name, step, broken, self._samples(step, step)),
            )
            if step - self.since + 1 > self._most:
                samples = self._samples(self.since, step)
                raise UserError(
                    f"{self._name}: {broken} at step {step}, and no step since {self.since} has "
                    f"been finite ({samples}). They changed nothing, and the last checkpoint is "
                    "kept. Try a lower learning rate in another --workdir, or look at those samples"
                )

    def _samples(self, first: int, last: int) -> str:
        size = self._batch_size
        samples = range((first - 1) * size, last * size)
        records = ", ".join(map(str, self._records(samples[:NAMED])))
        more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
        return (
            f"samples {samples[0]} to {samples[-1]} in the run's order, made of the data's records "
            f"{records}{more}"
        )


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Those that can be logged."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
