"""Runs of the train command, which drills kill, stop, move and compare."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from latent_diffusion_jax.runtime import checkpoints, trees

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("first_stage", "diffusion")
SMOKE = f"--config={ROOT / 'configs' / 'txt2img.py'}:smoke"
# Networks and images that are as small as they can be.
TINY = (
    SMOKE,
    "--config.data.image_size=8",
    "--config.data.check_images=8",
    "--config.first_stage.autoencoder.channel_multipliers=(1,2)",
    "--config.log_every=1",
)


class Run:
    """A process, and what it says."""

    def __init__(self, command, output, devices=1, cwd=ROOT):
        here = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        self._output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=os.environ | here, stdout=file, stderr=subprocess.STDOUT
            )

    def said(self):
        return self._output.read_text()

    def wait_for(self, condition, seconds=900):
        """Until `condition()`; it must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"it has ended, or goes on and on:\n{self.said()}")
            time.sleep(0.01)

    def finish(self, status=0, seconds=1800):
        """All that it has said when it has ended, which it does within that time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it goes on and on:\n{self.said()}") from None
        assert self.process.returncode == status, self.said()
        return self.said()

    def children(self):
        """Ids of the launcher's processes, in their order."""
        pid = self.process.pid
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(number) for number in text.split()]


TRAIN = (sys.executable, "-m", "latent_diffusion_jax.train")


def start(workdir, flags, processes=1, devices=1):
    """Trains in one process, or through the launcher in several."""
    command = TRAIN
    if processes > 1:
        each = (f"--processes={processes}", f"--devices={devices}")
        command = (sys.executable, "launch/local.py", *each, "--")
    command += (*flags, f"--workdir={workdir}")
    return Run(command, workdir.with_suffix(".output"), devices)


def start_hosts(workdir, flags, folders):
    """Trains in one process for each folder, as hosts do: nobody watches over them all."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    flags += (
        f"--workdir={workdir}", f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={len(folders)}",
    )  # fmt: skip
    return [
        Run((*TRAIN, *flags, f"--process_id={i}"), workdir.with_suffix(f".output{i}"), cwd=folder)
        for i, folder in enumerate(folders)
    ]


def rows(workdir):
    """What is logged so far."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_done(workdir):
    """Steps of both stages that are logged."""
    found = [row for row in rows(workdir) if "train/loss" in row]
    return sum(
        max((row["step"] for row in found if row["stage"] == stage), default=0) for stage in STAGES
    )


def last_step(workdir, stage):
    """That of the last checkpoint, whose data goes on with the batch after it; 0: there is none."""
    step = checkpoints.latest_step(workdir / stage) or 0
    if step:
        assert checkpoints.read_json(workdir / stage, step, "data") == {"next_index": step}
    return step


def leaves(workdir, stage):
    """All arrays of the last checkpoint, by name, on one device."""
    folder, device = workdir / stage, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = last_step(workdir, stage)
    with checkpoints.open_manager(folder) as manager:
        saved = manager.item_metadata(step)["state"].tree
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
    return trees.flatten_names(checkpoints.restore_part(folder, step, shapes))


def assert_same(undisturbed, workdir, steps, stages=STAGES):
    """All arrays have the same bits at the end, after so many steps of each stage."""
    for stage in stages:
        assert last_step(undisturbed, stage) == last_step(workdir, stage) == steps
        expected, found = leaves(undisturbed, stage), leaves(workdir, stage)
        assert expected.keys() == found.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(found[name], leaf, err_msg=f"{stage} {name}")
