"""What a second stage can be told: nothing, or classes; in latents and in pixels.

Each is trained for a few steps, drawn with, and resumed or written out.
"""

import dataclasses
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import latent_diffusion_jax
from configs import class_cond, pixel, unconditional
from latent_diffusion_jax import loading, saving
from latent_diffusion_jax.convert import convert
from latent_diffusion_jax.pipelines import Pipeline
from latent_diffusion_jax.runtime import trees
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.train import train

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def trained(config, tmp_path_factory, data_dir):
    config.data.data_dir = data_dir
    workdir = tmp_path_factory.mktemp("run")
    assert train(config, workdir)
    return workdir


def with_first_stage(config, workdir):
    """The first stage is there already."""
    config.first_stage.init_from, config.stages = str(workdir), ("diffusion",)
    return config


def smallest(config):
    """One level without attention, the labels added to the timesteps."""
    config.unet.channel_multipliers, config.unet.attention_levels = (1,), ()
    config.unet.attention, config.class_embedding.width = "self", 0
    return config


def draw(pipe, *args, **options):
    return pipe(*args, **options).astype(int)


# Without a condition.


@pytest.fixture(scope="module")
def free_workdir(tmp_path_factory, data_dir, trained_workdir):
    config = with_first_stage(unconditional.get_config("smoke"), trained_workdir)
    return trained(config, tmp_path_factory, data_dir)


def test_an_unconditional_model_draws(free_workdir):
    pipe = latent_diffusion_jax.load(free_workdir)
    assert pipe.tokenizer is None and pipe.ldm.conditioner is None
    images = draw(pipe, num_images=3, seed=5)
    assert images.shape == (3, 32, 32, 3) and images.std() > 1
    assert np.abs(images[1] - draw(pipe, seed=6)[0]).max() <= 1
    assert np.abs(images[0] - images[1]).max() > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "a seven"}, "takes no prompt"),
        ({"negative_prompt": "a seven"}, "takes no prompt"),
        ({"label": 3}, "takes no label"),
        ({"guidance_scale": 2.0}, "guidance_scale must be 1"),
    ],
)
def test_what_an_unconditional_model_does_not_take(free_workdir, arguments, said):
    with pytest.raises(UserError, match=said):
        latent_diffusion_jax.load(free_workdir)(**arguments)


def test_an_unconditional_model_becomes_a_pipeline_of_diffusers(
    free_workdir, tmp_path, monkeypatch
):
    convert([str(free_workdir)], "diffusers", str(tmp_path / "out"), part="model")
    written = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    written.set_progress_bar_config(disable=True)
    ours = latent_diffusion_jax.load(free_workdir)
    again = latent_diffusion_jax.load(tmp_path / "out")
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    options = dict(latents=noise, steps=4)
    found = draw(ours, **options)
    assert np.abs(found - draw(again, **options)).max() <= 1
    monkeypatch.setattr(  # the pipeline takes no noise
        sys.modules[diffusers.LDMPipeline.__module__],
        "randn_tensor",
        lambda *args, **kwargs: torch.tensor(noise).permute(0, 3, 1, 2),
    )
    theirs = written(num_inference_steps=4, output_type="np").images
    assert np.abs(found - 255 * theirs).max() <= 1.01


