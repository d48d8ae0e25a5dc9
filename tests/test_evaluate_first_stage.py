"""The evaluate command on first stages: others' checkpoints on a folder, and workdirs."""

import json
import pathlib
import shutil
import subprocess
import sys

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from latent_diffusion_jax import evaluate
from latent_diffusion_jax.evaluation import reconstruction
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.evaluation.ssim import ssim
from latent_diffusion_jax.models.inception import InceptionV3
from latent_diffusion_jax.models.lpips import LPIPS, VGG_BLOCKS
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import inception, mapping

ROOT = pathlib.Path(__file__).parent.parent
COUNT = 11
NO_DATA = dict.fromkeys(("name", "data_dir", "image_key", "test_split", "image_size"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """A folder of PNGs without captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        small = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(small).resize((32, 32), Image.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def vq_model():
    """A tiny VQModel of diffusers with random weights."""
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=30,
        mid_block_add_attention=False,
    )
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def foreign(vq_model, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("foreign")
    vq_model.save_pretrained(folder)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.evaluate", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def random_inception(path: pathlib.Path) -> pathlib.Path:
    rng, table, tensors = np.random.default_rng(0), inception.table(), {}
    for name, shape in inception.shapes().items():
        theirs, layout = table[name]
        if len(shape) > 1:
            x = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        else:
            x = np.full(shape, name.endswith(("scale", "var")))
        tensors[theirs] = np.ascontiguousarray(mapping.TO_THEIRS[layout](x.astype(np.float16)))
    safetensors.numpy.save_file(tensors, str(path))
    return path


def random_lpips(path: pathlib.Path) -> pathlib.Path:
    rng, tensors, index, channels = np.random.default_rng(0), {}, 0, 3
    for block, widths in enumerate(VGG_BLOCKS):
        for width in widths:
            kernel = rng.normal(size=(width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
            tensors[f"features.{index}.weight"] = kernel.astype(np.float16)
            tensors[f"features.{index}.bias"] = np.zeros(width, np.float16)
            index, channels = index + 2, width
        index += 1
        weights = rng.uniform(size=(1, channels, 1, 1))
        tensors[f"lin{block}.model.1.weight"] = weights.astype(np.float16)
    safetensors.numpy.save_file(tensors, str(path))
    return path


def test_command_measures_a_diffusers_folder_on_a_folder_of_pngs(
    foreign, vq_model, pictures, tmp_path
):
    out = tmp_path / "new" / "results"
    done = run(
        f"--first_stage={foreign}",
        f"--data_name={pictures}",
        "--image_size=16",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    assert "codebook_usage" in done.stdout and str(out) in done.stdout
    figures = json.loads((out / "evaluation.json").read_text())
    settings = figures.pop("settings")
    assert settings["images"] == COUNT and settings["image_size"] == 16
    assert settings["data_name"] == str(pictures) and settings["first_stage"] == str(foreign)

    # By diffusers' own model, image by image.
    x = np.stack(
        [images.resize_and_crop(Image.open(path), 16) for path in sorted(pictures.iterdir())]
    )
    with torch.no_grad():
        z = vq_model.encode(torch.tensor(x / 127.5 - 1).float().permute(0, 3, 1, 2)).latents
        y = images.to_uint8(vq_model.decode(z).sample.permute(0, 2, 3, 1).numpy())
        codes = vq_model.quantize(z)[2][2].numpy()
    for name, values in (("psnr", psnr(x, y)), ("ssim", ssim(x, y))):
        np.testing.assert_allclose(figures[name], values.mean(), rtol=1e-3)
        np.testing.assert_allclose(figures[f"{name}_std"], values.std(), rtol=1e-2)
    assert figures["codebook_usage"] == len(np.unique(codes)) / 30
    assert 1 <= figures["codebook_perplexity"] <= len(np.unique(codes))

    # Eight images of 96 pixels in a row (enlarged, each pixel repeated), two pixels between them.
    shown = np.asarray(Image.open(out / "evaluation.png"))
    assert shown.shape == (3 * 98 + 2, 8 * 98 + 2, 3)
    np.testing.assert_array_equal(shown[2:98:6, 2:98:6], x[0])
    assert np.abs(shown[2:98:6, 100:196:6].astype(int) - y[0]).max() <= 1


def measure(path, **kwargs):
    data = {key: kwargs.pop(key, None) for key in NO_DATA}
    return evaluate.evaluate_first_stage(pathlib.Path(path), data, **kwargs)


def shapes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_weights_files_reach_lpips_and_inception(foreign, pictures, tmp_path, monkeypatch):
    """Here as parameters only: the networks have tests of their own, and take long."""
    seen = {}

    def note(*_, lpips_params, inception_params, **__):
        seen.update(lpips=shapes(lpips_params), inception=shapes(inception_params))
        return {"rfid": 1.0}, np.zeros((2, 8, 8, 3), np.uint8)

    monkeypatch.setattr(reconstruction, "measure_reconstructions", note)
    files = {
        "lpips_file": str(random_lpips(tmp_path / "lpips.safetensors")),
        "inception_file": str(random_inception(tmp_path / "inception.safetensors")),
    }
    figures, _ = measure(foreign, name=str(pictures), image_size=16, **files)
    assert figures["rfid"] == 1.0
    x = np.zeros((1, 16, 16, 3), np.float32)
    for name, network, args in (("lpips", LPIPS(), (x, x)), ("inception", InceptionV3(), (x,))):
        assert seen[name] == shapes(
            jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
        )
    measure(foreign, name=str(pictures), image_size=16, lpips_file="", inception_file="")
    assert seen == {"lpips": None, "inception": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --data_name=FOLDER .* and --image_size=PIXELS$"),
        ({"name": "somewhere"}, "give --image_size=PIXELS$"),
        ({"image_size": 16}, r"give --data_name=FOLDER \(or a TFDS dataset\)$"),
    ],
)
def test_foreign_checkpoints_need_data(foreign, given, message):
    with pytest.raises(UserError, match=message) as error:
        measure(foreign, **given)
    assert str(foreign) in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 17}, "image_size=17 is not divisible .* 16 or 18"),
        ({"image_size": 12, "lpips_file": "none"}, "LPIPS needs at least 16 pixels"),
        ({"inception_file": "none.pth"}, r"none\.pth"),
        ({"lpips_file": "none.safetensors"}, r"none\.safetensors"),
        ({"name": "/not/there"}, "data folder /not/there does not exist"),
        ({"test_split": "validation"}, "not 'validation'"),
        ({"batch_size": 3}, r"batch_size=3 is not divisible .* = 8"),
    ],
)
def test_what_cannot_be_measured_is_one_error(foreign, pictures, given, message):
    with pytest.raises(UserError, match=message):
        measure(foreign, **{"name": str(pictures), "image_size": 16} | given)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        measure(tmp_path / "none", name="x", image_size=16)


@pytest.fixture(scope="module")
def first_stage_workdir(trained_workdir, tmp_path_factory) -> pathlib.Path:
    """A workdir in which the second stage has not begun."""
    workdir = tmp_path_factory.mktemp("first") / "workdir"
    shutil.copytree(trained_workdir / "first_stage", workdir / "first_stage")
    return workdir


@pytest.mark.slow
def test_command_measures_a_workdir_that_has_a_first_stage_alone(first_stage_workdir):
    done = run(f"--workdir={first_stage_workdir}", "--max_real=40", "--batch_size=16")
    assert done.returncode == 0, done.stderr
    figures = json.loads((first_stage_workdir / "evaluation.json").read_text())
    assert figures.keys() == {"psnr", "psnr_std", "ssim", "ssim_std", "settings"}
    assert figures["settings"]["images"] == 40
    assert figures["settings"]["data_name"] == "handwritten_digits"
    assert (first_stage_workdir / "evaluation.png").exists()
    again, pairs = measure(first_stage_workdir, max_real=40)
    np.testing.assert_allclose(again["psnr"], figures["psnr"], rtol=1e-4)
    assert pairs.shape == (64, 32, 32, 3)


def test_both_ways_of_measuring_agree(trained_workdir):
    """The two-stage evaluation's PSNR is that of its first stage."""
    both, _ = evaluate.evaluate(trained_workdir, num_samples=10, max_real=50, seed=0, steps=1)
    alone, _ = measure(trained_workdir, max_real=50)
    np.testing.assert_allclose(alone["psnr"], both["psnr"], rtol=1e-5)


def test_a_workdir_on_other_data_and_sizes(first_stage_workdir, pictures):
    figures, pairs = measure(first_stage_workdir, name=str(pictures), image_size=16)
    assert figures["settings"]["images"] == COUNT, "all of a folder that was not trained on"
    assert pairs.shape == (2 * COUNT, 16, 16, 3)


def test_flags_that_do_not_go_together(trained_workdir, first_stage_workdir, foreign, tmp_path):
    both, first, theirs = map(str, (trained_workdir, first_stage_workdir, foreign))
    what = evaluate.what_to_measure
    for workdir, first_stage in ((None, None), (both, theirs)):
        with pytest.raises(UserError, match="one of --workdir=FOLDER and --first_stage=PATH"):
            what(workdir, first_stage, None, [])
    for stage in (both, theirs):
        with pytest.raises(UserError, match="give --out=FOLDER"):
            what(None, stage, None, [])
    with pytest.raises(UserError, match=f"--split is for .* give --first_stage={both}"):
        what(both, None, None, ["split"])
    for workdir, first_stage in ((first, None), (None, first)):
        with pytest.raises(UserError, match="--steps is about samples"):
            what(workdir, first_stage, None, ["split", "steps"])


def test_where_results_go(trained_workdir, first_stage_workdir, foreign, tmp_path):
    both, first, theirs = trained_workdir, first_stage_workdir, foreign
    what, out = evaluate.what_to_measure, str(tmp_path)
    assert what(str(both), None, None, ["steps"]) == (both, both, False)
    assert what(str(both), None, out, []) == (both, tmp_path, False)
    assert what(str(first), None, None, ["split"]) == (first, first, True)
    assert what(None, str(first), None, []) == (first, first, True)
    assert what(None, str(both), out, []) == (both, tmp_path, True)
    assert what(None, str(theirs), out, []) == (theirs, tmp_path, True)


def test_an_error_of_the_command_is_one_line(foreign, tmp_path):
    done = run(f"--first_stage={foreign}", f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: nothing says what")
    assert "Traceback" not in done.stderr
