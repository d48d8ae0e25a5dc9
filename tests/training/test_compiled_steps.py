"""Train steps as they are compiled: the state's memory is used again, and the host is not asked."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import txt2img
from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import tokenizers as captions
from latent_diffusion_jax.conditions import Parts
from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.training.state import jit_train_step
from tests.lowering import precisions

# What a program asks of the host, in XLA's text.
OF_THE_HOST = re.compile(
    r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(|callback|host_compute"
)


def small(precision="high"):
    config = txt2img.get_config("smoke")
    config.unet.channel_multipliers = (1,)
    config.unet.attention_levels = (0,)
    config.first_stage.autoencoder.channel_multipliers = (1, 1)
    config.first_stage.autoencoder.num_res_blocks = 1
    config.first_stage.discriminator.num_layers = 1
    config.first_stage.ema_decay = 0.9
    config.first_stage.precision = config.precision = precision
    config.data.image_size = 8
    return config


def first_stage(config):
    batch = {"image": np.zeros((8, 8, 8, 3), np.uint8)}
    return build.first_stage(config), None, batch


def diffusion(config):
    tokenizer = captions.prompt_tokenizer(captions.train(["a handwritten seven"], 300, 4))
    parts = Parts(tokenizer)
    ldm = parts.network(config)
    stage = build.second_stage(config, ldm, parts.host_half(config))
    network = build.autoencoder(config)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    frozen = {"autoencoder": params, "scale_factor": jax.ShapeDtypeStruct((), jnp.float32)}
    batch = {"image": np.zeros((8, 8, 8, 3), np.uint8), "tokens": np.zeros((8, 4), np.int32)}
    return stage, frozen, batch


STAGES = {"first_stage": first_stage, "diffusion": diffusion}


def shapes_of(stage, frozen):
    state = jax.eval_shape(stage.init, jax.random.key(0))
    return state.replace(frozen=frozen)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_works_in_the_states_memory(name):
    """On devices that share it, as the loop compiles it."""
    stage, frozen, batch = STAGES[name](small())
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])
    state = shapes_of(stage, frozen)
    shardings = sharding.state_sharding(state, mesh)
    step = jit_train_step(stage, shardings, mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        compiled = step.lower(state, batch, jax.random.key(0)).compile()
    used_again = compiled.memory_analysis().alias_size_in_bytes

    def bytes_of(leaf, split):
        return int(np.prod(split.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    assert used_again >= sum(jax.tree.leaves(jax.tree.map(bytes_of, state, shardings)))
    text = compiled.as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert aliases.count("alias)") == len(jax.tree.leaves(state))
    assert OF_THE_HOST.search(text) is None


def test_what_asks_the_host_would_be_found():
    def step(x):
        jax.debug.print("{}", x)
        return x + 1

    assert OF_THE_HOST.search(jax.jit(step).lower(1.0).compile().as_text())


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
@pytest.mark.parametrize("name", STAGES)
def test_all_of_a_step_multiplies_as_the_config_says(name, precision):
    stage, frozen, batch = STAGES[name](small(precision))
    traced = jax.jit(stage.train_step).trace(shapes_of(stage, frozen), batch, jax.random.key(0))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert precisions(text) == {precision.upper()}
