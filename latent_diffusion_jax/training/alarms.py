"""Warnings of a run that goes wrong: a loss that jumps up, a discriminator that has collapsed."""

from collections.abc import Iterable, Mapping

from absl import logging

WARM_UP = 100  # steps whose losses are looked at before one can be a jump
RATE = 0.02  # of the moving averages of losses
JUMP = 10.0  # mean absolute deviations above the average
LEAST_JUMP = 0.5  # of the average itself
SILENCE = 500  # steps after a warning without another of its kind
COLLAPSE = 200  # steps in a row
WON = 0.02  # a discriminator's loss below which it has nothing left to learn
BLIND = 1e-3  # difference between logits of real and of fake images that tells nothing


class Alarms:
    """Looks at all steps of a stage; says what is unusual, with figures, and changes nothing."""

    def __init__(self, name: str):
        """`name` is the stage's."""
        self._name = name
        self._mean, self._deviation, self._count = 0.0, 0.0, 0
        self._won = self._blind = 0  # steps in a row
        self._quiet_until: dict[str, int] = {}

    def look(self, figures: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Looks at steps that follow those of before; skipped ones do not count.

        Args:
          figures: of each step, by its number.
        """
        for step, values in figures:
            if values.get("skipped"):
                continue
            self._look_at_loss(step, values)
            if "d_loss" in values:
                self._look_at_discriminator(step, values)

    def _look_at_loss(self, step: int, values: Mapping[str, float]) -> None:
        loss = float(values["loss"])
        above = loss - self._mean
        self._count += 1
        rate = max(RATE, 1.0 / self._count)
        if self._count > WARM_UP and above > max(
            JUMP * self._deviation, LEAST_JUMP * abs(self._mean)
        ):
            norm = float(values.get("grad_norm", float("nan")))
            self._warn(
                *(step, "jump"),
                f"the loss is {loss:.4g}, after an average of {self._mean:.4g} (gradient norm "
                f"{norm:.4g}); where this goes on, a lower learning rate or clip_norm may help",
            )
        self._mean += rate * above
        self._deviation += rate * (abs(above) - self._deviation)

    def _look_at_discriminator(self, step: int, values: Mapping[str, float]) -> None:
        real, fake, loss = (float(values[k]) for k in ("logits_real", "logits_fake", "d_loss"))
        if real == fake == loss == 0.0:  # it has not started
            return
        self._won = self._won + 1 if loss < WON else 0
        self._blind = self._blind + 1 if abs(real - fake) < BLIND else 0
        figures = f"loss {loss:.4g}, logits of real images {real:.4g}, of fake ones {fake:.4g}"
        if self._won >= COLLAPSE:
            self._warn(
                *(step, "won"),
                f"the discriminator has told all fake images for {self._won} steps ({figures}), so "
                "that they get no better by it; a lower learning rate of its own, r1_weight or "
                "lecam_weight may help",
            )
        if self._blind >= COLLAPSE:
            self._warn(
                *(step, "blind"),
                f"the discriminator has told nothing apart for {self._blind} steps ({figures}); a "
                "higher learning rate of its own or a lower disc_weight may help",
            )

    def _warn(self, step: int, kind: str, text: str) -> None:
        if step < self._quiet_until.get(kind, 0):
            return
        self._quiet_until[kind] = step + SILENCE
        logging.warning("%s: step %d: %s", self._name, step, text)
