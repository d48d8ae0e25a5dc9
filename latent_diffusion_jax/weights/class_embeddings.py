"""LDM's embedding of classes (CompVis' `ClassEmbedder`) in and out of single files.

The parameters are those of `models.class_embedding.ClassEmbedding`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import mapping
from latent_diffusion_jax.weights.text_encoders import Loaded

NAME = "cond_stage_model.embedding.weight"


def from_compvis(tensors: Mapping[str, np.ndarray], where: str) -> Loaded:
    """The embedding among the tensors of a whole model.

    Raises:
      UserError: it is not a matrix.
    """
    table = tensors[NAME]
    if table.ndim != 2:
        raise UserError(f"{where}: {NAME} has the shape {table.shape}, expected [classes, width]")
    leaf = "label_embed/embedding"
    params = mapping.to_ours({leaf: mapping.Leaf(NAME, "same")}, {NAME: table},
                             {leaf: table.shape}, where)  # fmt: skip
    return Loaded(dict(num_classes=table.shape[0], width=table.shape[1]), params)


def to_compvis(params: Any) -> dict[str, np.ndarray]:
    """The embedding as single files name it, float32: the inverse of `from_compvis`."""
    return {NAME: np.asarray(params["label_embed"]["embedding"], np.float32)}
