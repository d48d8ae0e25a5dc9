"""LPIPS weights: one file with the names of torchvision's VGG16 and of `lpips`, and its sources.

The file holds torchvision's `features.<i>.weight` and `.bias` (VGG16) and, for the five blocks,
`lin<k>.model.1.weight`, the names in the `lpips` package. Both are published in files of their own,
and together in the state of the package's module and in the checkpoints of CompVis' autoencoders.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.models.lpips import LPIPS, VGG_BLOCKS
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import compvis, files, mapping

LINEAR = "lin{block}.model.1.weight"
# In such files and of no use: VGG's classifier, constants, the linear layers a second time.
IGNORED = ("classifier.", "scaling_layer.", "lins.")


def load(path: str | pathlib.Path) -> Any:
    """Parameters of `models.lpips.LPIPS` from a file.

    Raises:
      UserError: the file cannot be read, or tensors are missing, too many or misshapen.
    """
    return _to_ours(_read(path), str(path))


def convert(sources: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> None:
    """Writes the one file, from files that together hold its tensors.

    Args:
      sources: torchvision's VGG16 and `vgg.pth` of `lpips`; or a file that has both, such as
        CompVis' autoencoders with their loss.
      out: file to write, `.safetensors`.

    Raises:
      UserError: a file cannot be read or written, or tensors are missing, too many or misshapen.
    """
    if pathlib.Path(out).suffix != ".safetensors":
        raise UserError(f"LPIPS weights are written as .safetensors, not to {out}")
    tensors: dict[str, np.ndarray] = {}
    for source in sources:
        found = _read(source)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{source} has tensor {twice[0]!r}, and so has a source before it")
        tensors |= found
    params = _to_ours(tensors, " and ".join(map(str, sources)))
    files.write(out, mapping.to_theirs(_table(), params))


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that belong to LPIPS, under the names of our one file."""
    tensors = files.read(path, compvis.SKIPPED, what="LPIPS weights")
    first = LINEAR.format(block=0)
    prefix = min((name.removesuffix(first) for name in tensors if name.endswith(first)), default="",
                 key=len)  # fmt: skip
    return _renamed({name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                     if name.startswith(prefix)})  # fmt: skip


def _renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    # `lpips` keeps torchvision's numbers of layers, in five slices.
    return {
        re.sub(r"^net\.slice\d\.(?=\d)", "features.", name): tensor
        for name, tensor in tensors.items()
        if not name.startswith(IGNORED)
    }


def _table() -> mapping.Table:
    rows: list[mapping.Row] = []
    index = 0  # in torchvision's `features`
    for block, widths in enumerate(VGG_BLOCKS):
        for i in range(len(widths)):
            rows.append((f"vgg/conv_{block}_{i}", f"features.{index}", "conv"))
            index += 2  # a ReLU follows each convolution
        index += 1  # max pooling
        rows.append((f"channel_weights_{block}", LINEAR.format(block=block), "per_channel"))
    return mapping.expand(rows)


def _to_ours(tensors: Mapping[str, np.ndarray], where: str) -> Any:
    images = jnp.zeros((1, 16, 16, 3))
    wanted = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_names(wanted).items()}
    return mapping.to_ours(_table(), tensors, shapes, f"LPIPS weights {where}")