def test_what_diffusers_cannot_hold_is_refused_before_anything_is_written(free_workdir, tmp_path):
    model = loading.load_model(free_workdir)
    unet = model.ldm.unet.clone(attention="transformer")
    other = dataclasses.replace(model, ldm=dataclasses.replace(model.ldm, unet=unet))
    with pytest.raises(UserError, match="attention='self' alone"):
        saving.save_diffusers(tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


# Classes.


@pytest.fixture(scope="module")
def class_workdir(tmp_path_factory, data_dir, trained_workdir):
    config = with_first_stage(class_cond.get_config("smoke"), trained_workdir)
    return trained(config, tmp_path_factory, data_dir)


@pytest.fixture(scope="module")
def pixel_workdir(tmp_path_factory, data_dir):
    """In the space of pixels."""
    return trained(smallest(pixel.get_config("smoke")), tmp_path_factory, data_dir)


@pytest.fixture(params=["class_workdir", "pixel_workdir"])
def labelled_workdir(request):
    return request.getfixturevalue(request.param)


def with_visible_labels(workdir) -> Pipeline:
    """The trained model with weights as large as after a longer training."""
    model = loading.load_model(workdir)
    rng = np.random.default_rng(0)

    def louder(x):
        x = np.asarray(x)
        return x + rng.normal(scale=0.3, size=x.shape).astype(np.float32)

    names = [name for name in ("unet", "conditioner") if name in model.params]
    model.params.update({name: jax.tree.map(louder, model.params[name]) for name in names})
    return Pipeline(model)


def test_labels_by_name_and_by_number(labelled_workdir):
    pipe = with_visible_labels(labelled_workdir)
    assert list(pipe.model.label_names) == NAMES
    assert pipe.model.null_label == 10 and pipe.ldm.num_labels == 11
    images = draw(pipe, label=["seven", 3, "3"], seed=[4, 4, 4])
    assert images.shape == (3, 32, 32, 3)
    assert np.abs(images[1] - images[2]).max() <= 1
    assert np.abs(images[0] - images[1]).max() > 1
    several = draw(pipe, label=[7, 3], num_images=2, seed=4)
    assert np.abs(several[0] - images[0]).max() <= 1
    plain = draw(pipe, label=7, seed=4, guidance_scale=1.0)
    assert np.abs(several[0] - plain[0]).max() > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give a label"),
        ({"prompt": "a seven"}, "takes no prompt"),
        ({"label": "ten"}, "unknown label 'ten'; known: zero, one"),
        ({"label": 10}, r"label 10 must be in 0\.\.9"),
        ({"label": [3, -1]}, r"label -1 must be in 0\.\.9"),
        ({"label": []}, "no prompts or labels"),
    ],
)
def test_wrong_labels(labelled_workdir, arguments, said):
    with pytest.raises(UserError, match=said):
        latent_diffusion_jax.load(labelled_workdir)(**arguments)


def test_models_of_classes_are_no_pipelines_of_diffusers(labelled_workdir, tmp_path):
    with pytest.raises(UserError, match=r"no pipeline .* for models of classes"):
        saving.save_diffusers(tmp_path / "out", loading.load_model(labelled_workdir))
    assert not (tmp_path / "out").exists()


def test_pixels_have_no_first_stage(pixel_workdir):
    assert not (pixel_workdir / "first_stage").exists()
    pipe = latent_diffusion_jax.load(pixel_workdir)
    assert pipe.ldm.autoencoder is None and pipe.params.keys() == {"unet"}
    assert pipe.model.settings.clip == 1.0


@pytest.mark.slow
def test_learned_variance_in_pixels(tmp_path, data_dir):
    config = smallest(pixel.get_config("smoke"))
    config.data.data_dir = data_dir
    config.objective.learned_variance = True
    config.sample.sampler, config.sample.variance = "ddpm", "learned"
    config.num_steps = 2
    assert train(config, tmp_path)
    pipe = latent_diffusion_jax.load(tmp_path)
    assert pipe.ldm.unet.out_channels == 6 and pipe.ldm.image_channels == 3
    assert draw(pipe, label=1).shape == (1, 32, 32, 3)


def test_subfolders_are_classes(tmp_path, data_dir):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = smallest(pixel.get_config("smoke"))
    config.data.name, config.data.caption_key = str(tmp_path / "pets"), ""
    config.sample.labels = (1, 0)
    assert train(config, tmp_path / "run")
    assert loading.load_model(tmp_path / "run").label_names == ["cat", "dog"]
    config.sample.labels = (1, 2)
    with pytest.raises(UserError, match=r"sample.labels=\(1, 2\): the data has 2 labels"):
        train(config, tmp_path / "other")


def test_both_splits_need_labels(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / name)
    config = pixel.get_config("smoke")
    config.data.name, config.data.caption_key = str(tmp_path), ""
    with pytest.raises(UserError, match=r"both splits .*'train' has 2 classes, 'test' has 0"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_labels_cannot_be_told_by_class(tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "b.png")
    config = pixel.get_config("smoke")
    config.data.name, config.data.caption_key = str(tmp_path), ""
    with pytest.raises(UserError, match=r"conditioning='class' needs labels, and data .* has none"):
        train(config, tmp_path / "run")


def test_only_what_is_trained_is_averaged_and_kept(class_workdir):
    shapes = loading.load_model(class_workdir).params
    table = trees.flatten_names(shapes["conditioner"])
    assert {name: leaf.shape for name, leaf in table.items()} == {"label_embed/embedding": (11, 16)}
