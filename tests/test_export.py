"""The exported program draws what the pipeline draws, with nothing but JAX installed."""

import dataclasses
import errno
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import latent_diffusion_jax
from latent_diffusion_jax import export, loading
from latent_diffusion_jax.loaded_model import with_settings
from latent_diffusion_jax.runtime.errors import UserError
from tests.stable_diffusion_files import make_pipeline

# Runs the loader where only JAX and NumPy can be imported.
ALONE = """
import sys, runpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "latent_diffusion_jax", "transformers", "torch",
                                      "tokenizers", "safetensors", "optax", "orbax", "PIL"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def draw(folder, seed, out):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder / "draw.py"), f"--seed={seed}", f"--out={out}"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(folder)
    return with_settings(loading.load_model(folder), steps=2)


OPTIONS = dict(prompt="a", negative_prompt="", batch_size=1, height=32, width=32, max_chunks=1)


def test_what_is_not_finite_is_not_drawn(model, tmp_path):
    decoder = jax.tree.map(lambda x: x * np.nan, model.params["autoencoder"]["decoder"])
    autoencoder = model.params["autoencoder"] | {"decoder": decoder}
    damaged = dataclasses.replace(model, params=model.params | {"autoencoder": autoencoder})
    export.export(damaged, tmp_path / "out", **OPTIONS)
    with pytest.raises(AssertionError, match="drew is no picture, but not finite"):
        draw(tmp_path / "out", 0, tmp_path / "a.npy")
    assert not (tmp_path / "a.npy").exists()


def test_a_failed_export_leaves_the_older_one(model, tmp_path, monkeypatch):
    names = {"draw.py", "inputs.npz", "program.stablehlo", "weights.safetensors"}
    for name in names:
        (tmp_path / name).write_text("older")
    with pytest.raises(UserError, match="the program: height and width must be multiples of"):
        export.export(model, tmp_path, **OPTIONS | {"height": 7})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "older"
    )

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left"):
        export.export(model, tmp_path, **OPTIONS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "older"
    )


def damaged_inputs(path, kind):
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "cut":
        np.savez(path, a=np.zeros(1000))
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "pickle":
        np.savez(path, a=np.array([{}]))
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(kind.encode())


@pytest.mark.parametrize(
    "kind", ["", "PK\x03\x04 damaged", "cut", "npy", "pickle", "folder", "missing"]
)
def test_damaged_inputs_are_named(model, tmp_path, kind):
    damaged_inputs(tmp_path / "inputs.npz", kind)
    with pytest.raises(UserError, match=r"cannot read the inputs of an exported.*inputs\.npz: "):
        export.export(model, tmp_path, **OPTIONS, inputs_only=True)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_exported_program_draws_the_same(dtype, tmp_path):
    make_pipeline(tmp_path / "in")
    model = loading.load_model(tmp_path / "in", dtype=dtype)
    options = dict(prompt="a red circle", negative_prompt="blue", height=32, width=48,
                   batch_size=2, max_chunks=1)  # fmt: skip
    out = tmp_path / "out"
    export.export(with_settings(model, steps=4), out, **options)
    pipe = latent_diffusion_jax.load(tmp_path / "in", dtype=dtype)
    size = dict(height=32, width=48, num_images=2, seed=7)
    ours = pipe("a red circle", negative_prompt="blue", steps=4, **size)
    found = draw(out, 7, tmp_path / "a.npy")
    assert found.shape == ours.shape and found.std() > 5
    tolerance = 1 if dtype == "float32" else 30
    assert np.abs(found.astype(int) - ours).max() <= tolerance

    # Another prompt, sampler and number of steps: other inputs of the same program.
    program = (out / export.PROGRAM).read_bytes()
    changed = with_settings(model, steps=6, sampler="dpm++_2m", guidance_scale=3.0)
    export.export(changed, out, **options | {"prompt": "a blue star"}, inputs_only=True)
    assert (out / export.PROGRAM).read_bytes() == program
    if dtype == "float32":
        ours = pipe("a blue star", negative_prompt="blue", steps=6, sampler="dpm++_2m",
                    guidance_scale=3.0, **size)  # fmt: skip
        found = draw(out, 7, tmp_path / "b.npy")
        assert np.abs(found.astype(int) - ours).max() <= 1
        with pytest.raises(UserError, match="these inputs have other shapes than the program"):
            without = with_settings(model, guidance_scale=1.0)
            export.export(without, out, **options, inputs_only=True)


def test_what_cannot_be_exported_is_refused(tmp_path):
    make_pipeline(tmp_path / "in", in_channels=9)
    model = loading.load_model(tmp_path / "in")
    options = dict(prompt="", negative_prompt="", batch_size=1, max_chunks=1)
    with pytest.raises(UserError, match="models that paint into images are not exported"):
        export.export(model, tmp_path / "out", height=32, width=32, **options)


def test_the_command_exports_a_workdir(trained_workdir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.export", f"--model={trained_workdir}",
         f"--out={tmp_path}/out", "--prompt=a handwritten seven", "--steps=3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert draw(tmp_path / "out", 0, tmp_path / "a.npy").shape == (1, 32, 32, 3)
    bad = subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.export", f"--model={trained_workdir}",
         f"--out={tmp_path}/out", "--height=30"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert bad.returncode == 2 and "multiples of 4" in bad.stderr
