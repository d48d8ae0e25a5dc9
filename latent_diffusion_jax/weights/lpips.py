"""LPIPS weights from a `.safetensors` file with the names of torchvision's VGG16 and of `lpips`.

The file holds torchvision's `features.<i>.weight` and `.bias` (VGG16) and, for the five blocks,
`lin<k>.model.1.weight`, the names in the `lpips` package.
"""

import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from latent_diffusion_jax.models.lpips import VGG_BLOCKS
from latent_diffusion_jax.runtime.errors import UserError


def load(path: str | pathlib.Path) -> Any:
    """Parameters of `models.lpips.LPIPS` from a file.

    Raises:
      UserError: the file is not there or no safetensors file, or a tensor is missing or misshapen.
    """
    try:
        tensors = safetensors.numpy.load_file(str(pathlib.Path(path).expanduser()))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read LPIPS weights {path}: {error}") from error

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"LPIPS weights {path} have no tensor {name!r}")
        if tensors[name].shape != shape:
            raise UserError(
                f"LPIPS weights {path}: {name!r} has shape {tensors[name].shape}, expected {shape}"
            )
        return tensors[name].astype(np.float32)

    vgg, params, index, channels = {}, {}, 0, 3
    for block, widths in enumerate(VGG_BLOCKS):
        for i, width in enumerate(widths):
            kernel = take(f"features.{index}.weight", (width, channels, 3, 3))
            bias = take(f"features.{index}.bias", (width,))
            vgg[f"conv_{block}_{i}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
            index, channels = index + 2, width  # a ReLU follows each convolution
        index += 1  # max pooling
        weights = take(f"lin{block}.model.1.weight", (1, channels, 1, 1))
        params[f"channel_weights_{block}"] = weights.reshape(channels)
    return {"vgg": vgg, **params}
