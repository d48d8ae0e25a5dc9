"""What devices tell each other in a train step, read from the program compiled for eight."""

import collections
import math
import re

import jax
import numpy as np
import pytest

from configs import autoencoder_kl, txt2img
from latent_diffusion_jax.planning import hlo, programs
from latent_diffusion_jax.planning.links import find_collective
from latent_diffusion_jax.runtime import sharding, trees
from latent_diffusion_jax.runtime.sharding import AXES

SMALL = 256  # elements: sums of losses, norms of gradients, timesteps, ...


def wide(program):
    """Large enough for the rules to split something."""
    if program == "first_stage":
        config = autoencoder_kl.get_config("smoke")
        config.first_stage.autoencoder.channels = 64
        config.first_stage.discriminator.channels = 64
        config.data.image_size = 16
        return config
    config = txt2img.get_config("smoke")
    config.unet.channels, config.unet.channel_multipliers = 32, (1,)
    config.unet.attention_levels = (0,)
    config.unet.head_dim = 16
    config.text_encoder.width = 64
    config.text_encoder.head_dim = 32
    config.text_encoder.dtype = config.unet.dtype = "bfloat16"
    config.data.latents = "encoded before"
    return config


def collectives(program, **sizes):
    """On eight devices: (collectives by kind, the parameters' shapes by name, the mesh).

    Of each collective its group, op_name and the sizes of large results in elements.
    """
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices())
    made = programs.make(wide(program), program, mesh, 16, num_labels=0)
    with jax.set_mesh(mesh):
        text = made.trace().lower().compile().as_text()
    found = collections.defaultdict(list)
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.values():
            collective = find_collective(instruction, 8, hidden=False)
            counts = [math.prod(shape.dims) for shape in instruction.shapes]
            if collective is not None and max(counts) > SMALL:
                large = [count for count in counts if count > SMALL]
                group = frozenset(collective.group)
                found[collective.kind].append((group, instruction.op_name, large))
    state = made.arguments[0]
    return found, trees.flatten_names((state.params, state.frozen)), mesh


def groups_over(mesh, *axes):
    """Ids of the devices that differ in their places along these axes alone."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    rest = [i for i, axis in enumerate(AXES) if axis not in axes]
    chosen = [i for i, axis in enumerate(AXES) if axis in axes]
    length = math.prod(mesh.shape[axis] for axis in axes)
    return {frozenset(row) for row in ids.transpose(*rest, *chosen).reshape(-1, length).tolist()}


@pytest.mark.parametrize(
    "program", [pytest.param("first_stage", marks=pytest.mark.slow), "diffusion"]
)
def test_whole_parameters_on_each_device_take_sums_of_gradients_alone(program):
    found, _, mesh = collectives(program, data=8)
    assert found.keys() == {"all-reduce"}
    assert {group for group, _, _ in found["all-reduce"]} == groups_over(mesh, "data")


def check_gathers(found, params, mesh):
    """Every parameter that is split over fsdp is gathered once, over fsdp, and nothing else is."""
    split = collections.Counter()
    for name, leaf in params.items():
        spec = sharding.leaf_spec("/" + name, leaf.shape, mesh)
        if "fsdp" in spec:
            parts = mesh.shape["tensor"] if "tensor" in spec else 1
            split[math.prod(leaf.shape) // parts] += 1
    assert split
    gathered = collections.Counter()
    for group, op_name, large in found["all-gather"]:
        assert group in groups_over(mesh, "fsdp")
        # In `sharding.gathered`, outside of all layers; where CPUs have no halves, of what is
        # rounded first.
        assert re.fullmatch(
            r"jit\(train_step\)/jvp\(\)/(sharding_constraint|convert_element_type)", op_name
        )
        # CPUs' compiler may gather a parameter in another shape, of as many elements.
        gathered.update(large)
    assert gathered == split


@pytest.mark.parametrize(
    "program", ["first_stage", pytest.param("diffusion", marks=pytest.mark.slow)]
)
def test_split_parameters_are_gathered_and_nothing_else_is_moved(program):
    found, params, mesh = collectives(program, fsdp=8)
    check_gathers(found, params, mesh)
    assert found.keys() == {"all-gather", "all-reduce"}


def test_the_tensor_axis_takes_sums_of_activations_and_the_weights_of_gates():
    """Nothing else is moved along it, and along other axes what is without it."""
    found, params, mesh = collectives("diffusion", data=2, fsdp=2, tensor=2)
    check_gathers(found, params, mesh)
    along_tensor = groups_over(mesh, "tensor")
    used = {group for group, _, _ in found["all-reduce"]}
    assert used & along_tensor
    assert used <= along_tensor | groups_over(mesh, "data", "fsdp")
    assert found.keys() == {"all-gather", "all-reduce", "collective-permute"}
    gates = {  # one half of what each of two devices has
        math.prod(leaf.shape) // 4
        for name, leaf in params.items()
        if re.search("/ff/proj_in/dense/(kernel|bias)$", name)
    }
    for group, op_name, large in found["collective-permute"]:
        assert group in along_tensor and op_name.endswith("/ff/shard_map/ppermute"), op_name
        assert set(large) <= gates
