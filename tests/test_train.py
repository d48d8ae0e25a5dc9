"""The train command: stages in order, resumed bit for bit, stopped cleanly, errors up front."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers

import latent_diffusion_jax
from configs import pixel
from latent_diffusion_jax.planning import programs
from latent_diffusion_jax.runtime import checkpoints, saved_programs, sharding
from latent_diffusion_jax.runtime.errors import DataError, StorageError, UserError
from latent_diffusion_jax.train import train
from latent_diffusion_jax.training import batches
from latent_diffusion_jax.workdirs import check_config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def image_folder(tmp_path):
    """One of 20 images."""
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (40, 36), (i * 10, 0, 0)).save(folder / f"{i:02}.png")
    return folder


def stop_after(calls):
    """A should_stop that says yes at its `calls`-th question."""
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= calls


def final_state(workdir, stage):
    """Every leaf of a stage's last checkpoint, as numpy, by path."""
    step = checkpoints.latest_step(workdir / stage)
    with checkpoints.open_manager(workdir / stage) as manager:
        state = manager.restore(step)["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip


def assert_same_state(workdir, other, stage):
    left, right = final_state(workdir, stage), final_state(other, stage)
    assert left.keys() == right.keys() and len(left) > 50
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=f"{stage} {name}")


def test_a_finished_run_holds_all_it_should(trained_workdir):
    for stage in ("first_stage", "diffusion"):
        assert checkpoints.latest_step(trained_workdir / stage) == 4
        assert any((trained_workdir / "tensorboard" / stage).glob("events*"))
    info = checkpoints.read_json(trained_workdir / "first_stage", 4, "info")
    assert 0.01 < info["scale_factor"] < 100
    path = trained_workdir / "diffusion" / "4" / "tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    assert "Ġseven" in tokenizer.encode("a handwritten seven").tokens
    config = checkpoints.read_json(trained_workdir / "diffusion", 4, "config")
    assert config["unet"]["channels"] == 8
    assert checkpoints.read_json(trained_workdir / "diffusion", 4, "data") == {"next_index": 4}
    rows = [json.loads(line) for line in (trained_workdir / "metrics.jsonl").open()]
    for stage, name in (("first_stage", "train/rec_loss"), ("diffusion", "train/loss"),
                        ("first_stage", "test/psnr"), ("diffusion", "test/loss")):  # fmt: skip
        assert any(row["stage"] == stage and name in row for row in rows), (stage, name)


def test_a_finished_run_is_left_alone(trained_workdir, smoke_config):
    before = {p: p.stat().st_mtime_ns for p in trained_workdir.rglob("4/**/*") if p.is_file()}
    assert train(smoke_config, trained_workdir)
    after = {p: p.stat().st_mtime_ns for p in trained_workdir.rglob("4/**/*") if p.is_file()}
    assert before == after and before


def test_scale_factor_is_one_over_the_latents_deviation(trained_workdir, smoke_config):
    from latent_diffusion_jax import build, first_stages
    from latent_diffusion_jax.runtime import sharding
    from latent_diffusion_jax.runtime.images import to_float

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    frozen = first_stages.load_frozen(smoke_config, trained_workdir, mesh)
    source, _ = build.data_sources(smoke_config)
    prepare = build.example_maker(smoke_config)
    images = np.stack([prepare(source[i], None)["image"] for i in range(32)])
    network = build.autoencoder(smoke_config)
    z = network.apply({"params": frozen["autoencoder"]}, to_float(images), method="encode").mean
    np.testing.assert_allclose(float(z.std() * frozen["scale_factor"]), 1.0, rtol=1e-4)


def test_stopped_and_resumed_is_bit_identical(trained_workdir, smoke_config, tmp_path):
    # It asks before every stage, after every step, before the batches that are evaluated and before
    # the pictures: stops at step 1 of the first stage (between two checkpoints), then at step 3 of
    # the second.
    for calls in (2, 15):
        assert not train(smoke_config, tmp_path, stop_after(calls))
    assert checkpoints.latest_step(tmp_path / "first_stage") == 4
    assert checkpoints.latest_step(tmp_path / "diffusion") == 3
    assert train(smoke_config, tmp_path)
    for stage in ("first_stage", "diffusion"):
        assert_same_state(trained_workdir, tmp_path, stage)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").open())
    steps = [(row["stage"], row["step"]) for row in rows if "train/loss" in row]
    assert len(steps) == len(set(steps)), "a step was logged twice"


