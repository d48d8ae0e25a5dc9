"""Classes as a context of one token (LDM, table 12; CompVis' `ClassEmbedder`)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ClassEmbedding(nn.Module):
    """Labels [B] in [0, num_classes) -> context [B, 1, width]."""

    num_classes: int  # with the one for "no label", where the model has it: the last
    width: int = 512
    dtype: Any = jnp.float32  # of the context; parameters stay float32

    @nn.compact
    def __call__(self, labels: jax.Array) -> jax.Array:
        embed = nn.Embed(
            self.num_classes,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype,
            name="label_embed",
        )
        return embed(labels)[:, None]
