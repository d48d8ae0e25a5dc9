"""Several steps on one device and on eight: same figures, same state.

That one step is the same is in test_diffusion_stage.py and test_autoencoder_stage.py. These drift
no further: the optimizers' steps are as large as the gradients, and not of their signs.
"""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import tokenizers as captions
from latent_diffusion_jax.conditions import Parts
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.runtime import sharding, trees
from latent_diffusion_jax.training import autoencoder_stage
from latent_diffusion_jax.training.codebook import CodebookAverage
from latent_diffusion_jax.training.state import jit_train_step
from tests.first_stages import LOSSES, TINY, sgd

pytestmark = pytest.mark.slow

MESHES = [
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
]
WIDE = TINY | dict(channels=32, num_groups=4)
KL = AutoencoderKL(**WIDE)


def wide(config):
    """Large enough for the rules to split something; Adam's epsilon is larger than gradients."""
    config.unet.channels = 32
    config.unet.head_dim = 16
    config.text_encoder.width = 64
    config.text_encoder.head_dim = 32
    config.optimizer.eps, config.optimizer.learning_rate = 1.0, 1.0
    return config


def run_steps(stage, frozen, batch, mesh, steps=3):
    """(figures of each step, the state after the last) of steps as the loop makes them."""
    key = jax.random.key(0)
    figures = []
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(stage.init, key)
        shardings = sharding.state_sharding(shapes, mesh)
        state = jax.jit(stage.init, out_shardings=shardings)(key)
        if frozen is not None:
            frozen = jax.device_put(frozen, sharding.state_sharding(frozen, mesh))
        state = state.replace(frozen=frozen)
        step = jit_train_step(stage, jax.tree.map(lambda x: x.sharding, state), mesh)
        for _ in range(steps):
            state, metrics = step(state, sharding.put_batch(batch, mesh, 8), key)
            assert metrics["skipped"] == 0
            figures.append(jax.device_get(metrics))
    return figures, state.replace(frozen=None)


def relative_errors(ours, theirs):
    """The largest of each part of a state: parameters, their average, moments, ..."""
    ours, theirs = (trees.flatten_names(jax.device_get(state)) for state in (ours, theirs))
    assert ours.keys() == theirs.keys()
    parts = collections.defaultdict(list)
    for name in theirs:
        parts[re.match(r"opt/.*/(mu|nu|trace)(?=/)|[^/]+", name).group()].append(name)
    errors = {}
    for part, names in parts.items():
        largest = max(np.abs(theirs[name]).max() for name in names)
        found = [
            # Some gradients are zero but for rounding: of biases that a norm takes away again.
            np.abs(ours[name] - theirs[name]).max()
            / max(np.abs(theirs[name]).max(), 0.01 * largest)
            for name in names
        ]
        errors[part] = float(np.max(found))
    return errors


def check_equal(stage, frozen, batch, sizes, split=("fsdp", "tensor")):
    """Of the axes `split` all that have several devices split parameters."""
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    expected_figures, expected = run_steps(stage, frozen, batch, one)
    figures, state = run_steps(stage, frozen, batch, sharding.make_mesh(sizes))
    specs = str([leaf.sharding.spec for leaf in jax.tree.leaves(state.params)])
    for axis in split:
        assert (axis in specs) == (sizes[axis] > 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        figures,
        expected_figures,
    )
    errors = relative_errors(state, expected)
    print("largest relative errors:", errors)
    assert all(error <= 1e-5 for error in errors.values()), errors


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
    # On the host: a step takes what it is given.
    frozen = {"autoencoder": jax.device_get(params), "scale_factor": np.float32(0.8)}
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        "tokens": tokenizer.encode(["the digit 3", "a handwritten seven"] * 4),
    }
    check_equal(stage, frozen, batch, sizes)


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
        {"autoencoder": sgd(1e-2 if vq else 1e-5), "discriminator": sgd(1e-1)},
        (16, 16, 3),
        dataclasses.replace(LOSSES, kl_weight=1e-6, disc_start=1, disc_weight=0.5, **changes),
        # Half of an even share: codes that the first batch does not use are revived at once.
        codebook_average=CodebookAverage(0.4, 0.5) if vq else None,
        ema_decay=0.9,
    )
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)}
    check_equal(stage, None, batch, sizes, split=("fsdp",))