@pytest.mark.parametrize(
    "after",
    ["train/loss", pytest.param("test/psnr", marks=pytest.mark.slow)],
    ids=["evaluating", "measuring the latents' scale"],
)
def test_a_stop_at_the_end_of_a_stage_costs_one_step(
    after, trained_workdir, smoke_config, tmp_path
):
    def rows(kind):
        found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [row["step"] for row in found if row["stage"] == "first_stage" and kind in row]

    def at_the_end() -> bool:
        return (tmp_path / "metrics.jsonl").exists() and 4 in rows(after)

    assert not train(smoke_config, tmp_path, at_the_end)
    assert checkpoints.latest_step(tmp_path / "first_stage") == 3
    assert (4 in rows("test/psnr")) == (after == "test/psnr"), "the evaluation went on"
    assert train(smoke_config, tmp_path)
    assert rows(after).count(4) == 1
    for stage in ("first_stage", "diffusion"):
        assert_same_state(trained_workdir, tmp_path, stage)


@pytest.mark.slow  # steps in halves are tested in test_diffusion_stage.py
def test_parameters_in_bfloat16_are_kept_and_drawn_with(data_dir, tmp_path):
    config = pixel.get_config("smoke")
    config.data.data_dir = data_dir
    config.param_dtype = config.ema_dtype = config.optimizer.mu_dtype = "bfloat16"
    assert not train(config, tmp_path / "stopped", stop_after(4))
    for name in ("stopped", "whole"):
        assert train(config, tmp_path / name)
    assert_same_state(tmp_path / "whole", tmp_path / "stopped", "diffusion")
    dtypes = {
        name: leaf.dtype.name
        for name, leaf in final_state(tmp_path / "whole", "diffusion").items()
        if leaf.ndim
    }
    halves = {name for name, dtype in dtypes.items() if dtype == "bfloat16"}
    assert all(name in halves for name in dtypes if "params" in name or "ema" in name)
    assert any("opt" in name for name in halves) and any(
        "opt" in name for name in dtypes.keys() - halves
    )
    images = latent_diffusion_jax.load(tmp_path / "whole")(label=[3, 7], seed=0)
    assert images.shape == (2, 32, 32, 3) and images.std() > 1


def fit_elsewhere(config):
    """What makes a run fit other machines, and leaves the results what they are."""
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    config.accumulation = 2
    config.unet.remat = config.first_stage.autoencoder.remat = "full"


def test_a_run_may_be_made_to_fit_other_machines(trained_workdir, smoke_config):
    fit_elsewhere(smoke_config)
    check_config(json.loads(smoke_config.to_json()), trained_workdir)
    smoke_config.first_stage.accumulation = 2  # its discriminator sees micro-batches
    with pytest.raises(UserError, match=r"first_stage\.accumulation \(there 1, now 2\)"):
        check_config(json.loads(smoke_config.to_json()), trained_workdir)


@pytest.mark.slow  # stopped runs, which go on in the same way, are tested above
def test_a_run_can_be_made_longer(trained_workdir, smoke_config, tmp_path):
    import shutil

    shutil.copytree(trained_workdir, tmp_path / "run")
    smoke_config.num_steps = 6
    fit_elsewhere(smoke_config)
    assert train(smoke_config, tmp_path / "run")
    assert checkpoints.latest_step(tmp_path / "run" / "diffusion") == 6


def test_another_configs_workdir_is_refused(trained_workdir, smoke_config):
    smoke_config.unet.channels = 16
    with pytest.raises(UserError, match=r"another config's run.*unet\.channels \(there 8, now 16"):
        train(smoke_config, trained_workdir)


def check_refused(config, tmp_path, match):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=match):
        train(config, workdir)
    assert not workdir.exists(), "something was done before the error"


