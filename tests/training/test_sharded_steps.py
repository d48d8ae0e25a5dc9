"""Several steps on one device and on eight: same losses, same parameters.

That one step is the same to 1e-5 is in test_diffusion_stage.py and test_autoencoder_stage.py.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import tokenizers as captions
from latent_diffusion_jax.conditions import Parts
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.training import autoencoder_stage
from latent_diffusion_jax.training.codebook import CodebookAverage
from tests.first_stages import LOSSES, TINY

pytestmark = pytest.mark.slow

MESHES = [
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
]
WIDE = TINY | dict(channels=32, num_groups=4)
KL = AutoencoderKL(**WIDE)


def wide(config):
    """Large enough for the rules to split something."""
    config.unet.channels = 32
    config.unet.head_dim = 16
    config.text_encoder.width = 64
    config.text_encoder.head_dim = 32
    return config


def run_steps(stage, frozen, batch, mesh, steps=3):
    key = jax.random.key(0)
    shapes = jax.eval_shape(stage.init, key)
    shardings = sharding.state_sharding(shapes, mesh)
    state = jax.jit(stage.init, out_shardings=shardings)(key)
    if frozen is not None:
        frozen = jax.device_put(frozen, sharding.state_sharding(frozen, mesh))
    state = state.replace(frozen=frozen)
    step = jax.jit(stage.train_step)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, sharding.put_batch(batch, mesh, 8), key)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get((state.params, state.averages)), state


def check_equal(stage, frozen, batch, sizes, split_axis):
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    expected_losses, expected, _ = run_steps(stage, frozen, batch, one)
    losses, params, state = run_steps(stage, frozen, batch, sharding.make_mesh(sizes))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, expected)
    if split_axis:
        specs = [str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)]
        assert any(split_axis in spec for spec in specs), "nothing was split"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_diffusion_step(smoke_config, sizes):
    config = wide(smoke_config)
    trained = captions.train(["a handwritten seven", "the digit 3"], 300, 8)
    tokenizer = captions.prompt_tokenizer(trained)
    parts = Parts(tokenizer)
    stage = build.second_stage(config, parts.network(config), parts.host_half(config))
    network = build.autoencoder(config)
    rng = np.random.default_rng(0)
    params = network.init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))["params"]
    frozen = {"autoencoder": params, "scale_factor": np.float32(0.8)}
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        "tokens": tokenizer.encode(["the digit 3", "a handwritten seven"] * 4),
    }
    axis = next((name for name in ("tensor", "fsdp") if sizes[name] > 1), None)
    check_equal(stage, frozen, batch, sizes, axis)


FIRST_STAGES = {
    "generator_first": (MESHES[0], KL, dict(update_order="generator_first")),
    "codebook_average": (
        MESHES[1],
        AutoencoderVQ(**WIDE, codebook_size=32),
        dict(reduction="mean", lecam_weight=0.1),
    ),
}


@pytest.mark.parametrize("case", sorted(FIRST_STAGES))
def test_first_stage_step(case):
    sizes, network, changes = FIRST_STAGES[case]
    vq = isinstance(network, AutoencoderVQ)
    # Plain gradient descent: Adam's first steps turn the sign of a gradient that is zero but for
    # rounding into a full step.
    stage = autoencoder_stage.make_stage(
        network,
        PatchDiscriminator(channels=32, num_layers=1),
        {"autoencoder": optax.sgd(1e-2 if vq else 1e-5), "discriminator": optax.sgd(1e-1)},
        (16, 16, 3),
        dataclasses.replace(LOSSES, kl_weight=1e-6, disc_start=1, disc_weight=0.5, **changes),
        # Half of an even share: codes that the first batch does not use are revived at once.
        codebook_average=CodebookAverage(0.4, 0.5) if vq else None,
    )
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)}
    check_equal(stage, None, batch, sizes, "fsdp" if sizes["fsdp"] > 1 else None)
