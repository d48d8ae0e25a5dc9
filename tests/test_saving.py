"""Whole models out of the package and back: diffusers' pipelines draw the same pictures."""

import json
import tempfile

import diffusers
import jax
import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import load_file, save_file

import latent_diffusion_jax
from configs import txt2img
from latent_diffusion_jax import build, loading, saving
from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.convert import convert
from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.pipelines import Pipeline
from latent_diffusion_jax.runtime.errors import UserError
from tests.stable_diffusion_files import make_pipeline
from tests.torch_networks import draw_params

PROMPT, NEGATIVE = "a photo of a red circle", "blue"
NOISE = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
SETTINGS = dict(steps=5, guidance_scale=5.0)


def draw(pipe, **options):
    return pipe(PROMPT, negative_prompt=NEGATIVE, latents=NOISE, **SETTINGS, **options) / 255.0


def draw_theirs(pipeline, noise=NOISE, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [PROMPT],
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        num_inference_steps=5,
        guidance_scale=5.0,
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize(
    ("version", "prediction_type"),
    [(1, "epsilon"), (2, "v_prediction"), pytest.param(2, "sample", marks=pytest.mark.slow)],
)
def test_stable_diffusion_to_diffusers_and_back(version, prediction_type, tmp_path):
    make_pipeline(tmp_path / "in", version=version, prediction_type=prediction_type)
    convert([str(tmp_path / "in")], "diffusers", str(tmp_path / "out"), part="model")
    written = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    ours = draw(latent_diffusion_jax.load(tmp_path / "out"))
    theirs = draw_theirs(written, negative_prompt=[NEGATIVE])
    assert theirs.std() > 0.02
    assert np.abs(ours - theirs).max() <= 1.01 / 255
    original = latent_diffusion_jax.load(tmp_path / "in")
    same = dict(sampler="dpm++_2m", spacing="trailing")
    ours = draw(latent_diffusion_jax.load(tmp_path / "out"), **same)
    assert np.abs(ours - draw(original, **same)).max() <= 1.01 / 255


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """A folder of diffusers, and the same model in one file, without notes in its metadata."""
    folder = tmp_path_factory.mktemp("single")
    make_pipeline(folder / "in", groups=32, width=64)
    convert([str(folder / "in")], "compvis", str(folder / "noted.safetensors"), part="model")
    file = folder / "model.safetensors"
    save_file(load_file(folder / "noted.safetensors"), file)
    return folder / "in", file


def test_single_files_written_here_need_no_arguments(single_file):
    folder, file = single_file
    original = loading.load_model(folder)
    found = loading.load_model(file.parent / "noted.safetensors")
    assert found.settings == original.settings
    for name in ("autoencoder", "conditioner", "unet", "image_size", "prediction_type"):
        assert getattr(found.ldm, name) == getattr(original.ldm, name)
    assert found.tokenizer.files == original.tokenizer.files
    ours, theirs = (jax.tree.leaves(model.params) for model in (found, original))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction_type": 3}, "is damaged, or of another version"),
        ({"colour": "red"}, "is damaged, or of another version"),
        ({"tokenizer": {"vocab.json": 1}}, "is damaged, or of another version"),
        ({"label_names": ["cat", 2]}, "is damaged, or of another version"),
        ({"settings": {"speed": 1}}, "of another version: it has the setting 'speed'"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"prediction_type": "w"}, "unknown prediction_type 'w'"),
        ({"tokenizer": {"../evil.json": "{}"}}, r"has a tokenizer's file '\.\./evil\.json'"),
        ({"tokenizer": {"..": "{}"}}, r"has a tokenizer's file '\.\.'; known are vocab\.json"),
        ({"tokenizer": {"": "{}"}}, "has a tokenizer's file ''; known"),
        ({"tokenizer": {"a\0": "{}"}}, r"has a tokenizer's file 'a\\x00'; known"),
        ({"tokenizer": {"a\ud800": "{}"}}, r"has a tokenizer's file 'a\\ud800'; known"),
        ({"tokenizer": {"a" * 300: "{}"}}, "has a tokenizer's file 'a{59}; known"),
        (
            {"tokenizer": {"vocab.json": "\ud800"}},
            "vocab.json in the metadata of .*changed",
        ),
        ({"tokenizer": {"tokenizer.json": "{"}}, "the tokenizer in the metadata of .*changed"),
        (
            {"tokenizer": {"vocab.txt": "a"}},
            "the metadata of .*changed.* holds no CLIPTok",
        ),
        ({"settings": {"guidance_scale": "x"}}, "guidance_scale must be a finite number, got 'x'"),
        ({"settings": {"guidance_interval": 5}}, "guidance_interval must be two numbers, got 5"),
        ({"settings": {"guidance_interval": [0]}}, "guidance_interval must be two numbers"),
        (
            {"settings": {"sampler": {}}},
            "changed.* says how to sample: unknown sampler {}",
        ),
        ({"settings": {"steps": "50"}}, "steps must be an integer, got '50'"),
        ({"settings": {"steps": 1001}}, r"number of sampling steps must be in 1\.\.1000, got 1001"),
        ({"settings": {"eta": None}}, "eta must be a finite number, got None"),
        ({"settings": {"clip": -1}}, "clip must not be negative, got -1"),
        ({"settings": {"offset": -5}}, "offset must not be negative, got -5"),
        ({"settings": {"spacing": 3}}, "unknown timestep spacing 3; known: trailing"),
        ({"settings": {"epsilon_of_clipped": "no"}}, "epsilon_of_clipped must be true or false"),
        ({"image_size": 0}, "has image_size 0; it must be an integer of 1 to 16384"),
        ({"null_label": 3}, "the metadata of .* has a null_label, and its model no classes"),
        ({"num_heads": 0}, "has num_heads 0; it must be an integer of 1 to 16384"),
    ],
)
def test_damaged_notes_are_refused(single_file, tmp_path, change, said):
    _, file = single_file
    noted = file.parent / "noted.safetensors"
    with safetensors.safe_open(str(noted), "numpy") as found:
        notes = json.loads(found.metadata()["latent_diffusion_jax"])
    path = tmp_path / "changed.safetensors"
    save_file(load_file(noted), path, {"latent_diffusion_jax": json.dumps(notes | change)})
    with pytest.raises(UserError, match=said) as error:
        loading.load_model(path)
    assert tempfile.gettempdir() + "/tmp" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -0.18215, np.nan, np.inf, 1e-300])