def test_bad_input_is_refused_before_anything_is_written(smoke_config, tmp_path):
    def config(**changes):
        changed = smoke_config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        return changed

    check_refused(
        config(**{"data.name": str(tmp_path / "none")}), tmp_path, "data folder .* not exist"
    )
    check_refused(config(**{"data.name": "no_such_data"}), tmp_path, "neither a folder nor a TFDS")
    check_refused(
        config(batch_size=12), tmp_path, r"batch_size=12 is not divisible .*8; 8 or 16 would"
    )
    check_refused(config(**{"first_stage.batch_size": 3}), tmp_path, r"first_stage\.batch_size=3")
    check_refused(config(**{"mesh.fsdp": 3}), tmp_path, "8 devices cannot be split")
    check_refused(
        config(**{"data.image_size": 33}), tmp_path, r"data\.image_size=33 must be a multiple"
    )
    check_refused(config(**{"first_stage.loss.lpips_weights": "none.safetensors"}), tmp_path,
            r"cannot read LPIPS weights none\.safetensors")  # fmt: skip


def test_damaged_images_stop_the_run_before_the_first_step(smoke_config, tmp_path, image_folder):
    for path in image_folder.iterdir():
        path.with_suffix(".txt").write_text(f"red number {path.stem}")
    damaged = image_folder / "07.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    smoke_config.data.name = str(image_folder)
    smoke_config.data.holdout_share = 0.2
    check_refused(smoke_config, tmp_path, r"1 of \d+ images cannot be decoded.*7\.png")
    smoke_config.data.max_damaged_share = 0.2
    smoke_config.stages = ("first_stage",)
    assert train(smoke_config, tmp_path / "run")


@pytest.mark.parametrize("asked_to_stop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_that_vanishes_ends_the_run_with_everything_saved(
    smoke_config, asked_to_stop, tmp_path, image_folder
):
    """A run that loses its data and gets it back ends as one that never did."""
    folder, away = image_folder, tmp_path / "away"
    smoke_config.stages = ("first_stage",)
    smoke_config.data.name, smoke_config.data.caption_key = str(folder), ""
    smoke_config.data.holdout_share, smoke_config.data.retry_seconds = 0.2, 0.0
    smoke_config.data.num_threads = 1  # which reads few batches in advance
    first = smoke_config.first_stage
    first.num_steps = smoke_config.checkpoint_every = smoke_config.eval_every = 24
    assert train(smoke_config, tmp_path / "whole")
    asked = []

    def takes_it_away() -> bool:
        asked.append(1)
        if len(asked) == 3:
            folder.rename(away)
        # Asked to stop while it looks for the data.
        return asked_to_stop and sys.exc_info()[0] is DataError

    if asked_to_stop:
        assert not train(smoke_config, tmp_path / "run", takes_it_away)
    else:
        said = r"cannot read the data.*No such file.*; the same command goes on from step (\d+)$"
        with pytest.raises(DataError, match=said) as raised:
            train(smoke_config, tmp_path / "run", takes_it_away)
    step = checkpoints.latest_step(tmp_path / "run" / "first_stage")
    assert 2 <= step < 24
    assert asked_to_stop or str(raised.value).endswith(f" {step}")
    away.rename(folder)
    assert train(smoke_config, tmp_path / "run")
    assert_same_state(tmp_path / "whole", tmp_path / "run", "first_stage")


def test_data_that_vanish_in_the_last_evaluation_cost_one_step(data_dir, tmp_path, monkeypatch):
    config = pixel.get_config("smoke")
    config.data.data_dir, config.num_steps, config.eval_every = data_dir, 2, 2

    def gone(*_, **__):
        raise DataError("cannot read the data")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(batches.pipeline, "eval_batches", gone)
        with pytest.raises(DataError, match=r"the data; the same command goes on from step 1$"):
            train(config, tmp_path)
    assert checkpoints.latest_step(tmp_path / "diffusion") == 1
    assert train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "train/loss" in row] == [2]
    assert [row["step"] for row in rows if "test/loss" in row] == [2]


