"""Collectives: who takes part in each way of printing it, and how long the links take."""

import pytest

from latent_diffusion_jax.planning.links import Collective, Slices, first_group
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
        ("channel_id=3", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups(attributes, group):
    assert first_group(attributes, 8) == group


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
    everyone = Collective("all-reduce", 8_000_000, tuple(range(8)), hidden=False)
    inside = 2 * 6e6 / slices.bandwidth(4)
    assert everyone.seconds(slices) == pytest.approx(inside + 2 * 1e6 / V5E.host_bandwidth)
