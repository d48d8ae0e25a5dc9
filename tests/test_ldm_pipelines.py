"""LDM's and DDPM's own pipelines, from prompts or noise to pixels, against those of `diffusers`."""

import importlib
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch

import latent_diffusion_jax
from latent_diffusion_jax.runtime.randomness import normal_per_key
from tests.ldm_files import (
    TEXT_BETAS,
    as_published,
    make_pixels,
    make_text_to_image,
    make_unconditional,
)

PROMPTS = ["a photo of a red circle", "blue star, above the green square"]
SEEDS = [3, 11]


def starting_noise(channels: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, channels)).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def draw(folder, *prompts, **options) -> np.ndarray:
    """What a pipeline of ours draws before it is rounded to 8 bits, in [0, 1]."""
    pipe, found = latent_diffusion_jax.load(folder), []
    run = pipe._run

    def keep(*arguments):
        found.append(run(*arguments))
        return found[-1]

    pipe._run = keep
    rounded = pipe(*prompts, **options)
    ((images, _),) = found
    images = np.asarray(images)[: len(rounded)] / 2 + 0.5
    assert np.abs(rounded / 255.0 - images).max() <= 0.501 / 255
    return images


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 5e-5) -> None:
    """Two arrays of pixels in [0, 1], and of a picture at all."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() < tolerance


def step_noise(call: int, shape: tuple[int, ...]) -> np.ndarray:
    """What our sampler adds after a call of the network, for images of `SEEDS`."""
    keys = jax.vmap(jax.random.key)(np.array(SEEDS, np.uint32))
    keys = jax.vmap(jax.random.split)(keys)[:, 1]
    return np.array(normal_per_key(jax.vmap(jax.random.fold_in, (0, None))(keys, call), shape))


def use_noise(monkeypatch, pipeline, noise: np.ndarray) -> None:
    """Lets a pipeline start from this noise, and its scheduler draw what our sampler draws."""
    calls = iter(range(1000))
    scheduler = importlib.import_module(type(pipeline.scheduler).__module__)
    monkeypatch.setattr(
        scheduler,
        "randn_tensor",
        lambda *_, **__: channels_first(step_noise(next(calls), noise.shape[1:])),
    )
    monkeypatch.setattr(
        importlib.import_module(type(pipeline).__module__),
        "randn_tensor",
        lambda shape, **_: channels_first(noise).reshape(shape),
    )


# --- text to image -------------------------------------------------------------------------------


def draw_theirs(pipeline, **options):
    noise = channels_first(starting_noise(4, 4))
    return pipeline(PROMPTS, latents=noise, output_type="np", **options).images


def draw_ours(folder, **options):
    return draw(folder, PROMPTS, seed=SEEDS, latents=starting_noise(4, 4), **options)


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text2im")
    return folder, make_text_to_image(folder)


@pytest.mark.parametrize(("guidance_scale", "eta"), [(6.0, 0.0), (3.0, 0.3)])
def test_text_to_image_equals_diffusers(guidance_scale, eta, text_to_image, monkeypatch):
    folder, reference = text_to_image
    use_noise(monkeypatch, reference, starting_noise(4, 4))
    options = dict(guidance_scale=guidance_scale, eta=eta)
    theirs = draw_theirs(reference, num_inference_steps=8, **options)
    ours = draw_ours(folder, steps=8, **options)
    assert ours.shape == (2, 32, 32, 3)
    assert_same_picture(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": True}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_schedulers_put_in_its_place_equal_diffusers(kind, options, text_to_image, tmp_path):
    """Those that need no scaled input, which this pipeline does not give them."""
    folder, reference = text_to_image
    scheduler = getattr(diffusers, kind)(**TEXT_BETAS, **options)
    swapped = diffusers.LDMTextToImagePipeline(**reference.components | {"scheduler": scheduler})
    swapped.set_progress_bar_config(disable=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    scheduler.save_pretrained(copy / "scheduler")
    theirs = draw_theirs(swapped, num_inference_steps=10, guidance_scale=5.0)
    assert_same_picture(draw_ours(copy, steps=10, guidance_scale=5.0), theirs)


def test_oblong_text_to_image_without_guidance_equals_diffusers(text_to_image):
    folder, reference = text_to_image
    noise = np.random.default_rng(1).normal(size=(1, 2, 6, 4)).astype(np.float32)
    options = dict(height=16, width=48, guidance_scale=1.0)
    theirs = reference(
        PROMPTS[:1], latents=channels_first(noise), num_inference_steps=4, output_type="np",
        **options,
    ).images  # fmt: skip
    ours = draw(folder, PROMPTS[0], latents=noise, steps=4, **options)
    assert_same_picture(ours, theirs)


def test_text_to_image_as_it_was_published(text_to_image, tmp_path):
    """Old names of the autoencoder's attention, pickled weights, configs that say less."""
    copy = shutil.copytree(text_to_image[0], tmp_path / "copy")
    as_published(copy)
    index = json.loads((copy / "model_index.json").read_text())
    assert index["vqvae"] == ["diffusers", "AutoencoderKL"]
    assert index["bert"] == ["latent_diffusion", "LDMBertModel"]
    names = torch.load(copy / "vqvae" / "diffusion_pytorch_model.bin")
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in names
    reference = diffusers.LDMTextToImagePipeline.from_pretrained(copy)
    reference.set_progress_bar_config(disable=True)
    theirs = draw_theirs(reference, num_inference_steps=5, guidance_scale=6.0)
    assert_same_picture(draw_ours(copy, steps=5, guidance_scale=6.0), theirs)


