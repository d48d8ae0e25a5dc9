"""Helpers for pytrees of parameters: names, counts, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as a slash-joined name: `unet/conv_in/kernel`."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def flatten_names(tree: Any) -> dict[str, Any]:
    """Leaves by slash-joined name, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def in_dtype(tree: Any, dtype: Any) -> Any:
    """Copies of a tree's arrays in another dtype."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), tree)


def in_dtypes_of(tree: Any, other: Any) -> Any:
    """A tree's arrays, each in the dtype of that of another tree of the same structure."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, other)
