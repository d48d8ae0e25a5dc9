"""Runs that are killed again and again end with the parameters of one that never was.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_kills.py

Kills come at random moments: while a process starts, trains, saves, evaluates or changes from one
stage to the next.
"""

import os
import random
import re
import signal
import time

import pytest

from tests.drills.runs import (
    ROOT,
    SMOKE,
    STAGES,
    TINY,
    assert_same,
    last_step,
    start,
    start_hosts,
    steps_done,
)

STEPS = 120  # of each stage
FLAGS = (
    SMOKE,
    f"--config.first_stage.num_steps={STEPS}",
    f"--config.num_steps={STEPS}",
    "--config.checkpoint_every=2",
    "--config.eval_every=25",
    "--config.log_every=1",
    "--config.data.check_images=8",
    "--config.sample.steps=2",
)


def kill_at_random(run, workdir, rng, processes):
    """Kills it, or one of its processes, unless it is done before.

    Returns which process of several it was, None where it was the run itself; and the output so
    far, None where it was done.
    """
    goal = steps_done(workdir) + rng.randint(1, 4)
    moment = time.time() + rng.uniform(0.0, 8.0) if rng.random() < 0.15 else float("inf")
    while run.process.poll() is None and steps_done(workdir) < goal and time.time() < moment:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3))
    if run.process.poll() is not None:
        return None, None
    victims = run.children() if processes > 1 else []
    victim = rng.randrange(len(victims)) if victims else None  # it has not started any yet
    said = run.said()
    os.kill(run.process.pid if victim is None else victims[victim], signal.SIGKILL)
    return victim, said


def check_last_words(said, victim, before):
    """Of a launcher with two processes, one of which was killed, having said `before`."""
    assert said.endswith(f"process {victim} of 2 ended with signal SIGKILL\n"), said
    words = ("process 1 of 2 has lost process 0 at ", "process 1 of 2 has said nothing for 30 s")
    if "workdir: " in before and "done: " not in said:  # there is something to lose
        # Threads of TensorStore print tracebacks then, and not whole lines.
        assert re.search(rf"\n\[{1 - victim}\] .*\berror: {words[victim]}", "\n" + said), said


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 80), (2, 20)])
def test_killed_runs_end_like_undisturbed_ones(tmp_path, data_dir, processes, kills):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    flags = (*FLAGS, f"--config.data.data_dir={data_dir}")
    start(undisturbed, flags, processes).finish()
    rng, killed, waited = random.Random(processes), 0, []
    while True:
        run = start(workdir, flags, processes)
        victim, before = (None, None)
        if killed < kills:
            victim, before = kill_at_random(run, workdir, rng, processes)
        if before is None:
            run.finish()
            break
        killed += 1
        moment = time.time()
        if victim is None:
            run.finish(-signal.SIGKILL, seconds=600)
        else:  # the other one ends too
            check_last_words(run.finish(128 + signal.SIGKILL, seconds=600), victim, before)
        waited.append(time.time() - moment)
        for stage in STAGES:
            last_step(workdir, stage)  # with the data's position
    print(f"\n{killed} kills; the rest ended at most {max(waited):.0f} s later")
    assert killed == kills, "it was done too early"
    assert max(waited) < 75
    assert_same(undisturbed, workdir, STEPS)


@pytest.mark.slow
def test_the_host_that_is_left_says_which_one_is_lost(tmp_path, data_dir):
    workdir, said = tmp_path / "run", {}
    flags = (*TINY, "--config.first_stage.num_steps=1000000", "--config.checkpoint_every=10",
             f"--config.data.data_dir={data_dir}")  # fmt: skip
    for victim in (0, 1):
        hosts = start_hosts(workdir, flags, [ROOT, ROOT])
        goal = steps_done(workdir) + 15
        hosts[0].wait_for(lambda goal=goal: steps_done(workdir) >= goal)
        hosts[victim].process.kill()
        said[victim] = hosts[1 - victim].finish(75, seconds=60)
    assert "error: process 1 of 2 has lost process 0 at 127.0.0.1:" in said[0], said[0]
    assert "error: process 1 of 2 has said nothing for 30 s" in said[1], said[1]
    assert last_step(workdir, "first_stage") >= 20


@pytest.mark.slow
def test_a_signal_to_one_of_two_saves_on_both_at_the_same_step(tmp_path, data_dir):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "stopped"
    flags = (*FLAGS, f"--config.data.data_dir={data_dir}")
    start(undisturbed, flags, 2).finish()
    for goal in (20, STEPS + 20):  # in each stage
        run = start(workdir, (*flags, "--config.grace_seconds=120"), 2)
        run.wait_for(lambda goal=goal: steps_done(workdir) >= goal)
        os.kill(run.children()[1], signal.SIGTERM)
        output = run.finish(128 + signal.SIGTERM)
        ((stage, step),) = re.findall(r"(\w+): stopped and saved at step (\d+) of", output)
        assert last_step(workdir, stage) == int(step) < STEPS
    start(workdir, flags, 2).finish()
    assert_same(undisturbed, workdir, STEPS)
