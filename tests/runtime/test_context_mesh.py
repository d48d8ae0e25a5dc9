"""What a program may ask of the mesh in context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.runtime.context_mesh import (
    by_platform,
    gated_parts,
    pair_halves,
    platform,
)

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def forms(traced: list[str]):
    """A function of an array that notes which of its forms are traced."""

    def form(name, factor):
        def run(x):
            traced.append(name)
            return factor * x

        return run

    return lambda x: by_platform(
        x, default=form("default", 1), cpu=form("cpu", 2), tpu=form("tpu", 3)
    )


def test_without_a_mesh_all_forms_are_traced_and_the_platforms_is_run():
    traced = []
    assert platform() is None
    assert jax.jit(forms(traced))(jnp.ones(())) == 2
    assert {"cpu", "tpu", "default"} <= set(traced)


def test_on_a_mesh_of_cpus_their_form_alone_is_traced():
    traced = []
    with jax.set_mesh(sharding.make_mesh(ONE, jax.devices()[:1])):
        assert platform() == "cpu"
        assert jax.jit(forms(traced))(jnp.ones(())) == 2
    assert set(traced) == {"cpu"}


def test_on_a_mesh_of_tpus_theirs(tpu_topology):
    traced = []
    mesh = sharding.make_mesh(ONE | {"data": 4}, tpu_topology("v5e:2x2"))
    with jax.set_mesh(mesh):
        assert platform() == "tpu"
        jax.jit(forms(traced)).trace(jax.ShapeDtypeStruct((), np.float32))
    assert set(traced) == {"tpu"}


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("shape", [(32,), (3, 64)])
def test_devices_get_the_parts_of_both_halves_that_belong_together(tensor, shape):
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor})
    split = NamedSharding(mesh, P(*(None,) * (len(shape) - 1), "tensor"))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parts = np.split(x, 2 * tensor, axis=-1)
    expected = [part for i in range(tensor) for part in (parts[i], parts[tensor + i])]
    with jax.set_mesh(mesh):
        assert gated_parts(shape[-1] // 2) == tensor
        program = jax.jit(pair_halves, in_shardings=split).lower(x).compile()
        found = program(jax.device_put(x, split))
    np.testing.assert_array_equal(found, np.concatenate(expected, axis=-1))
    assert found.sharding.is_equivalent_to(split, len(shape))
    text = program.as_text()
    assert text.count(" collective-permute(") == (1 if tensor == 2 else 2)
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" not in text


@pytest.mark.parametrize(("tensor", "width"), [(1, 8), (2, 7), (4, 6)])
def test_halves_that_do_not_divide_stay(tensor, width):
    devices = jax.devices()[:tensor]
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": tensor}, devices)):
        assert gated_parts(width) == 1


def test_without_a_mesh_halves_stay():
    assert gated_parts(8) == 1


def test_odd_numbers_of_parts_stay():
    with jax.set_mesh(sharding.make_mesh(ONE | {"tensor": 3}, jax.devices()[:3])):
        assert gated_parts(9) == 1
