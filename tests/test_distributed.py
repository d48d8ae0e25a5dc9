"""The commands in two processes give what they give in one: through the launcher, with real ones.

Adam's epsilon is so large that its steps are the gradients' size: otherwise it would take a step of
the learning rate to the one side or to the other by the sign of a gradient that is nearly zero.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest

from latent_diffusion_jax import evaluate, first_stages
from latent_diffusion_jax.data.latents import LatentSource
from latent_diffusion_jax.encode import encode_dataset
from latent_diffusion_jax.runtime import checkpoints, images, trees
from tests.clip_files import make_text_encoder_folder, make_tokenizer_folder

ROOT = pathlib.Path(__file__).parents[1]
LEARNING_RATE = 0.1
STAGES = ("first_stage", "diffusion")
# The smallest networks that there are, as every second process compiles all programs anew.
TINY = (
    "--config=configs/txt2img.py:smoke",
    "--config.data.image_size=8",
    "--config.data.check_images=8",
    "--config.first_stage.autoencoder.channel_multipliers=(1,2)",
    # Of gradients that are large. Larger steps make more of rounding than they learn.
    f"--config.first_stage.optimizer.learning_rate={LEARNING_RATE / 10}",
    "--config.first_stage.optimizer.warmup_steps=1",
    "--config.first_stage.loss.disc_weight=0.0",
    "--config.first_stage.optimizer.eps=1.0",
    "--config.optimizer.eps=1.0",
    "--config.text_encoder.width=64",
    f"--config.optimizer.learning_rate={LEARNING_RATE}",
    "--config.sample.steps=1",
)


def start(*arguments: str, processes: int, devices: int, command: str = "train"):
    """The launcher, which runs a command."""
    env = dict(os.environ)
    if processes > 1 and command == "train":
        del env["JAX_COMPILATION_CACHE_DIR"]  # that of a workdir is used
    return subprocess.Popen(
        [sys.executable, "launch/local.py", f"--processes={processes}", f"--devices={devices}",
         f"--command={command}", "--", *arguments],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def launch(*arguments: str, status: int = 0, **options) -> tuple[str, str]:
    """Output and errors of a command that ends with this status."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == status, errors
    return output, errors


def flags(workdir: pathlib.Path, data_dir: str, devices: int) -> tuple[str, ...]:
    """Of a run on so many devices in all, over which parameters are split.

    Those are the words' embeddings; the rest is too small.
    """
    return (
        *TINY, "--config.mesh.data=1", f"--config.mesh.fsdp={devices}",
        f"--workdir={workdir}", f"--config.data.data_dir={data_dir}",
    )  # fmt: skip


def train(workdir, data_dir, processes, devices=4, **options) -> tuple[str, str]:
    """Trains on so many devices in all."""
    each = devices // processes
    return launch(*flags(workdir, data_dir, devices), processes=processes, devices=each, **options)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Empty: the first run's processes prepare the data."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, data_dir):
    """A workdir that two processes have trained."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    _, errors = train(workdir, data_dir, 2)
    assert "2 process(es); mesh: data 1, fsdp 4" in errors
    assert not [line for line in errors.splitlines() if line.startswith("[1]")], errors
    assert compiled_in(workdir)
    return workdir


def compiled_in(workdir):
    """Train steps that are kept there, compiled."""
    return {path.name for path in (workdir / "compiled").iterdir() if "train_step" in path.name}


@pytest.mark.slow
def test_a_signal_stops_both_processes_and_they_go_on(of_two, tmp_path, data_dir):
    workdir = tmp_path / "run"
    process = start(*flags(workdir, data_dir, 4), processes=2, devices=2)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.count("SIGTERM: finishing this step") == 1
    assert "stopped before the stage diffusion" in errors and "Traceback" not in errors
    assert checkpoints.latest_step(workdir / "diffusion") is None
    train(workdir, data_dir, 2)
    assert_same_run(of_two, workdir)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory, data_dir, of_two):
    """A workdir that one process has trained on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    _, errors = train(workdir, data_dir, 1, devices=1)
    assert "1 process(es); mesh: data 1, fsdp 1" in errors
    return workdir


