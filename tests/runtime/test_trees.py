"""Names and counts of the leaves of a tree."""

import flax.struct
import jax
import numpy as np

from latent_diffusion_jax.runtime import trees


@flax.struct.dataclass
class Node:
    params: object
    ema: object = None


TREE = Node(
    params={"unet": {"conv_in": {"kernel": np.ones((2, 3))}}, "a": [np.ones(4), np.ones(())]}
)


def test_names_of_dicts_lists_and_dataclasses():
    assert list(trees.flatten_names(TREE)) == ["params/a/0", "params/a/1",
                                               "params/unet/conv_in/kernel"]  # fmt: skip


def test_names_lead_to_their_leaves():
    names = trees.flatten_names(TREE)
    assert names["params/unet/conv_in/kernel"] is TREE.params["unet"]["conv_in"]["kernel"]
    assert names["params/a/1"] is TREE.params["a"][1]


def test_names_are_in_the_trees_order():
    assert [x.shape for x in trees.flatten_names(TREE).values()] == [
        x.shape for x in jax.tree.leaves(TREE)
    ]


def test_count_of_arrays_and_shapes():
    assert trees.count(TREE) == 2 * 3 + 4 + 1
    assert trees.count(jax.eval_shape(lambda: TREE)) == 11
    assert trees.count({"empty": np.ones((0, 5)), "none": None}) == 0
