"""Two hosts whose data goes away: they wait, stop in time, say why, and go on when it is back.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_lost_data.py

Each has a folder of its own with the same images.
"""

import contextlib
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.drills.runs import TINY, assert_same, last_step, start_hosts, steps_done

STEPS = 200
STAGE = "first_stage"
SECOND_FAILED = "error: process 1 of 2 has failed"  # which says itself why
FLAGS = (
    *TINY,
    f"--config.stages=('{STAGE}',)",
    f"--config.first_stage.num_steps={STEPS}",
    "--config.checkpoint_every=4",
    "--config.eval_every=100",
    "--config.data.name=data",  # in the folder that a process is started in
    "--config.data.caption_key=",
    "--config.data.holdout_share=0.2",
    "--config.data.num_threads=1",  # which reads few batches in advance
)


@pytest.fixture
def folders(tmp_path):
    """Those of the two hosts."""
    found = [tmp_path / "host0", tmp_path / "host1"]
    for folder in found:
        (folder / "data").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(20):
            pixels = rng.integers(0, 255, (10, 9, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "data" / f"{i}.png")
    return found


@contextlib.contextmanager
def without_data(folders):
    for folder in folders:
        (folder / "data").rename(folder / "away")
    yield
    for folder in folders:
        (folder / "away").rename(folder / "data")


def ends(hosts, status, seconds):
    """What each of them has said, when all have ended."""
    end = time.monotonic() + seconds
    found = [host.finish(status, max(1.0, end - time.monotonic())) for host in hosts]
    assert all("Traceback" not in said for said in found), found
    return found


def errors(said):
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_data_that_two_hosts_lose(tmp_path, folders):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    ends(start_hosts(undisturbed, FLAGS, folders), 0, 900)

    def trains(*more):
        """Hosts that have made some steps."""
        hosts = start_hosts(workdir, (*FLAGS, *more), folders)
        goal = steps_done(workdir) + 8
        hosts[0].wait_for(lambda: steps_done(workdir) >= goal)
        return hosts

    def lost(host):
        host.wait_for(lambda: "cannot read the data; trying for" in host.said())

    # Both, and they are asked to stop.
    hosts = trains("--config.data.retry_seconds=600")
    with without_data(folders):
        lost(hosts[0])
        for host in hosts:
            host.process.send_signal(signal.SIGTERM)
        said = ends(hosts, 128 + signal.SIGTERM, 60)
    assert f"stopped and saved at step {last_step(workdir, STAGE)} of {STEPS}" in said[0]
    assert "and was asked to stop" in said[0] and "No such file" in said[0]

    # Both; it comes back in time.
    hosts = trains("--config.data.retry_seconds=600")
    with without_data(folders):
        lost(hosts[0])
        for host in hosts:
            host.process.send_signal(signal.SIGTERM)
        time.sleep(1)
    said = ends(hosts, 128 + signal.SIGTERM, 60)
    assert f"stopped and saved at step {last_step(workdir, STAGE)} of {STEPS}" in said[0]

    # The second alone, for too long, far from a checkpoint.
    before = last_step(workdir, STAGE)
    hosts = trains("--config.data.retry_seconds=3", "--config.checkpoint_every=1000")
    with without_data(folders[1:]):
        said = ends(hosts, 74, 60)
    assert errors(said[0]) == [SECOND_FAILED]
    (line,) = errors(said[1])
    assert line.startswith("error: process 1 of 2: cannot read the data, tried for 3 s")
    assert "data/" in line and "No such file" in line
    step = last_step(workdir, STAGE)
    assert line.endswith(f"the same command goes on from step {step}")
    assert f"stopped and saved at step {step} of {STEPS}" in said[0] and step >= before + 8

    # The second alone, for longer than devices wait for each other where they meet first.
    hosts = trains("--config.data.retry_seconds=600")
    with without_data(folders[1:]):
        time.sleep(45)
        done = steps_done(workdir)
        time.sleep(1)
        assert steps_done(workdir) == done < STEPS
    ends(hosts, 0, 900)
    assert_same(undisturbed, workdir, STEPS, stages=[STAGE])
