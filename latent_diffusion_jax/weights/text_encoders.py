"""What the formats of CLIP's and of LDM's own text encoder share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.weights import mapping, shapes


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A text encoder from a file.

    Attributes:
      fields: keyword arguments of the network, `ClipTextEncoder` or `TextTransformer`.
      params: its parameters, a nested dict of NumPy arrays.
    """

    fields: dict[str, Any]
    params: Any


def to_ours(
    network: nn.Module,
    table: mapping.Table,
    tensors: Mapping[str, np.ndarray],
    max_length: int,
    where: str,
    dtype: DTypeLike,
) -> Any:
    """Parameters of a network of token ids [B, max_length], from another format's tensors.

    Raises:
      UserError: there is no such network, or the tensors are not its.
    """
    tokens = jax.ShapeDtypeStruct((1, max_length), jnp.int32)
    wanted = shapes.of(network, f"the text encoder of {where}", tokens)
    return mapping.to_ours(table, tensors, wanted, where, dtype)
