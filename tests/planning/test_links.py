"""Collectives: who takes part in each way of printing it, and how long the links take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.planning import hlo
from latent_diffusion_jax.planning.links import Collective, Slices, find_collective, first_group
from latent_diffusion_jax.runtime.chips import CHIPS

V5E, V5P = CHIPS["TPU v5 lite"], CHIPS["TPU v5"]


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, channel_id=1", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, use", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}, use", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, use", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'a'}", (0, 1, 4, 5)),
        ("source_target_pairs={{1,0},{3,2},{0,5}}, metadata", (0, 5)),
        ("channel_id=3", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("channel_id=3, replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups(attributes, group):
    assert first_group(attributes, 8) == group


@pytest.mark.parametrize(
    "attributes",
    ["replica_groups=mesh['a'=2], device_ids=(0,1) {'a'}", "replica_groups=all_of_them, x"],
)
def test_groups_that_are_printed_otherwise_are_not_guessed(attributes):
    with pytest.raises(ValueError, match="not understood"):
        first_group(attributes, 8)


@pytest.mark.parametrize("axes", [("fsdp",), ("data", "fsdp"), ("tensor",), ("data", "tensor")])
def test_groups_are_those_that_xla_means(axes):
    """An array is gathered over some axes of a mesh: the compiled program's group is known."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, P(axes)))
    gather = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    module = hlo.parse(gather.lower(x).compile().as_text())
    (found,) = (
        collective
        for instruction in module.computations[module.entry].values()
        if (collective := find_collective(instruction, 8, False)) is not None
    )
    ids = np.arange(8).reshape(2, 2, 2)
    place = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    assert set(found.group) == set(ids[place].ravel().tolist())


def test_a_whole_slice_uses_all_its_links_and_a_part_one_axis():
    assert Slices(V5E, (4, 4)).bandwidth(16) == 2 * V5E.link_bandwidth  # a grid without ends joined
    assert Slices(V5E, (16, 16)).bandwidth(256) == 4 * V5E.link_bandwidth  # a pod is a torus
    assert Slices(V5E, (16, 16)).bandwidth(16) == 2 * V5E.link_bandwidth
    assert Slices(V5P, (4, 4, 4)).bandwidth(64) == 6 * V5P.link_bandwidth
    assert Slices(V5P, (2, 2, 1)).bandwidth(4) == 2 * V5P.link_bandwidth
    assert Slices(V5E, (1, 1)).bandwidth(1) > 0


def test_seconds_of_rings():
    slices = Slices(V5E, (4, 4))
    everyone = tuple(range(16))
    gathered = Collective("all-gather", 16_000_000, everyone, hidden=False)
    assert gathered.seconds(slices) == pytest.approx(15e6 / (2 * V5E.link_bandwidth))
    reduced = Collective("all-reduce", 16_000_000, everyone, hidden=False)
    assert reduced.seconds(slices) == pytest.approx(2 * gathered.seconds(slices))
    alone = Collective("all-reduce", 16_000_000, (3,), hidden=False)
    assert alone.seconds(slices) == 0.0


def test_between_slices_go_the_shares_of_chips_over_the_network():
    slices = Slices(V5E, (2, 2), count=2)
    across = Collective("all-reduce", 8_000_000, (0, 4), hidden=False)  # a chip of each slice
    assert across.seconds(slices) == pytest.approx(2 * 4e6 / V5E.host_bandwidth)
    moved = Collective("collective-permute", 8_000_000, (0, 4), hidden=False)
    assert moved.seconds(slices) == pytest.approx(8e6 / V5E.host_bandwidth)
    woven = dataclasses.replace(slices, slice_of=(0, 1, 0, 1, 0, 1, 0, 1))  # as meshes may have it
    assert across.seconds(woven) == pytest.approx(2 * 4e6 / V5E.link_bandwidth)
    everyone = Collective("all-reduce", 8_000_000, tuple(range(8)), hidden=False)
    inside = 2 * 6e6 / slices.bandwidth(4)
    assert everyone.seconds(slices) == pytest.approx(inside + 2 * 1e6 / V5E.host_bandwidth)
