"""Helpers for pytrees of parameters: names, counts."""

from typing import Any

import jax
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
