"""What devices tell each other in a train step, read from the program compiled for eight."""

import collections
import math

import jax
import pytest

from configs import autoencoder_kl, txt2img
from latent_diffusion_jax.planning import hlo, programs
from latent_diffusion_jax.planning.links import find_collective
from latent_diffusion_jax.runtime import sharding

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
    """(kinds and shapes of large results, shapes of the parameters) on eight devices."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices())
    made = programs.make(wide(program), program, mesh, 16, num_labels=0)
    with jax.set_mesh(mesh):
        text = made.trace().lower().compile().as_text()
    found = collections.defaultdict(set)
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.values():
            collective = find_collective(instruction, 8, hidden=False)
            if collective is not None:
                shapes = (s.dims for s in instruction.shapes if math.prod(s.dims) > SMALL)
                found[collective.kind] |= set(shapes)
    state = made.arguments[0]
    return found, {leaf.shape for leaf in jax.tree.leaves((state.params, state.frozen))}


@pytest.mark.parametrize(
    "program", [pytest.param("first_stage", marks=pytest.mark.slow), "diffusion"]
)
def test_whole_parameters_on_each_device_take_sums_of_gradients_alone(program):
    found, _ = collectives(program, data=8)
    assert found["all-reduce"]
    assert not any(found[kind] for kind in found if kind != "all-reduce"), dict(found)


@pytest.mark.parametrize("program", ["first_stage", "diffusion"])
def test_split_parameters_are_gathered_and_nothing_else_is_moved(program):
    found, params = collectives(program, fsdp=8)
    assert found["all-gather"]
    assert not found["all-to-all"] and not found["collective-permute"], dict(found)
    # CPUs' compiler may gather a parameter in another shape, of as many elements.
    sizes = {math.prod(shape) for shape in params}
    assert {math.prod(shape) for shape in found["all-gather"]} <= sizes
