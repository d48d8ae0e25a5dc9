"""Others' checkpoints, from tokens to pixels, against the pipelines of `diffusers`."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import latent_diffusion_jax
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import schedulers
from tests.stable_diffusion_files import make_pipeline

PROMPT, NEGATIVE = "a photo of a red circle", "blue"
NOISE = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
rng = np.random.default_rng(1)
PHOTO = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(rng.integers(0, 2, (8, 8)), np.full((4, 4), 255)).astype(np.uint8))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    """uint8 against floats in [0, 1]: to within rounding, and a picture at all."""
    assert theirs.std() > 0.02
    difference = np.abs(ours / 255.0 - theirs)
    assert difference.max() <= 1.01 / 255 and difference.mean() < 0.3 / 255


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    return folder, make_pipeline(folder)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd2")
    return folder, make_pipeline(folder, version=2, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpaint")
    return folder, make_pipeline(folder, in_channels=9)


@pytest.fixture
def copy(first, tmp_path):
    return shutil.copytree(first[0], tmp_path / "copy")


def draw_theirs(pipeline, prompts=1, noise=NOISE[:1], **options):
    return pipeline(
        [PROMPT] * prompts,
        negative_prompt=[NEGATIVE] * prompts,
        latents=nchw(noise),
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize(
    ("version", "guidance_scale"),
    [("first", 7.5), ("second", 1.0), *(pytest.param(*other, marks=pytest.mark.slow)
     for other in (("first", 1.0), ("second", 7.5)))],
)  # fmt: skip
def test_txt2img_equals_diffusers(version, guidance_scale, request):
    folder, reference = request.getfixturevalue(version)
    pipe = latent_diffusion_jax.load(folder)
    ours = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images=2,
        steps=8,
        guidance_scale=guidance_scale,
        latents=NOISE,
    )
    theirs = draw_theirs(reference, 2, NOISE, num_inference_steps=8, guidance_scale=guidance_scale)
    assert_same_picture(ours, theirs)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpm++_2m", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
def test_other_samplers_honour_the_checkpoints_scheduler(copy, first, sampler, scheduler):
    reference, file = first[1], copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    if sampler in ("euler", "unipc"):  # as in the published checkpoints, which do not say it
        del config["timestep_spacing"]
        file.write_text(json.dumps(config))
    config = diffusers.PNDMScheduler.from_pretrained(file.parent).config
    options = {"clip_sample": False} if sampler == "ddim" else {}
    swapped = diffusers.StableDiffusionPipeline(
        **reference.components
        | {"scheduler": getattr(diffusers, scheduler).from_config(config, **options)},
        requires_safety_checker=False,
    )
    swapped.set_progress_bar_config(disable=True)
    ours = latent_diffusion_jax.load(copy)(
        PROMPT, negative_prompt=NEGATIVE, steps=10, guidance_scale=5.0, sampler=sampler,
        latents=NOISE[:1],
    )  # fmt: skip
    assert_same_picture(ours, draw_theirs(swapped, num_inference_steps=10, guidance_scale=5.0))


def test_guidance_rescale_equals_diffusers(second):
    folder, reference = second
    options = dict(guidance_scale=7.5, guidance_rescale=0.7)
    ours = latent_diffusion_jax.load(folder)(
        PROMPT, negative_prompt=NEGATIVE, steps=6, latents=NOISE[:1], **options
    )
    assert_same_picture(ours, draw_theirs(reference, num_inference_steps=6, **options))


def use_noise(monkeypatch, *modules):
    """diffusers' pipelines draw our starting noise."""
    for module in modules:
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: nchw(NOISE[:1]).reshape(shape)
        )


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_img2img_equals_diffusers(second, strength, monkeypatch):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    folder, reference = second
    use_noise(monkeypatch, module)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        **reference.components, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        image=PHOTO,
        strength=strength,
        negative_prompt=NEGATIVE,
        num_inference_steps=10,
        guidance_scale=5.0,
        output_type="np",
    ).images
    ours = latent_diffusion_jax.load(folder)(
        PROMPT, image=PHOTO, strength=strength, negative_prompt=NEGATIVE, steps=10,
        guidance_scale=5.0, latents=NOISE[:1],
    )  # fmt: skip
    assert_same_picture(ours, theirs)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("model", ["second", "painter"])
def test_inpainting_equals_diffusers(model, strength, request, monkeypatch):
    """By putting known parts back, and by a UNet that sees the mask."""
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as module

    folder, reference = request.getfixturevalue(model)
    use_noise(monkeypatch, module)
    components = dict(reference.components)
    sampler = {}
    if model == "painter":  # PLMS of diffusers, cut short, starts with a step of the wrong length
        scheduler = diffusers.DDIMScheduler.from_config(
            reference.scheduler.config, clip_sample=False
        )
        components["scheduler"] = scheduler
        sampler = {"sampler": "ddim"}
    pipeline = diffusers.StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        image=PHOTO,
        mask_image=MASK,
        height=32,
        width=32,
        strength=strength,
        negative_prompt=NEGATIVE,
        num_inference_steps=10,
        guidance_scale=5.0,
        output_type="np",
    ).images
    ours = latent_diffusion_jax.load(folder)(
        PROMPT, image=PHOTO, mask=MASK, strength=strength, negative_prompt=NEGATIVE, steps=10,
        guidance_scale=5.0, latents=NOISE[:1], **sampler,
    )  # fmt: skip
    assert_same_picture(ours, theirs)


