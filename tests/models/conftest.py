"""What the parity tests share: random parameters, and parameters under PyTorch's names."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch

from latent_diffusion_jax.runtime.trees import flatten_names, path_name

torch.set_num_threads(1)  # tensors here are so small that more threads only wait for each other


def draw_params(module: Any, *arguments: Any, seed: int = 0) -> Any:
    """Parameters of a Flax module, every leaf random: zero-initialised ones and norms' too."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path).rsplit("/", 1)[-1]
        noise = rng.normal(size=leaf.shape)
        if name == "scale":
            noise = 1.0 + 0.3 * noise
        elif name == "kernel":
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            noise = 0.3 * noise
        return noise.astype(leaf.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_names(tree: Any, renames: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Flax parameters, or their gradients, by PyTorch name and in its layout, float64.

    `renames` are (pattern, replacement) pairs applied in turn to names like `a/b/kernel`.
    """
    out = {}
    for name, leaf in flatten_names(tree).items():
        leaf = np.array(leaf, np.float64)
        if name.endswith("/kernel"):
            # HWIO -> OIHW, and [in, out] -> [out, in].
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        name = re.sub(r"/(dense|GroupNorm_0)/", "/", name)
        name = re.sub(r"/(kernel|scale)$", "/weight", name)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        name = name.replace("/", ".")
        assert name not in out, name
        out[name] = torch.tensor(leaf)
    return out


def check_gradients(ours: dict[str, torch.Tensor], module: torch.nn.Module, tolerance: float):
    """Every parameter's gradient, relative to its largest element (or to 0.1 % of the overall)."""
    theirs = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        error = (ours[name] - grad).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="session")
def random_params():
    return draw_params


@pytest.fixture(scope="session")
def to_torch():
    return torch_names


@pytest.fixture(scope="session")
def assert_gradients_equal():
    return check_gradients