def test_what_is_wrong_with_data_ends_a_run_that_is_saved_and_can_be_put_right(
    smoke_config, tmp_path, image_folder
):
    """More damaged images than may be, found in the middle; the share may be raised then."""
    smoke_config.stages, smoke_config.checkpoint_every = ("first_stage",), 1000
    smoke_config.data.name, smoke_config.data.caption_key = str(image_folder), ""
    smoke_config.data.holdout_share, smoke_config.data.num_threads = 0.2, 1
    smoke_config.first_stage.num_steps = 24
    asked = []

    def damages_them() -> bool:
        asked.append(1)
        if len(asked) == 3:
            for path in image_folder.glob("*[02468].png"):
                path.write_bytes(path.read_bytes()[:60])
        return False

    with pytest.raises(UserError, match=r"cannot be decoded.*goes on from step (\d+)$") as raised:
        train(smoke_config, tmp_path / "run", damages_them)
    step = checkpoints.latest_step(tmp_path / "run" / "first_stage")
    assert step >= 2 and str(raised.value).endswith(f" {step}")
    smoke_config.data.max_damaged_share = 1.0
    assert train(smoke_config, tmp_path / "run")


def test_a_workdir_that_is_taken_away_is_not_made_anew(smoke_config, tmp_path):
    asked = []

    def takes_it_away() -> bool:
        asked.append(1)
        if len(asked) == 2:
            (tmp_path / "run").rename(tmp_path / "away")
        return False

    with pytest.raises(StorageError, match=r"run is not that of this run any more.*removed, moved"):
        train(smoke_config, tmp_path / "run", takes_it_away)
    assert not list((tmp_path / "run").glob("first_stage/*"))


def test_a_checkpoint_is_no_workdir(trained_workdir, smoke_config):
    path = trained_workdir / "diffusion" / "4"
    with pytest.raises(UserError, match=r"diffusion/4 is a checkpoint; give the folder of its run"):
        train(smoke_config, path)


def test_a_second_stage_keeps_its_first_stage(trained_workdir, smoke_config, tmp_path):
    run, step = tmp_path / "run", 2
    assert not train(smoke_config, run, lambda: checkpoints.latest_step(run / "diffusion") == step)
    shutil.move(run / "first_stage", tmp_path / "away")
    with pytest.raises(UserError, match=r"has a checkpoint of step \d, and the first stage .*gone"):
        train(smoke_config, run)
    # Another one, of the same shapes.
    other = smoke_config.copy_and_resolve_references()
    other.stages, other.first_stage.num_steps, other.seed = ("first_stage",), 4, 1
    assert train(other, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "first_stage", run / "first_stage")
    said = r"trained with another first stage's encoder \(\w{12}\) than this run has \(\w{12}\)"
    with pytest.raises(UserError, match=said):
        train(smoke_config, run)
    shutil.rmtree(run / "first_stage")
    shutil.move(tmp_path / "away", run / "first_stage")
    assert train(smoke_config, run)
    assert_same_state(trained_workdir, run, "diffusion")