def test_a_model_that_sees_masks_needs_one(painter):
    pipe = latent_diffusion_jax.load(painter[0])
    with pytest.raises(UserError, match="this model paints into images: give image and mask"):
        pipe(PROMPT)


# --- what cannot be loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"lacks the folder\(s\) unet"),
        ("scheduler", r"lacks the folder\(s\) scheduler"),
        ("text_encoder", r"lacks the folder\(s\) text_encoder"),
        ("tokenizer/vocab.json", None),
        ("tokenizer", r"lacks the folder\(s\) tokenizer"),
        ("unet/config.json", "unet"),
        ("unet/diffusion_pytorch_model.safetensors", "unet"),
        ("scheduler/scheduler_config.json", "cannot read .*scheduler_config.json"),
    ],
)
def test_a_missing_component_is_named(copy, part, message):
    path = copy / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        if message is None:  # tokenizers have two sets of files
            (copy / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
            message = "tokenizer"
            if not path.exists():
                path = copy / "tokenizer" / "tokenizer_config.json"
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match=message):
        latent_diffusion_jax.load(copy)


def test_parts_that_do_not_fit_one_another_are_refused(copy, second, tmp_path):
    config = copy / "unet" / "config.json"
    values = json.loads(config.read_text())
    values["cross_attention_dim"] = 48
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match="misshapen"):
        latent_diffusion_jax.load(copy)


def test_a_tokenizer_of_another_checkpoint_is_refused(copy):
    file = copy / "tokenizer" / "tokenizer.json"
    if file.exists():
        values = json.loads(file.read_text())
        values["model"]["vocab"]["extra"] = len(values["model"]["vocab"])
        file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="it is not the checkpoint's"):
        latent_diffusion_jax.load(copy)


def test_a_text_encoder_that_is_missing_is_noticed(copy):
    index = copy / "model_index.json"
    values = json.loads(index.read_text())
    values |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="attends to vectors of 32 and there is no text encoder"):
        latent_diffusion_jax.load(copy)


def test_unsupported_schedulers_are_replaced_or_refused(copy):
    config = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"prediction_type": "flow"}))
    with pytest.raises(UserError, match="has prediction_type 'flow'; known are epsilon, sample"):
        latent_diffusion_jax.load(copy)
    config.write_text(json.dumps(values | {"thresholding": True}))
    with pytest.raises(UserError, match="has thresholding, which is not supported"):
        latent_diffusion_jax.load(copy)
    config.write_text(json.dumps(values | {"_class_name": "LMSDiscreteScheduler"}))
    assert latent_diffusion_jax.load(copy).model.settings.sampler == "ddim"


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet", {"sample_size": "abc"}, "config.json has sample_size 'abc'; .* of 1 to 16384, or"),
        ("unet", {"sample_size": []}, r"has sample_size \[\]"),
        ("unet", {"sample_size": {}}, "has sample_size {}"),
        ("unet", {"sample_size": float("inf")}, "has sample_size inf"),
        ("unet", {"sample_size": -64}, "has sample_size -64"),
        ("unet", {"sample_size": 10**9}, "has sample_size 1000000000"),
        ("unet", {"sample_size": [8, "8"]}, r"has sample_size \[8, '8'\]"),
        ("vae", {"scaling_factor": 0}, "has scaling_factor 0; it must be a finite number above 0"),
        ("vae", {"scaling_factor": -1}, "has scaling_factor -1; it must be"),
        ("vae", {"scaling_factor": float("nan")}, "has scaling_factor nan; it must be"),
        ("vae", {"scaling_factor": 10**400}, "has scaling_factor 1000"),
        ("vae", {"scaling_factor": 1e-60}, "has scaling_factor 1e-60; it must be"),  # 0 in float32
        ("vae", {"scaling_factor": True}, "has scaling_factor True; it must be"),
        ("vae", {"mid_block_add_attention": "false"}, "has mid_block_add_attention 'false'; it"),
        ("scheduler", {"steps_offset": -5}, "scheduler_config.json has steps_offset -5"),
    ],
)
def test_numbers_that_cannot_be_are_refused(copy, part, change, said):
    path = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        latent_diffusion_jax.load(copy)


def test_whatever_a_folder_raises_is_one_error_with_its_path(copy, monkeypatch):
    def fail(*_):
        raise KeyError("surprise\nand more")

    monkeypatch.setattr(schedulers, "read_config", fail)
    with pytest.raises(UserError, match=rf"^cannot use {copy}: KeyError: 'surprise"):
        latent_diffusion_jax.load(copy)


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no model: it has neither model_index\.json"):
        latent_diffusion_jax.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        latent_diffusion_jax.load(tmp_path / "none")
