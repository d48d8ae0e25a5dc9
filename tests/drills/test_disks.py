"""Disks that fill up, and that cannot be written: runs stop with one line and keep what is whole.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_disks.py

The disks are in memory, mounted in a namespace of their own (`unshare`, of util-linux).
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
    "--config=configs/txt2img.py:smoke --config.first_stage.num_steps=12"
    " --config.checkpoint_every=1 --config.keep_checkpoints=100 --config.eval_every=1000"
    " --config.stages=\"('first_stage',)\""
)


def run(script: str, tmp_path, data_dir) -> tuple[list[str], str]:
    """Runs lines of a shell that has `train`, $DISK and its own mounts; (output, errors)."""
    assert shutil.which("unshare"), "this drill needs util-linux"
    (tmp_path / "disk").mkdir()
    train = (
        f"{sys.executable} -m latent_diffusion_jax.train {FLAGS} --workdir=$DISK/run"
        f" --config.data.data_dir={data_dir}"
    )
    found = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c",
         f"DISK={tmp_path / 'disk'}\ntrain() {{ {train} \"$@\"; }}\n{script}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=1200,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines(), found.stderr


def last_error(errors: str) -> str:
    """The one error, a line of its own."""
    (line,) = re.findall(r"^error: .*", errors, re.MULTILINE)
    assert "Traceback" not in errors, errors
    return line


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path, data_dir):
    """Five megabytes hold a few checkpoints of less than one."""
    output, errors = run(
        "mount -t tmpfs -o size=5m tmpfs $DISK\n"
        "train; echo status $?\n"
        "ls $DISK/run/first_stage\n"
        "echo then\n"
        "mount -o remount,size=100m $DISK\n"
        "train >&2; echo status $?\n"
        "ls $DISK/run/first_stage\n",
        *(tmp_path, data_dir),
    )
    at = output.index("then")
    assert output[0] == "status 74", errors
    steps = sorted(map(int, output[1:at]))  # no name but those of whole checkpoints
    assert steps == list(range(1, len(steps) + 1)) and 1 <= len(steps) < 12
    said = last_error(errors)
    assert "No space left on device" in said
    found = re.search(r"the last whole one is that of step (\d+)", said)
    assert found is None or int(found[1]) == steps[-1], said
    assert output[at + 1] == "status 0", errors
    assert f"goes on from step {steps[-1]}" in errors
    assert "12" in output[at + 2 :]


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(tmp_path, data_dir):
    output, errors = run(
        "mount -t tmpfs tmpfs $DISK && mkdir $DISK/run && mount -o remount,ro $DISK\n"
        "train; echo status $?\n",
        *(tmp_path, data_dir),
    )
    assert output == ["status 74"], errors
    assert "Read-only file system" in last_error(errors)


@pytest.mark.slow
def test_a_workdir_that_is_taken_away(tmp_path, data_dir):
    """In the middle of a run; a file in its place keeps it from being made again."""
    output, errors = run(
        "(until test -d $DISK/run/first_stage/2; do sleep 0.01; done;"
        " mv $DISK/run $DISK/gone; touch $DISK/run) &\n"
        "train --config.first_stage.num_steps=5000 --config.keep_checkpoints=2; echo status $?\n"
        "wait; ls $DISK/gone/first_stage\n",
        *(tmp_path, data_dir),
    )
    assert output[0] == "status 74", errors
    assert re.search(
        "cannot save a checkpoint|is not that of this run any more", last_error(errors)
    )
    assert output[1:] and all(name.isdecimal() or "orbax" in name for name in output[1:])