def test_a_scale_that_is_none_is_refused(single_file, tmp_path, scale):
    noted = load_file(single_file[1].parent / "noted.safetensors")
    save_file(noted | {"scale_factor": np.array(scale)}, tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match=r"changed\.safetensors has .*(above 0|positive)"):
        loading.load_model(
            tmp_path / "changed.safetensors", tokenizer=single_file[0] / "tokenizer", num_heads=2
        )


def test_single_files_hold_the_same_model(single_file):
    folder, file = single_file
    original = latent_diffusion_jax.load(folder)
    pipe = latent_diffusion_jax.load(file, tokenizer=folder / "tokenizer", num_heads=2)
    assert pipe.model.settings.sampler == original.model.settings.sampler == "plms"
    options = dict(height=32, width=32)
    assert np.abs(draw(pipe, **options) - draw(original, **options)).max() <= 1.01 / 255
    for a, b in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(original.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_averages_in_single_files_are_taken_unless_asked_not_to(single_file, tmp_path):
    folder, file = single_file
    tensors = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    average = "model_ema.diffusion_modelinput_blocks00weight"
    save_file(tensors | {average: 2 * tensors[name]}, tmp_path / "both.safetensors")
    for ema, factor in ((True, 2.0), (False, 1.0)):
        model = loading.load_model(
            tmp_path / "both.safetensors", tokenizer=folder / "tokenizer", num_heads=2, ema=ema
        )
        kernel = model.params["unet"]["conv_in"]["kernel"]
        np.testing.assert_allclose(kernel, factor * tensors[name].transpose(2, 3, 1, 0), rtol=1e-6)


def test_what_single_files_do_not_say_can_be_said(single_file):
    folder, file = single_file
    options = dict(tokenizer=folder / "tokenizer", num_heads=2)
    assert loading.load_model(file, **options).ldm.prediction_type == "epsilon"
    model = loading.load_model(file, prediction_type="v", **options)
    assert model.ldm.prediction_type == "v"
    with pytest.raises(UserError, match="unknown prediction_type 'w'; known: epsilon, z_0, v"):
        loading.load_model(file, prediction_type="w", **options)


def test_models_that_paint_become_pipelines_that_paint(tmp_path):
    make_pipeline(tmp_path / "in", in_channels=9)
    convert([str(tmp_path / "in")], "diffusers", str(tmp_path / "out"), part="model")
    written = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(written).__name__ == "StableDiffusionInpaintPipeline"
    assert type(written.scheduler).__name__ == "PNDMScheduler"
    assert loading.load_model(tmp_path / "out").sees_mask


def test_single_files_that_lack_something_are_refused(single_file, tmp_path):
    folder, file = single_file
    with pytest.raises(
        UserError, match="holds no tokenizer, as only files that were written here do"
    ):
        latent_diffusion_jax.load(file, num_heads=2)
    tensors = load_file(file)
    lost = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({k: x for k, x in tensors.items() if k != lost}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"1 missing: .*middle_block\.0\.in_layers\.2\.weight"):
        latent_diffusion_jax.load(
            tmp_path / "less.safetensors", tokenizer=folder / "tokenizer", num_heads=2
        )
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        latent_diffusion_jax.load(tmp_path / "cut.safetensors", tokenizer=folder / "tokenizer")


def papers_model(channels: int, num_groups: int) -> Model:
    """The paper's model in miniature, with its prompts of 77 tokens and random weights."""
    config = txt2img.get_config("smoke")
    config.tokenizer.max_length = 77
    network = config.first_stage.autoencoder
    network.z_channels = network.embed_dim = 4
    network.channel_multipliers = (1, 1, 1, 1)  # diffusers' f is 8
    for section in (network, config.unet):
        section.channels, section.num_groups = channels, num_groups
    words = tokenizers.train([PROMPT, NEGATIVE] * 20, 300, 77)
    tokenizer = tokenizers.prompt_tokenizer(words)
    ldm = build.latent_diffusion(config, tokenizer.vocab_size, 77)
    tokens = jax.numpy.zeros((1, 77), jax.numpy.int32)
    latents = jax.numpy.zeros((1, 4, 4, 4))
    context = jax.numpy.zeros((1, 77, ldm.conditioner.width))
    params = {
        "autoencoder": draw_params(ldm.autoencoder, jax.numpy.zeros((1, 32, 32, 3))),
        "scale_factor": np.float32(0.7),
        "conditioner": draw_params(ldm.conditioner, tokens, seed=1),
        "unet": draw_params(ldm.unet, latents, jax.numpy.zeros(1), context, seed=2),
    }
    return Model(ldm, params, tokenizer, build.sample_settings(config))


def test_what_was_trained_here_becomes_a_pipeline_of_diffusers(tmp_path):
    model, noise = papers_model(channels=16, num_groups=4), NOISE[:, :4, :4]
    saving.save_diffusers(tmp_path / "out", model)

    written = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(written).__name__ == "LDMTextToImagePipeline"
    theirs = draw_theirs(written, noise, height=32, width=32, eta=0.0)
    ours = Pipeline(model)(PROMPT, latents=noise, **SETTINGS) / 255.0
    assert theirs.std() > 0.02
    assert np.abs(ours - theirs).max() <= 1.01 / 255
    again = latent_diffusion_jax.load(tmp_path / "out")(PROMPT, latents=noise, **SETTINGS) / 255.0
    assert np.abs(again - theirs).max() <= 1.01 / 255


def test_a_trained_workdir_exports(trained_workdir, tmp_path):
    convert([str(trained_workdir)], "diffusers", str(tmp_path / "out"), part="model")
    assert (
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").sample_size == 8
    )
    with pytest.raises(UserError, match="num_groups"):
        convert([str(trained_workdir)], "compvis", str(tmp_path / "a.safetensors"), part="model")


def test_what_was_trained_here_in_one_file(tmp_path):
    model = papers_model(channels=32, num_groups=32)
    assert model.ldm.conditioner.num_heads == 2  # not the usual 8
    saving.save_single_file(tmp_path / "model.safetensors", model)
    found = loading.load_model(tmp_path / "model.safetensors")
    assert (found.ldm.conditioner, found.ldm.unet.heads) == (
        model.ldm.conditioner,
        model.ldm.unet.heads,
    )
    assert found.settings == model.settings and found.ldm.image_size == 32
    texts = [PROMPT, NEGATIVE]
    np.testing.assert_array_equal(found.tokenizer.encode(texts), model.tokenizer.encode(texts))
    images = [Pipeline(m)(PROMPT, steps=2, seed=3).astype(int) for m in (found, model)]
    assert np.abs(images[0] - images[1]).max() <= 1
