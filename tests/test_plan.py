"""The plan command: what it prints, writes and exits with."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.tpu import tpu_devices

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def compiler():
    tpu_devices("v5e:2x2")  # skips where there is none


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.plan", *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | variables,
    )  # fmt: skip


def test_a_config_that_fits(tmp_path):
    cache = tmp_path / "cache"
    done = run(
        "--config=configs/txt2img.py:smoke",
        "--topology=v5e:2x2",
        "--programs=sample",
        "--nosearch",
        f"--json={tmp_path / 'rows.json'}",
        JAX_COMPILATION_CACHE_DIR=str(cache),
    )
    assert done.returncode == 0, done.stderr
    assert not cache.exists() or not any("draw" in path.name for path in cache.iterdir())
    assert "sample on v5e:2x2" in done.stdout and "of 15.75 GiB" in done.stdout
    assert "DOES NOT FIT" not in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["fits"] and row["topology"] == "v5e:2x2" and row["program"] == "sample"
    assert 0 < row["HBM GiB"] < row["of"] == 15.75
    assert 0 < row["MFU"] < 1 and row["images/s"] > 0


@pytest.mark.slow  # the compiler looks for the best windows of convolutions
def test_a_program_is_kept(tmp_path):
    done = run(
        "--config=configs/txt2img.py:smoke",
        "--topology=v5e:2x2",
        "--programs=sample",
        "--nosearch",
        f"--save={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "v5e_2x2" / "sample").stat().st_size > 1000
    assert "ENTRY" in (tmp_path / "v5e_2x2" / "sample.txt").read_text()


@pytest.mark.slow  # three compilations
def test_a_config_that_does_not_fit_exits_with_what_makes_it_fit(tmp_path):
    done = run(
        "--config=configs/txt2img.py:smoke",
        "--topology=v5e:1x1",
        "--programs=diffusion",
        "--config.batch_size=131072",
        f"--json={tmp_path / 'rows.json'}",
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "it fits with --config.accumulation=" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert not row["fits"] and row["HBM GiB"] > row["of"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--programs=first_stages"], "first_stage, diffusion, sample"),
        (["--config.unet.channel=3"], "unet.channel"),
        (["--config.mesh.fsdp=3"], "fsdp"),
        (["--config.batch_size=9"], "mesh's data * fsdp = 4"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    done = run(
        "--config=configs/txt2img.py:smoke", "--topology=v5e:2x2", "--nosearch", *arguments
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_the_readmes_commands_go_with_their_topologies():
    """By the checks that come before compiling."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python -m latent_diffusion_jax\.plan (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        code = f"""
from absl import flags
from latent_diffusion_jax import plan
plan.define_flags()
flags.FLAGS(["plan", *{shlex.split(command)}])
config = flags.FLAGS.config
plan.check(config)
for topology in flags.FLAGS.topology:
    plan.check_topology(config, topology, flags.FLAGS.programs or [*config.stages, "sample"])
print("checked")
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == "checked\n", done.stderr