# --- without text --------------------------------------------------------------------------------


def draw_unconditional(folder, **options):
    return draw(folder, num_images=2, seed=SEEDS, latents=starting_noise(3), **options)


@pytest.mark.parametrize(("scaling_factor", "eta"), [(1.0, 0.0), (0.6, 1.0)])
def test_unconditional_ldm_equals_diffusers(scaling_factor, eta, tmp_path, monkeypatch):
    reference = make_unconditional(tmp_path, scaling_factor)
    use_noise(monkeypatch, reference, starting_noise(3))
    theirs = reference(batch_size=2, num_inference_steps=10, eta=eta, output_type="np").images
    ours = draw_unconditional(tmp_path, steps=10, eta=eta)
    assert ours.shape == (2, 32, 32, 3)
    assert_same_picture(ours, theirs)


def test_unconditional_ldm_as_it_was_published(tmp_path, monkeypatch):
    """Its config does not name the scale of the latents, which is 1, and not diffusers' default."""
    make_unconditional(tmp_path)
    as_published(tmp_path)
    reference = diffusers.LDMPipeline.from_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    reference.vqvae.register_to_config(scaling_factor=1.0)
    use_noise(monkeypatch, reference, starting_noise(3))
    theirs = reference(batch_size=2, num_inference_steps=6, output_type="np").images
    assert_same_picture(draw_unconditional(tmp_path, steps=6), theirs)


# google/ddpm-cifar10-32
SIN_COS = dict(flip_sin_to_cos=False, freq_shift=1, downsample_padding=0)


@pytest.mark.parametrize(
    ("variance_type", "layout"),
    [
        ("fixed_large", {}),
        ("fixed_small", {"attention_head_dim": 8, "norm_eps": 1e-5}),
        ("fixed_large", SIN_COS),
    ],
)
def test_ddpm_in_pixels_equals_diffusers(variance_type, layout, tmp_path, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type=variance_type, clip_sample=True)
    reference = make_pixels(tmp_path, "DDPMPipeline", scheduler, **layout)
    use_noise(monkeypatch, reference, starting_noise(3))
    theirs = reference(batch_size=2, num_inference_steps=20, output_type="np").images
    ours = draw_unconditional(tmp_path, steps=20)
    assert ours.shape == (2, 8, 8, 3)
    assert_same_picture(ours, theirs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_in_pixels_equals_diffusers(eta, tmp_path, monkeypatch):
    """The network's own epsilon is used, not that which the clipped image implies.

    So its rounding errors are not clipped away.
    """
    reference = make_pixels(tmp_path, "DDIMPipeline", diffusers.DDIMScheduler(clip_sample=True))
    use_noise(monkeypatch, reference, starting_noise(3))
    theirs = reference(batch_size=2, num_inference_steps=10, eta=eta, output_type="np").images
    assert_same_picture(draw_unconditional(tmp_path, steps=10, eta=eta), theirs, 3e-4)


def test_pixels_as_they_were_published(tmp_path, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    make_pixels(tmp_path, "DDPMPipeline", scheduler)
    as_published(tmp_path)
    reference = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    use_noise(monkeypatch, reference, starting_noise(3))
    theirs = reference(batch_size=2, num_inference_steps=10, output_type="np").images
    assert_same_picture(draw_unconditional(tmp_path, steps=10), theirs)
