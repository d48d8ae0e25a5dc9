"""What loading takes of memory: one copy of the parameters, and of a file one tensor at a time."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import files, mapping

# Prints how much larger loading makes a process, in sizes of the parameters.
CHILD = """
import pathlib, sys
import jax
from latent_diffusion_jax.weights import files, mapping

def peak():  # not by getrusage, which begins with the parent's
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

jax.block_until_ready(jax.numpy.zeros(9))
before = peak()
tensors = files.read(sys.argv[1])
table = {name: mapping.Leaf(name, "conv") for name in tensors}
shapes = {name: tensor.transpose(2, 3, 1, 0).shape for name, tensor in tensors.items()}
params = mapping.to_ours(table, tensors, shapes, "a file", jax.numpy.dtype(sys.argv[2]))
params = jax.block_until_ready(jax.device_put(params))
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
TABLE = mapping.expand([("conv", "conv", "conv")])
SHAPES = {"conv/kernel": (3, 3, 4, 5), "conv/bias": (5,)}


@pytest.fixture
def path(tmp_path):
    """A file of tensors that fit `TABLE`."""
    path = tmp_path / "small.safetensors"
    rng = np.random.default_rng(0)
    files.write(path, {"conv.weight": rng.random((5, 4, 3, 3)), "conv.bias": rng.random(5)})
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("safetensors", "float32"),
        ("safetensors", "bfloat16"),
        ("zip", "float32"),
        ("legacy", "float32"),
    ],
)
def test_loading_takes_little_beside_the_parameters(tmp_path, kind, dtype):
    path = tmp_path / "large"
    tensors = {name: torch.rand(1024, 512, 3, 3) for name in "abcdefgh"}  # 144 MiB
    if kind == "safetensors":
        files.write(path, {name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", CHILD, str(path), dtype]
    ratio = float(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)
    # One tensor of the file is an eighth of the parameters in float32, a quarter in bfloat16.
    assert 1 <= ratio < 1.3 + 0.15 * (dtype == "bfloat16")


def test_what_was_released_can_be_read_again(path):
    tensors = files.read(path)
    before = tensors["conv.weight"].copy()
    files.release(tensors["conv.weight"].T[1:])
    np.testing.assert_array_equal(tensors["conv.weight"], before)
    files.release(before)  # of no file: nothing happens


def test_parameters_are_taken_on_cpus_without_a_copy(path):
    params = mapping.to_ours(TABLE, files.read(path), SHAPES, "a file", jnp.bfloat16)
    for leaf in flatten_names(params).values():
        assert leaf.dtype == jnp.bfloat16
        placed = jax.device_put(leaf, jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == leaf.ctypes.data


def test_no_tensor_is_converted_where_one_is_missing(path, monkeypatch):
    monkeypatch.setattr(mapping, "_to_ours", lambda *_: pytest.fail("converted"))
    tensors = files.read(path)
    del tensors["conv.bias"]
    with pytest.raises(UserError, match=r"1 missing: 'conv.bias' \(5,\)"):
        mapping.to_ours(TABLE, tensors, SHAPES, "a file")
