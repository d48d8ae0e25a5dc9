"""CLIP's frozen text encoder as what a second stage is told by."""

import shutil

import jax
import numpy as np
import pytest

import latent_diffusion_jax
from configs import base
from latent_diffusion_jax import conditions
from latent_diffusion_jax.convert import convert
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.train import train
from tests.clip_files import make_text_encoder_folder, make_tokenizer_folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    size = make_tokenizer_folder(folder / "tokenizer")
    make_text_encoder_folder(folder / "text_encoder", size)
    return folder


def clip_config(clip_folder, data_dir):
    config = base.miniature("clip", smoke=True)
    config.data.data_dir = data_dir
    config.clip.path, config.clip.dtype = str(clip_folder), "float32"
    return config


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clip_stays_as_it_is_and_the_workdir_holds_it(
    clip_folder, data_dir, trained_workdir, tmp_path, stopped
):
    folder = tmp_path / "copy"
    shutil.copytree(clip_folder, folder)
    config, workdir = clip_config(folder, data_dir), tmp_path / "run"
    config.first_stage.init_from, config.stages = str(trained_workdir), ("diffusion",)
    steps = iter(range(100))
    assert stopped != train(  # in the second stage
        config, workdir, should_stop=lambda: stopped and next(steps) > 2
    )
    shutil.rmtree(folder)  # what was begun does without it
    assert train(config, workdir)
    wanted = conditions.open_clip(clip_folder).clip.params
    pipe = latent_diffusion_jax.load(workdir)
    assert not pipe.ldm.trained_conditioner
    found = jax.tree.map(np.asarray, pipe.params["conditioner"])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    images = pipe(["a red circle", "a blue square"], seed=[1, 1])
    assert images.shape == (2, 32, 32, 3)
    convert([str(workdir)], "diffusers", str(tmp_path / "out"), part="model")
    again = latent_diffusion_jax.load(tmp_path / "out")
    same = again(["a red circle", "a blue square"], seed=[1, 1], sampler="ddim", steps=4,
                spacing="trailing", guidance_scale=2.0, height=32, width=32)  # fmt: skip
    assert np.abs(same.astype(int) - images).max() <= 1


def test_a_folder_without_clip(clip_folder, data_dir, tmp_path):
    config = clip_config(clip_folder / "tokenizer", data_dir)
    with pytest.raises(UserError, match="has no folder text_encoder/"):
        train(config, tmp_path / "run")