OF_SPEED = ("images_per_second", "seconds_per_step", "tflops_per_device", "waiting_for_data", "mfu")


def figures(workdir):
    """Everything logged but how fast it was, by stage, step and name."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {
        (row["stage"], row["step"], name): value
        for row in rows
        for name, value in row.items()
        if "/" in name and name.removeprefix("train/") not in OF_SPEED
    }


def state_of(workdir, stage, step=4, parts=("params", "ema", "opt")):
    """Every leaf of these parts of a checkpoint, by name."""
    with checkpoints.open_manager(workdir / stage) as manager:
        saved = dict(manager.item_metadata(step)["state"].tree)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {part: saved[part] for part in parts if saved[part]},
    )
    read = jax.device_get(checkpoints.restore_part(workdir / stage, step, shapes))
    return trees.flatten_names(read)


def largest(leaves, names):
    return max(np.abs(leaves[name]).max() for name in names)


def assert_same_state(ours, theirs):
    """Relative errors of at most 1e-5; first and second moments are among them."""
    assert ours.keys() == theirs.keys()
    parts = collections.defaultdict(list)
    for name in ours:
        parts[re.match(r"opt/.*/(mu|nu)(?=/)|[^/]+", name).group()].append(name)
    assert len(parts["params"]) > 50
    assert sum(len(names) for part, names in parts.items() if re.search("/(mu|nu)$", part)) == (
        2 * len(parts["params"])
    )
    for names in parts.values():
        # Some gradients are zero but for rounding: of biases that a norm takes away again.
        least = 0.01 * largest(ours, names)
        for name in names:
            error = np.abs(ours[name] - theirs[name]).max() / max(largest(ours, [name]), least)
            assert error <= 1e-5, (name, error)


def assert_same_run(workdir, other, stages=STAGES):
    ours, theirs = figures(workdir), figures(other)
    assert ours.keys() == theirs.keys() and len(ours) >= 10 * len(stages)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, err_msg=str(name))
    for stage in stages:
        state, before = state_of(workdir, stage), state_of(workdir, stage, 2, ["params"])
        moved = [np.abs(state[name] - leaf).max() for name, leaf in before.items()]
        assert np.median(moved) > 1e-4, "hardly anything was trained"
        assert any(name.startswith("ema/") for name in state) == (stage == "diffusion")
        assert_same_state(state, state_of(other, stage))


def test_two_processes_train_as_one_does(of_one, of_two):
    assert_same_run(of_one, of_two)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("of_two", 1), ("of_one", 2)])
def test_the_other_number_of_processes_goes_on(request, tmp_path, data_dir, first, then):
    begun = request.getfixturevalue(first)
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    shutil.rmtree(workdir / "diffusion" / "4")
    _, errors = train(workdir, data_dir, then)
    assert "diffusion: goes on from step 2" in errors
    if then == 2:
        assert compiled_in(workdir)
    assert_same_run(begun, workdir)


@pytest.mark.slow
def test_clip_and_a_starting_point_on_both_ways_to_split(of_one, data_dir, tmp_path):
    """Hosts of two chips along `tensor`, each pair of which is one of `fsdp`, with accumulation."""
    size = make_tokenizer_folder(tmp_path / "clip" / "tokenizer")
    make_text_encoder_folder(tmp_path / "clip" / "text_encoder", size)
    config = tmp_path / "clip.py"
    config.write_text(
        "from configs import base\n\ndef get_config():\n"
        "    return base.miniature('clip', smoke=True)\n"
    )
    given = (
        f"--config={config}", f"--config.first_stage.init_from={of_one}", "--config.sample.steps=1",
        "--config.stages=('diffusion',)", f"--config.clip.path={tmp_path / 'clip'}",
        "--config.clip.dtype=float32", "--config.data.image_size=8", "--config.unet.channels=64",
        f"--config.data.data_dir={data_dir}", f"--config.optimizer.learning_rate={LEARNING_RATE}",
        "--config.optimizer.eps=1.0",
        "--config.first_stage.autoencoder.channel_multipliers=(1,2)",
    )  # fmt: skip
    begun = tmp_path / "begun"
    launch(*given, f"--workdir={begun}", processes=1, devices=1)
    given += (
        f"--config.init_from={begun}", "--config.mesh.data=1", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2", "--config.accumulation=2",
    )  # fmt: skip
    for processes in (1, 2):
        workdir = f"--workdir={tmp_path / str(processes)}"
        _, errors = launch(*given, workdir, processes=processes, devices=4 // processes)
        assert f"{processes} process(es); mesh: data 1, fsdp 2, tensor 2" in errors
    assert_same_run(tmp_path / "1", tmp_path / "2", stages=("diffusion",))


def test_two_processes_encode_as_one_does(of_two, tmp_path):
    output, _ = launch(
        f"--first_stage={of_two}", f"--out={tmp_path / 'two'}", "--shard_size=200",
        "--dtype=float32", "--batch_size=64", processes=2, devices=1, command="encode",
    )  # fmt: skip
    assert output.count("train from them with") == 1
    stage = first_stages.open_first_stage(of_two)
    assert stage.config is not None
    encode_dataset(stage.config, stage, "here", tmp_path / "one", dtype="float32", batch_size=64)
    for split, count in (("train", 1500), ("test", 297)):
        left, right = (LatentSource(tmp_path / name, split) for name in ("two", "one"))
        assert len(left) == len(right) == count
        for i in (0, 199, 200, count - 1):  # of the first two files, and the last
            assert left[i]["captions"] == right[i]["captions"]
            np.testing.assert_allclose(
                left[i]["moments"], right[i]["moments"], rtol=1e-5, atol=1e-5
            )


def measured(tmp_path, *given):
    """What evaluate writes in two processes."""
    output, _ = launch(*given, f"--out={tmp_path}", processes=2, devices=1, command="evaluate")
    assert output.count("evaluation.json") == 1 and (tmp_path / "evaluation.png").is_file()
    return json.loads((tmp_path / "evaluation.json").read_text())


def assert_same_figures(found, expected):
    assert found.keys() == expected.keys() and 5 < found["psnr"] < 40
    for name, value in expected.items():
        if isinstance(value, float):
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(of_two, tmp_path):
    found = measured(tmp_path, f"--workdir={of_two}", "--num_samples=10", "--max_real=50")
    sampling = dict.fromkeys(("steps", "guidance_scale", "sampler"))
    expected, samples = evaluate.evaluate(of_two, 10, 50, 0, **sampling)
    assert_same_figures(found, expected)
    drawn = np.asarray(PIL.Image.open(tmp_path / "evaluation.png"), int)
    assert drawn.std() > 10  # not blank
    assert np.abs(drawn - images.grid(samples, columns=10)).max() <= 1


@pytest.mark.slow
def test_two_processes_measure_a_first_stage_as_one_does(of_two, tmp_path):
    given = (f"--first_stage={of_two}", "--max_real=20", "--image_size=16", "--batch_size=8")
    found = measured(tmp_path, *given)
    data = {"image_size": 16}
    expected, _ = evaluate.evaluate_first_stage(of_two, data, max_real=20, batch_size=8)
    assert_same_figures(found, expected)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.optimizer.learningrate=1", "unknown config key 'optimizer.learningrate'"),
        ("--config.batch_size=6", "batch_size=6 is not divisible by the mesh's data * fsdp = 4"),
    ],
)
def test_an_error_is_said_once(tmp_path, data_dir, flag, said):
    given = (*flags(tmp_path / "run", data_dir, 4), flag)
    output, errors = launch(*given, processes=2, devices=2, status=2)
    assert output == "" and errors.count(said) == 1 and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_commands_that_draw_refuse(tmp_path, monkeypatch):
    several = {"NUM_PROCESSES": "2", "PROCESS_ID": "1", "COORDINATOR_ADDRESS": "127.0.0.1:1"}
    env = os.environ | {f"JAX_{name}": value for name, value in several.items()}
    done = subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.sample", f"--workdir={tmp_path}"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the work of one process, and it is started as one of 2" in done.stderr
