"""The convert command: each format into each other, and bad requests in one line."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL, VQModel

from latent_diffusion_jax import first_stages
from latent_diffusion_jax.convert import convert
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import autoencoders, files, mapping
from latent_diffusion_jax.weights import lpips as lpips_weights

ROOT = pathlib.Path(__file__).parent.parent


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.convert", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def assert_same(a: autoencoders.Loaded, b: autoencoders.Loaded):
    assert (a.kind, a.fields) == (b.kind, b.fields)
    ours, theirs = flatten_names(a.params), flatten_names(b.params)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VQ model that diffusers saved."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("diffusers") / "vqvae"
    VQModel(block_out_channels=[32], num_vq_embeddings=9, scaling_factor=0.5).save_pretrained(path)
    return path


def test_diffusers_to_compvis_and_back(folder, tmp_path):
    original = autoencoders.load(folder)
    for prefix in (False, True):
        file, back = str(tmp_path / "new" / f"{prefix}.safetensors"), str(tmp_path / f"{prefix}")
        convert([str(folder)], "compvis", file, prefix=prefix)
        names = safetensors.numpy.load_file(file).keys()
        assert any(name.startswith("first_stage_model.") for name in names) == prefix
        convert([file], "diffusers", back)
        again = autoencoders.load(back)
        assert_same(again, original)
        assert again.scaling_factor == (0.5 if prefix else 1.0)  # no place for it without
        assert VQModel.from_pretrained(back, low_cpu_mem_usage=False).config.vq_embed_dim == 3


def test_a_workdir_becomes_a_model_of_diffusers(trained_workdir, tmp_path):
    stage = first_stages.open_first_stage(trained_workdir)
    convert([str(trained_workdir)], "diffusers", str(tmp_path / "vae"))
    model = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    assert model.config.scaling_factor == float(stage.scale_factor)
    assert model.config.sample_size == stage.config.data.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    images = np.broadcast_to(images, (2, 16, 16, stage.fields["image_channels"]))
    ours = jax.jit(stage.network.apply)({"params": stage.params}, images)
    with torch.no_grad():
        theirs = model(torch.tensor(images).permute(0, 3, 1, 2)).sample
    expected = theirs.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # As the source it is a network of its own again, without what only computes it differently.
    again = autoencoders.load(tmp_path / "vae")
    fields = {key: stage.fields[key] for key in again.fields}
    assert again.fields == fields | {
        key: tuple(fields[key]) for key in ("channel_multipliers", "attention_levels")
    }
    with pytest.raises(UserError, match="--num_groups is for CompVis files; the workdir"):
        convert([str(trained_workdir)], "diffusers", str(tmp_path / "vae"), num_groups=8)


def test_groups_can_be_given(tmp_path):
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4).save_pretrained(tmp_path / "vae")
    loaded = autoencoders.load(tmp_path / "vae")
    source, out = str(tmp_path / "a.safetensors"), str(tmp_path / "out")
    # As a fork of CompVis' code with other groups would write it.
    autoencoders.save_compvis(source, "kl", loaded.fields | {"num_groups": 32}, loaded.params)
    with pytest.raises(UserError, match="32 groups do not divide"):
        convert([source], "diffusers", out)
    convert([source], "diffusers", out, num_groups=4)
    assert_same(autoencoders.load(out), loaded)


def test_lpips_sources_make_one_file(tmp_path):
    images = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    tensors = {
        name: torch.tensor(x)
        for name, x in mapping.to_theirs(lpips_weights._table(), params).items()
    }
    for name, start in (("vgg16.pth", "features."), ("vgg.pth", "lin")):
        state = {key: x for key, x in tensors.items() if key.startswith(start)}
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
    out = tmp_path / "lpips.safetensors"
    done = command(
        f"--source={tmp_path}/vgg16.pth", f"--source={tmp_path}/vgg.pth", "--to=lpips",
        f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/vgg16.pth and {tmp_path}/vgg.pth -> {out}"
    loaded = lpips_weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--source=a", "--to=onnx", "--out=a"), "onnx"),
        (("--source=none.ckpt", "--to=diffusers", "--out=a"), "cannot read weights none.ckpt"),
    ],
)
def test_bad_requests_are_refused_in_one_line(flags, message):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "a").exists()


def test_what_cannot_be_converted_is_refused(folder, tmp_path):
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="a first stage has one source, got 2"):
        convert([str(folder), str(folder)], "diffusers", out)
    with pytest.raises(UserError, match=r"cannot read LPIPS weights none\.pth"):
        convert(["none.pth"], "lpips", out)
    with pytest.raises(UserError, match="no diffusers folder"):
        convert([str(tmp_path)], "compvis", out)
    config = json.loads((folder / "config.json").read_text()) | {"norm_num_groups": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    files.write(tmp_path / weights, files.read(folder / weights))
    with pytest.raises(UserError, match="cannot express num_groups 16"):
        convert([str(tmp_path)], "compvis", out)
    assert not pathlib.Path(out).exists()
