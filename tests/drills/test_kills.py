"""Runs that are killed again and again end with the parameters of one that never was.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_kills.py

Kills come at random moments: while a process starts, trains, saves, evaluates or changes from one
stage to the next.
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from latent_diffusion_jax.runtime import checkpoints, trees

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("first_stage", "diffusion")
STEPS = 120  # of each stage
FLAGS = (
    "--config=configs/txt2img.py:smoke",
    f"--config.first_stage.num_steps={STEPS}",
    f"--config.num_steps={STEPS}",
    "--config.checkpoint_every=2",
    "--config.eval_every=25",
    "--config.log_every=1",
    "--config.data.check_images=8",
    "--config.sample.steps=2",
)


def start(workdir, data_dir, processes, *more):
    flags = (*FLAGS, *more, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}")
    command = [sys.executable, "-m", "latent_diffusion_jax.train", *flags]
    if processes > 1:
        command = [sys.executable, "launch/local.py", f"--processes={processes}", "--", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, status=0):
    """What it says to its end."""
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == status, output
    return output


def steps_done(workdir):
    """Steps of both stages that are logged."""
    try:
        rows = (workdir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(row) for row in rows if row.endswith("}")]
    except OSError:
        return 0
    return sum(
        max((r["step"] for r in rows if r["stage"] == stage and "train/loss" in r), default=0)
        for stage in STAGES
    )


def children(pid):
    return [int(i) for i in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_at_random(process, workdir, rng, processes):
    """Kills it, or one of its processes, unless it is done before; whether it was killed."""
    goal = steps_done(workdir) + rng.randint(1, 4)
    moment = time.time() + rng.uniform(0.0, 8.0) if rng.random() < 0.15 else float("inf")
    while process.poll() is None and steps_done(workdir) < goal and time.time() < moment:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3))
    if process.poll() is not None:
        return False
    victims = children(process.pid) if processes > 1 else [process.pid]
    if not victims:  # it has not started any yet
        victims = [process.pid]
    os.kill(rng.choice(victims), signal.SIGKILL)
    return True


def leaves(workdir, stage):
    """All arrays of the last checkpoint, by name, on one device."""
    folder, device = workdir / stage, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert checkpoints.latest_step(folder) == STEPS
    assert checkpoints.read_json(folder, STEPS, "data") == {"next_index": STEPS}
    with checkpoints.open_manager(folder) as manager:
        saved = manager.item_metadata(STEPS)["state"].tree
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
    return trees.flatten_names(checkpoints.restore_part(folder, STEPS, shapes))


def assert_same(undisturbed, workdir):
    for stage in STAGES:
        expected, found = leaves(undisturbed, stage), leaves(workdir, stage)
        assert expected.keys() == found.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(found[name], leaf, err_msg=f"{stage} {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 80), (2, 20)])
def test_killed_runs_end_like_undisturbed_ones(tmp_path, data_dir, processes, kills):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(undisturbed, data_dir, processes))
    rng, killed, waited = random.Random(processes), 0, []
    while True:
        process = start(workdir, data_dir, processes)
        if killed < kills and kill_at_random(process, workdir, rng, processes):
            killed += 1
            moment = time.time()
            process.communicate(timeout=600)  # of two, the other one ends too
            waited.append(time.time() - moment)
            continue
        finish(process)
        break
    print(f"\n{killed} kills; the rest ended at most {max(waited):.0f} s later")
    assert killed == kills, "it was done too early"
    assert max(waited) < 60
    assert_same(undisturbed, workdir)


@pytest.mark.slow
def test_a_signal_to_one_of_two_saves_on_both_at_the_same_step(tmp_path, data_dir):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "stopped"
    finish(start(undisturbed, data_dir, 2))
    for goal in (20, STEPS + 20):  # in each stage
        process = start(workdir, data_dir, 2, "--config.grace_seconds=120")
        while process.poll() is None and steps_done(workdir) < goal:
            time.sleep(0.01)
        os.kill(children(process.pid)[1], signal.SIGTERM)
        output = finish(process, 128 + signal.SIGTERM)
        stopped = re.findall(r"(\w+): stopped and saved at step (\d+) of", output)
        ((stage, step),) = stopped
        assert checkpoints.latest_step(workdir / stage) == int(step) < STEPS
    finish(start(workdir, data_dir, 2))
    assert_same(undisturbed, workdir)
