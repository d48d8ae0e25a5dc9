"""Warnings of runs that go wrong: they come when they should, and not when all is well."""

import logging

import numpy as np
import pytest

from latent_diffusion_jax.training.alarms import COLLAPSE, SILENCE, Alarms


@pytest.fixture
def warnings(caplog):
    """(figures of steps) -> what is warned of, of a stage of its own."""

    def look(*figures, first_step=1):
        caplog.clear()
        alarms = Alarms("stage")
        with caplog.at_level(logging.WARNING, logger="absl"):
            for i in range(0, len(figures), 7):  # as they are read, a few at once
                part = figures[i : i + 7]
                alarms.look(list(enumerate(part, first_step + i)))
        return [record.getMessage() for record in caplog.records]

    return look


def noisy(count, seed=0):
    """Losses as a diffusion model's: falling, then flat, with noise by the timesteps drawn."""
    rng = np.random.default_rng(seed)
    trend = 0.1 + 0.9 * np.exp(-np.arange(count) / 50)
    return [
        {"loss": float(x), "grad_norm": 1.0, "skipped": 0.0}
        for x in trend * rng.lognormal(0, 0.15, count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_alarm(warnings, seed):
    assert warnings(*noisy(3000, seed)) == []


def test_a_jump_is_told_with_figures_and_not_again_at_once(warnings):
    losses = noisy(400)
    for i in range(300, 310):
        losses[i] = {"loss": 5.0, "grad_norm": 77.0, "skipped": 0.0}
    (said,) = warnings(*losses)
    assert said.startswith("stage: step 301: the loss is 5,") and "gradient norm 77" in said
    later = noisy(2 * SILENCE, 1)
    later[SILENCE] = losses[300]
    assert len(warnings(*losses, *later[100:])) == 2


def test_a_jump_at_the_start_or_of_a_skipped_step_is_none(warnings):
    losses = noisy(300)
    losses[10] = losses[10] | {"loss": 50.0}
    losses[250] = losses[250] | {"loss": float("nan"), "skipped": 1.0}
    assert warnings(*losses) == []


def adversarial(loss, real, fake):
    return {"loss": 1.0, "d_loss": loss, "logits_real": real, "logits_fake": fake, "skipped": 0.0}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (adversarial(0.001, 3.0, -3.0), "told all fake images"),
        (adversarial(1.0, 0.2, 0.2), "told nothing apart"),
    ],
)
def test_a_collapsed_discriminator_is_told(warnings, figures, said):
    fine = adversarial(0.9, 0.3, -0.1)
    assert warnings(*[fine] * 10, *[figures] * (COLLAPSE - 1), *[fine] * 10) == []
    found = warnings(*[figures] * (COLLAPSE + SILENCE - 1))
    assert len(found) == 1 and said in found[0] and f"step {COLLAPSE}:" in found[0]
    assert len(warnings(*[figures] * (COLLAPSE + SILENCE))) == 2


def test_a_discriminator_that_has_not_started_or_is_well_is_none(warnings):
    assert warnings(*[adversarial(0.0, 0.0, 0.0)] * 2000) == []
    assert warnings(*[adversarial(0.9, 0.3, -0.1)] * 2000) == []
