"""Inception weights for FID, from the file `pt_inception-2015-12-05-6726825d.pth`.

The file has one tensor for each of our parameters, under the same path with PyTorch's endings:
`Mixed_5b/branch1x1/conv/kernel` is its `Mixed_5b.branch1x1.conv.weight`.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.inception import InceptionV3
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import files, mapping

ENDINGS = {  # of our names, and the layout of the tensors
    "conv/kernel": ("conv.weight", "conv"),
    "bn/scale": ("bn.weight", "same"),
    "bn/bias": ("bn.bias", "same"),
    "bn/mean": ("bn.running_mean", "same"),
    "bn/var": ("bn.running_var", "same"),
    "fc/kernel": ("fc.weight", "dense"),
    "fc/bias": ("fc.bias", "same"),
}
COUNTER = ".num_batches_tracked"  # PyTorch's, of training steps


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `models.inception.InceptionV3` by slash-joined name."""
    images = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in flatten_names(params).items()}


def table() -> mapping.Table:
    """Where each of our parameters is in the file."""
    rows = {}
    for name in shapes():
        *block, layer, leaf = name.split("/")
        ending, layout = ENDINGS[f"{layer}/{leaf}"]
        rows[name] = mapping.Leaf(".".join([*block, ending]), layout)
    return rows


def load(path: str | pathlib.Path) -> Any:
    """Parameters of `models.inception.InceptionV3` from a file, of Torch or safetensors.

    Raises:
      UserError: the file cannot be read, or its tensors are not those of the network.
    """
    tensors = {
        name: tensor for name, tensor in files.read(path).items() if not name.endswith(COUNTER)
    }
    return mapping.to_ours(table(), tensors, shapes(), f"Inception weights {path}")
