"""A checkpoint of a workdir, `<workdir>/<stage>/<step>`, is a model or a first stage of its own."""

import logging
import shutil

import jax
import numpy as np
import pytest

from latent_diffusion_jax import convert, encode, evaluate, first_stages, loading, pipelines
from latent_diffusion_jax.runtime import checkpoints, trees
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.train import train
from tests.checkpoint_files import rewrite_item


@pytest.fixture
def workdir(smoke_config, tmp_path):
    """With the checkpoints of two steps of each stage."""
    smoke_config.keep_checkpoints = 2
    smoke_config.first_stage.ema_decay = smoke_config.ema_decay = 0.5
    assert train(smoke_config, tmp_path / "run")
    return tmp_path / "run"


def assert_same(tree, other):
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def test_it_is_opened_by_its_path(workdir, tmp_path):
    params = {step: loading.load_model(workdir / "diffusion" / step).params for step in "24"}
    assert_same(params["4"], loading.load_model(workdir).params)
    same = jax.tree.map(np.array_equal, params["2"], params["4"])
    assert jax.tree.all(same["autoencoder"]) and not jax.tree.all(same["unet"])
    shapes = {"ema": {"unet": jax.tree.map(jax.typeof, params["2"]["unet"])}}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = checkpoints.abstract(shapes, jax.tree.map(lambda _: place, shapes))
    saved = checkpoints.restore_part(workdir / "diffusion", 2, wanted)
    assert_same(params["2"]["unet"], saved["ema"]["unet"])

    stages = {
        step: first_stages.open_first_stage(workdir / "first_stage" / step).params for step in "24"
    }
    assert_same(stages["4"], first_stages.open_first_stage(workdir).params)
    assert not jax.tree.all(jax.tree.map(np.array_equal, stages["2"], stages["4"]))

    # Only those that are there; and their figures do not take the place of the workdir's own.
    for stage, opens in (
        ("diffusion", loading.load_model),
        ("first_stage", first_stages.open_first_stage),
    ):
        with pytest.raises(UserError, match=rf"no checkpoint .*{stage}/3; .* of steps 2, 4$"):
            opens(workdir / stage / "3")
    for flags in ((f"{workdir}/diffusion/2", None), (None, f"{workdir}/first_stage/2")):
        with pytest.raises(UserError, match=r"results of one checkpoint, .*/2, need --out=FOLDER"):
            evaluate.what_to_measure(*flags, None, [])
        path, out, alone = evaluate.what_to_measure(*flags, str(tmp_path), [])
        assert (str(path), out, alone) == (flags[0] or flags[1], tmp_path, flags[0] is None)


@pytest.mark.parametrize("name", ["diffusion", "first_stage"])
def test_a_folder_with_such_a_name_is_what_it_holds(trained_workdir, tmp_path, name):
    """A workdir `<stage>/1`, another one that is not there yet, a folder of something else."""
    home = tmp_path / name
    shutil.copytree(trained_workdir, home / "1")
    assert checkpoints.workdir_and_step(home / "1", "first_stage") == (home / "1", 4)
    assert checkpoints.workdir_and_step(home / "1", "diffusion") == (home / "1", 4)
    assert checkpoints.workdir_and_step(home / "2", name) == (home / "2", None)
    (home / "3" / "vae").mkdir(parents=True)
    assert checkpoints.workdir_and_step(home / "3", name) == (home / "3", None)


def test_a_first_stage_without_a_scale_is_told_of(workdir, tmp_path, caplog):
    """Which is measured at the end: one checkpoint of before can be used, and is warned of."""
    path = workdir / "first_stage" / "2"
    with caplog.at_level(logging.WARNING, logger="absl"):
        convert.convert([str(path)], "diffusers", str(tmp_path / "vae"))
    assert [r for r in caplog.records if f"{path} has no scale of its latents" in r.getMessage()]
    config, found, origin = encode.open_inputs(None, str(path))
    assert found.scale_factor is None and origin == path and config.data.image_size == 32


def test_what_is_frozen_is_not_written_again(workdir):
    for step in (2, 4):
        with checkpoints.open_manager(workdir / "diffusion") as manager:
            names = trees.flatten_names(manager.item_metadata(step)["state"].tree)
        assert {name.split("/")[0] for name in names} == {"step", "params", "ema", "opt"}
        assert not [name for name in names if "autoencoder" in name]


def test_weights_that_are_no_numbers_draw_no_picture(trained_workdir):
    model = loading.load_model(trained_workdir)
    model.params["unet"] = jax.tree.map(lambda x: x * np.nan, model.params["unet"])
    with pytest.raises(UserError, match=r"is no picture, but not finite.*large for float32"):
        pipelines.Pipeline(model)("a duck", steps=1, seed=0)


def test_a_first_stage_without_a_scale_is_not_built_upon(trained_workdir, tmp_path):
    shutil.copytree(trained_workdir, tmp_path / "run")
    folder = tmp_path / "run" / "first_stage" / "4"
    rewrite_item(folder, "info", {})
    with pytest.raises(UserError, match=r"in .*first_stage has no scale_factor"):
        loading.load_model(tmp_path / "run")