def test_checkpoints_know_their_config_where_the_workdir_does_not(
    trained_workdir, smoke_config, tmp_path
):
    shutil.copytree(trained_workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    as_json = json.loads(smoke_config.to_json())
    check_config(as_json, tmp_path / "run")
    as_json["seed"] = 77
    with pytest.raises(UserError, match=r"diffusion/4 is of another .*seed \(there \d+, now 77\)"):
        check_config(as_json, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "diffusion")
    check_config(as_json, tmp_path / "run")  # the first stage may be used with others
    as_json["first_stage"]["loss"]["kl_weight"] = 7.0
    with pytest.raises(UserError, match=r"first_stage/4 is of another .*kl_weight"):
        check_config(as_json, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_ends_the_run(smoke_config, tmp_path, small_files):
    """The disk takes no more after the first checkpoint."""
    smoke_config.stages, smoke_config.checkpoint_every = ("first_stage",), 1
    smoke_config.first_stage.num_steps, smoke_config.eval_every = 12, 1000
    folder = tmp_path / "run" / "first_stage"

    def fills_the_disk() -> bool:
        if checkpoints.latest_step(folder):
            small_files(4_000)
        return False

    with pytest.raises(StorageError, match=r"cannot save a checkpoint in .*File too large"):
        train(smoke_config, tmp_path / "run", fills_the_disk)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    step = checkpoints.latest_step(folder)
    assert [path.name for path in folder.iterdir()] == [str(step)]
    assert step < 12 and train(smoke_config, tmp_path / "run")


def test_the_best_checkpoint_stays(smoke_config, tmp_path):
    smoke_config.stages, smoke_config.keep_checkpoints = ("first_stage",), 1
    smoke_config.first_stage.num_steps, smoke_config.eval_every = 6, 1
    smoke_config.checkpoint_every = 100  # those that are measured are kept all the same
    smoke_config.first_stage.optimizer.learning_rate = 0.3  # so that it gets worse now and then
    smoke_config.first_stage.keep_best = "no_such_figure"
    with pytest.raises(UserError, match=r"keep_best='no_such_figure' is no figure .*psnr"):
        train(smoke_config, tmp_path / "run")
    smoke_config.first_stage.keep_best = "-psnr"
    assert not train(smoke_config, tmp_path / "run", stop_after(7))  # while it measures step 2
    assert train(smoke_config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    scores = {row["step"]: row["test/psnr"] for row in rows if "test/psnr" in row}
    assert sorted(scores) == [1, 2, 3, 4, 5, 6]
    best = max(list(scores)[:-1], key=scores.get)
    steps = {int(p.name) for p in (tmp_path / "run" / "first_stage").iterdir() if p.is_dir()}
    assert steps == {best, 6}, scores


def test_a_run_does_not_go_on_with_other_data(smoke_config, tmp_path, image_folder):
    """One image more, and the order of all of them would be another."""
    folder = image_folder
    smoke_config.stages = ("first_stage",)
    smoke_config.data.name, smoke_config.data.caption_key = str(folder), ""
    smoke_config.data.holdout_share = 0.0
    assert not train(smoke_config, tmp_path / "run", stop_after(3))
    (folder / "19.png").rename(folder / "20.png")
    with pytest.raises(UserError, match=r"data are not those .* began with \(identity: "):
        train(smoke_config, tmp_path / "run")
    shutil.copy(folder / "18.png", folder / "19.png")
    with pytest.raises(UserError, match=r"data are not .* \(records: 19 then, 20 now; identity: "):
        train(smoke_config, tmp_path / "run")
    (folder / "20.png").unlink()
    assert train(smoke_config, tmp_path / "run")


def test_a_stage_is_not_complete_by_the_name_of_a_folder(trained_workdir, smoke_config, tmp_path):
    shutil.copytree(trained_workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "diffusion" / "4" / "state")
    with pytest.raises(UserError, match=r"cannot restore checkpoint .*diffusion/4"):
        train(smoke_config, tmp_path / "run")


def test_the_diffusion_stage_needs_a_first_stage(smoke_config, tmp_path):
    smoke_config.stages = ("diffusion",)
    with pytest.raises(UserError, match="no complete first stage"):
        train(smoke_config, tmp_path / "run")


def command(workdir, data_dir, *more):
    return [sys.executable, "-m", "latent_diffusion_jax.train", "--config=configs/txt2img.py:smoke",
            f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", *more]  # fmt: skip


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, data_dir, number):
    workdir = tmp_path / "run"
    long = ("--config.first_stage.num_steps=1000000", "--config.checkpoint_every=1000000",
            "--config.eval_every=1000000")  # fmt: skip
    process = subprocess.Popen(
        command(workdir, data_dir, *long), cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    metrics, deadline = workdir / "metrics.jsonl", time.time() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + number, errors
    assert "finishing this step" in errors and "the same command goes on from there" in errors
    assert "Traceback" not in errors
    step = checkpoints.latest_step(workdir / "first_stage")
    assert step is not None and f"stopped and saved at step {step} of" in errors
    position = checkpoints.read_json(workdir / "first_stage", step, "data")
    assert position == {"next_index": step}


@pytest.mark.slow
def test_lpips_weights_turn_the_perceptual_loss_on(smoke_config, tmp_path):
    from safetensors.numpy import save_file

    from latent_diffusion_jax.models.lpips import VGG_BLOCKS

    rng, tensors, index, channels = np.random.default_rng(0), {}, 0, 3
    for block, widths in enumerate(VGG_BLOCKS):
        for width in widths:
            kernel = rng.normal(size=(width, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
            tensors[f"features.{index}.weight"] = kernel.astype(np.float32)
            tensors[f"features.{index}.bias"] = np.zeros(width, np.float32)
            index, channels = index + 2, width
        index += 1
        tensors[f"lin{block}.model.1.weight"] = np.ones((1, channels, 1, 1), np.float32)
    save_file(tensors, tmp_path / "lpips.safetensors")

    smoke_config.stages = ("first_stage",)
    smoke_config.first_stage.num_steps = 2
    smoke_config.first_stage.loss.lpips_weights = str(tmp_path / "lpips.safetensors")
    assert train(smoke_config, tmp_path / "run")
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    row = next(row for row in rows if "train/rec_loss" in row)
    # The sum over 32 * 32 * 3 values of |difference| + distance.
    assert row["train/rec_loss"] > 1.05 * 3072 * row["train/l1"]
    state = final_state(tmp_path / "run", "first_stage")
    assert not any("vgg" in name for name in state), "frozen weights are in the checkpoint"

    # They may lie elsewhere later, but not be others.
    smoke_config.first_stage.loss.lpips_weights = str(tmp_path / "moved.safetensors")
    check_config(json.loads(smoke_config.to_json()), tmp_path / "run")
    (tmp_path / "run" / "first_stage" / "2").rename(tmp_path / "2")
    tensors["lin0.model.1.weight"] *= 2
    save_file(tensors, tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match="trained with another set of LPIPS weights"):
        train(smoke_config, tmp_path / "run")
    smoke_config.first_stage.loss.lpips_weights = ""
    with pytest.raises(UserError, match=r"lpips_weights \(there 'given', now ''\)"):
        check_config(json.loads(smoke_config.to_json()), tmp_path / "run")


def test_networks_that_do_not_fit_are_refused_before_the_first_stage(smoke_config, tmp_path):
    smoke_config.tokenizer.vocab_size = 100
    check_refused(smoke_config, tmp_path, r"tokenizer\.vocab_size=100 must be at least")
    smoke_config.tokenizer.vocab_size = 512
    with smoke_config.unlocked():
        smoke_config.unet.chanels = 3
    check_refused(smoke_config, tmp_path, "unexpected keyword argument 'chanels'")
    del smoke_config.unet.chanels
    del smoke_config.unet["channels"]
    check_refused(smoke_config, tmp_path, r"lacks a key.*unet\.channels")


def test_a_workdir_that_cannot_be_made_is_named(smoke_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to workdir .*file"):
        train(smoke_config, tmp_path / "file")


def test_a_loss_that_is_not_finite_is_never_saved(smoke_config, tmp_path):
    smoke_config.first_stage.optimizer.learning_rate = 1e30
    smoke_config.first_stage.optimizer.warmup_steps = 0
    smoke_config.first_stage.num_steps = 40
    smoke_config.log_every = 1000
    with pytest.raises(UserError, match=r"first_stage: .*loss=(nan|inf).* at step \d+, .* kept"):
        train(smoke_config, tmp_path / "run")
    step = checkpoints.latest_step(tmp_path / "run" / "first_stage")
    if step is not None:
        leaves = final_state(tmp_path / "run", "first_stage")
        assert step < 40 and leaves


def test_the_step_that_was_planned_is_the_one_that_runs(smoke_config, tmp_path):
    """Compiled from shapes alone, for the devices that are here."""
    smoke_config.stages = ("first_stage",)
    smoke_config.first_stage.num_steps = smoke_config.log_every = 1
    mesh = sharding.make_mesh(dict(smoke_config.mesh))
    batch_size = smoke_config.first_stage.batch_size
    program = programs.make(smoke_config, "first_stage", mesh, batch_size, num_labels=0)
    with jax.set_mesh(mesh):
        lowered = program.trace().lower()
    saved_programs.save(tmp_path / "here" / "first_stage", lowered, lowered.compile())
    assert train(smoke_config, tmp_path / "run", compiled=tmp_path / "here")
    assert checkpoints.latest_step(tmp_path / "run" / "first_stage") == 1
    smoke_config.first_stage.loss.kl_weight = 0.5
    with pytest.raises(UserError, match="compiled from another config"):
        train(smoke_config, tmp_path / "other", compiled=tmp_path / "here")
