"""Shapes of the parameters of networks that others' files describe, and how large those may be.

A number in a config or in a tensor's name costs nothing to write and may ask for a network that
takes days to describe. The bounds are far above any published model's.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion_jax.models.attention_kernels import no_kernels
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import first_line
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights.messages import in_short, shown

MAX_LEVELS = 16
MAX_BLOCKS = 1_024  # of a network, on all levels; Stable Diffusion's UNet has some 30
MAX_SIZE = 1 << 20  # of everything that is counted: channels, tokens, classes, heads
NUMBER = r"(\d{1,4})"  # of a block in tensors' names; what has more digits is no block's name


def check_size(key: str, value: Any, where: str) -> None:
    """Raises UserError where a number of a network, or one for each level, is far too large."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_LEVELS:
        raise UserError(f"{where} has {len(values)} entries of {key}; at most {MAX_LEVELS} can be")
    if any(isinstance(n, int) and n > MAX_SIZE for n in values):
        raise UserError(f"{where} has {key} {shown(value)}; at most {MAX_SIZE} can be")


def check_network(fields: Mapping[str, Any], blocks: int, tensors: int, where: str) -> None:
    """Raises UserError where a network is far too large, or larger than its file.

    Args:
      fields: of the network, and other sizes by name.
      blocks: that it has at least, each of one tensor or more.
      tensors: in the file.
      where: they are from, for the message.
    """
    for key, value in fields.items():
        check_size(key, value, where)
    if blocks > MAX_BLOCKS:
        raise UserError(f"{where} asks for {blocks} blocks of layers; at most {MAX_BLOCKS} can be")
    if blocks > tensors:
        raise UserError(f"{where} asks for {blocks} blocks of layers and has {tensors} tensors")


def of(network: nn.Module, what: str, *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters by slash-joined name; nothing is computed.

    Args:
      network: the network.
      what: it is, and where from, to begin a message with.
      *inputs: of its call, `jax.ShapeDtypeStruct`s or None.

    Raises:
      UserError: there is no such network.
    """
    try:
        with no_kernels():  # whose masks of many tokens take minutes, and have no parameters
            params = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    except Exception as error:  # Flax and JAX have many for sizes that do not go together
        raise UserError(f"{what}: {in_short(first_line(error))}") from error
    return {name: leaf.shape for name, leaf in flatten_names(params).items()}
