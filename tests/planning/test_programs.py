"""Programs of the shipped miniatures, compiled for TPUs: they fit, and hold what they should."""

import importlib
import math
import re

import jax
import numpy as np
import pytest

from latent_diffusion_jax.planning import programs
from latent_diffusion_jax.planning.compiled import compile_program
from latent_diffusion_jax.planning.topologies import open_topology
from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.runtime.errors import UserError

CASES = [
    ("autoencoder_kl", "first_stage"),
    ("txt2img", "diffusion"),
    ("txt2img", "sample"),
    pytest.param("autoencoder_vq", "first_stage", marks=pytest.mark.slow),
    pytest.param("decoder_finetune", "first_stage", marks=pytest.mark.slow),
    pytest.param("class_cond", "diffusion", marks=pytest.mark.slow),
    pytest.param("unconditional", "diffusion", marks=pytest.mark.slow),
    pytest.param("pixel", "diffusion", marks=pytest.mark.slow),
    pytest.param("pixel", "sample", marks=pytest.mark.slow),
]


def smoke_program(name, program, sizes, devices):
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    mesh = sharding.make_mesh(sizes, devices)
    return programs.make(config, program, mesh, 8, num_labels=10)


@pytest.mark.parametrize(("name", "program"), CASES)
def test_miniatures_compile_for_a_v5e(tpu_topology, name, program):
    tpu_topology("v5e:2x2")  # skips where there is no compiler
    devices, slices = open_topology("v5e:2x2")
    sizes = {"data": 2, "fsdp": 2, "tensor": 1}
    made = smoke_program(name, program, sizes, devices)
    found = compile_program(made, slices, with_cost=False)
    assert found.memory.fits and found.model_flops > 0
    assert 0 < found.memory.total < 2**30
    assert not re.search(r" (infeed|outfeed|send|recv)\(|xla_python_\w*callback", found.text)
    if program != "sample":  # the state is updated in place
        state = made.arguments[0].replace(frozen=None)
        aliased = found.executable.memory_analysis().alias_size_in_bytes
        assert aliased >= programs.bytes_of_device(state)


@pytest.mark.slow
def test_what_is_compiled_to_run_costs_the_same(tpu_topology):
    """The search for windows, which plans do without, changes some code and not the estimate."""
    tpu_topology("v5e:2x2")
    devices, slices = open_topology("v5e:2x2")
    made = smoke_program("txt2img", "sample", {"data": 4, "fsdp": 1, "tensor": 1}, devices)
    found, to_run = (compile_program(made, slices, to_run=choice) for choice in (False, True))
    assert found.cost is not None and to_run.cost is not None
    assert found.cost == to_run.cost
    assert abs(found.memory.total - to_run.memory.total) < 16 * 2**20


@pytest.mark.parametrize("precomputed", [False, True])
def test_what_lies_in_memory_is_counted_by_kind(precomputed):
    """On eight CPU devices: what a chip holds is what the arrays take there."""
    from configs import txt2img

    config = txt2img.get_config("smoke")
    config.data.latents = "somewhere" if precomputed else ""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    made = programs.make(config, "diffusion", mesh, 8, num_labels=0)
    state = made.arguments[0]
    for kind, tree in (("parameters", state.params), ("optimizer", state.opt)):
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        assert whole / 4 <= made.resident[kind] <= whole
    held = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(made.arguments[1])) / 8
    assert made.resident["batches"] == 3 * held
    assert ("moments" in made.arguments[1]) == precomputed
    # The decoder lies there for previews, whether or not the step reads it.
    assert made.resident["frozen"] > 1000
    assert ("encoder" in state.frozen["autoencoder"]) != precomputed
    if precomputed:  # as `encode` writes them
        assert made.arguments[1]["moments"].dtype == np.float16


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 4), ("plms", 5), ("heun", 7)])
def test_all_calls_of_the_network_are_counted(sampler, calls):
    from configs import txt2img

    def flops(sampler, steps):
        config = txt2img.get_config("smoke")
        config.sample.sampler, config.sample.steps = sampler, steps
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        made = programs.make(config, "sample", mesh, 2, num_labels=0)
        return made.model_flops(made.trace())

    once, twice = flops("ddim", 1), flops("ddim", 2)
    of_call = twice - once
    np.testing.assert_allclose(flops(sampler, 4), once + (calls - 1) * of_call, rtol=1e-6)


def test_the_model_is_counted_the_same_on_any_mesh_and_with_micro_batches():
    from configs import txt2img

    def flops(accumulation=1, **sizes):
        config = txt2img.get_config("smoke")
        config.accumulation = accumulation
        devices = jax.devices()[: math.prod(sizes.values())]
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, devices)
        made = programs.make(config, "diffusion", mesh, 8, num_labels=0)
        return made.model_flops(made.trace())

    once = flops(data=1)
    assert flops(data=2, fsdp=4) == once
    np.testing.assert_allclose(flops(data=1, accumulation=2), once, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "chips"),
        ("v9:2x2", "v4, v5e, v5p, v6e"),
        ("v5e:3x5x7", "no such slice"),
        ("v5e:2x2*x", "two slices"),
    ],
)
def test_unknown_topologies(tpu_topology, name, said):
    tpu_topology("v5e:2x2")
    with pytest.raises(UserError, match=said):
        open_topology(name)


def test_several_slices_and_megacore(tpu_topology):
    tpu_topology("v5e:2x2")
    devices, slices = open_topology("v5e:2x2*2")
    assert len(devices) == slices.num_chips == 8 and slices.chips_of_slice == 4
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for row in mesh.devices[:, :, 0]:  # a slice has the whole of the parameters
        assert len({device.slice_index for device in row}) == 1
    assert len(open_topology("v4:2x2x1")[0]) == 4
