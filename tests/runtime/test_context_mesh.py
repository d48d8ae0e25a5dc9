"""Forms of an operation that differ from platform to platform, by the mesh in context."""

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.runtime.context_mesh import by_platform, platform

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
