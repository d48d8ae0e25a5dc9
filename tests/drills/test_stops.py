"""A signal at moments when no step is made: all is saved, and the run ends as if it never was.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_stops.py
"""

import re
import signal
import time

import pytest

from tests.drills.runs import TINY, assert_same, last_step, start

STEPS, EVAL_EVERY = 24, 8
FLAGS = (
    *TINY,
    f"--config.first_stage.num_steps={STEPS}",
    f"--config.num_steps={STEPS}",
    f"--config.eval_every={EVAL_EVERY}",
    "--config.checkpoint_every=1000",
    "--config.first_stage.scale_examples=1500",  # which takes a while
)


def stop(run, after, pause=0.0):
    """Sends a signal a moment after the run has said something; all it says."""
    run.wait_for(lambda: after in run.said())
    time.sleep(pause)
    run.process.send_signal(signal.SIGTERM)
    return run.finish(128 + signal.SIGTERM, seconds=300)


def assert_in_this_order(said, *texts):
    places = [said.find(text) for text in texts]
    assert -1 not in places and places == sorted(places), f"{texts} at {places}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stops_between_steps(tmp_path, data_dir, processes):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "stopped"
    flags = (*FLAGS, f"--config.data.data_dir={data_dir}")
    start(undisturbed, (*flags, "--config.sample.steps=2"), processes).finish()

    def stopped(after, *more, pause=0.0):
        return stop(start(workdir, (*flags, *more), processes), after, pause)

    def assert_saved(said, stage, least):
        """Soon: two processes agree on the step after the next one."""
        step = int(re.search(rf"{stage}: stopped and saved at step (\d+) of {STEPS}", said)[1])
        assert last_step(workdir, stage) == step
        assert least <= step <= (least if processes == 1 else least + 8)

    compiling = "first_stage: compiling the train step"
    said = stopped(compiling)
    assert_in_this_order(said, compiling, "SIGTERM: finishing", f"step 1/{STEPS}")
    assert_saved(said, "first_stage", 1)

    evaluated = f"first_stage: step {STEPS}, held out"
    said = stopped(evaluated, pause=0.3)  # the pictures are soon done
    last = f"first_stage: stopped and saved at step {STEPS - 1} of {STEPS}"
    assert_in_this_order(said, evaluated, "SIGTERM: finishing", last)
    assert "latents' std" not in said
    assert last_step(workdir, "first_stage") == STEPS - 1

    evaluated = f"diffusion: step {EVAL_EVERY}, held out"
    said = stopped(evaluated, "--config.sample.steps=500", pause=0.1)
    assert_in_this_order(said, evaluated, "SIGTERM: finishing", f"step {EVAL_EVERY + 1}/{STEPS}")
    assert_saved(said, "diffusion", EVAL_EVERY + 1)

    start(workdir, (*flags, "--config.sample.steps=2"), processes).finish()
    assert_same(undisturbed, workdir, STEPS)
