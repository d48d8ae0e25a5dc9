"""The second stage's step: what it trains, averages, drops and leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.conditioning.base import Cond, Conditioning
from latent_diffusion_jax.diffusion.losses import Objective
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.sampling import Request, Settings, make_draw, make_plan
from latent_diffusion_jax.training import diffusion_stage
from latent_diffusion_jax.training.optimizer import make_optimizer
from latent_diffusion_jax.training.state import jit_train_step

LENGTH = 6
LDM = LatentDiffusion(
    AutoencoderKL(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2,
                  mid_attention=False),
    TextTransformer(vocab_size=20, max_length=LENGTH, width=8, depth=1, num_heads=1, head_dim=8),
    UNet(channels=16, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(0,),
         head_dim=8, num_groups=4),
    make_schedule("scaled_linear", 1000, 0.0015, 0.0195),
    image_size=8,
)  # fmt: skip
CONDITIONING = Conditioning(lambda record, rng: {}, {"tokens": np.zeros(LENGTH, np.int32)}, {})
PREVIEWS = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
KEY = jax.random.key(5)


def make_stage(
    condition_dropout=0.1,
    optimizer=None,
    ldm=LDM,
    accumulation=1,
    param_dtype="float32",
    ema_dtype="float32",
    **objective,
):
    seeds = np.arange(2, dtype=np.uint32)
    return diffusion_stage.make_stage(
        ldm,
        optimizer or optax.adam(1e-3),
        CONDITIONING,
        Request(seeds, {"tokens": PREVIEWS}, {"tokens": np.zeros_like(PREVIEWS)}),
        objective=Objective(**objective),
        condition_dropout=condition_dropout,
        ema_decay=0.9,
        draw=make_draw(ldm, 8, 8),
        plan=make_plan(ldm.schedule, ldm.prediction_type, Settings(steps=2, guidance_scale=1.5)),
        accumulation=accumulation,
        param_dtype=param_dtype,
        ema_dtype=ema_dtype,
    )


@functools.cache
def plain_stage():
    """Shared, as each has programs of its own."""
    return make_stage()


@pytest.fixture(scope="module")
def fresh():
    """The state before a first step."""
    return jax.jit(plain_stage().init)(KEY)


@pytest.fixture(scope="module")
def frozen():
    params = LDM.autoencoder.init(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    return {"autoencoder": params, "scale_factor": jnp.float32(0.7)}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "tokens": rng.integers(1, 20, (8, LENGTH), dtype=np.int32),
    }


def test_a_step_trains_unet_and_conditioner_and_nothing_else(fresh, frozen, batch):
    stage, state = plain_stage(), fresh.replace(frozen=frozen)
    new = state
    for _ in range(4):  # gradients pass one zero-initialised layer more each time
        new, metrics = jax.jit(stage.train_step)(new, batch, KEY)
    assert int(new.step) == 4 and np.isfinite(metrics["loss"])
    for part in ("unet", "conditioner"):
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), new.params[part], state.params[part]
        )
        assert any(jax.tree.leaves(changed)), part
    same = jax.tree.map(lambda a, b: bool((a == b).all()), new.frozen, frozen)
    assert jax.tree.all(same)


def sgd():
    """Gradient descent whose state shows the gradients; parameters move as far as those say."""
    return optax.sgd(1.0, momentum=0.0)


def random_state(stage):
    """A state before its first step; nothing is compiled for it."""
    rng = np.random.default_rng(2)

    def draw(leaf):
        numbers = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
        return numbers.astype(leaf.dtype) if len(leaf.shape) > 1 else np.ones_like(numbers, "f")

    state = jax.eval_shape(stage.init, KEY)
    params = jax.tree.map(draw, state.params)
    opt = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.opt)
    return state.replace(step=np.int32(0), params=params, ema=params, opt=opt)


DROPOUT = dataclasses.replace(LDM, unet=LDM.unet.clone(dropout=0.5))


def run_step(mesh, accumulation):
    """A step as the loop makes it: with dropout, of 16 examples on this many devices."""
    stage = make_stage(optimizer=sgd(), ldm=DROPOUT, accumulation=accumulation)
    rng = np.random.default_rng(1)
    batch = {
        "moments": rng.normal(size=(16, 4, 4, 6)).astype(np.float32),
        "tokens": rng.integers(1, 20, (16, LENGTH), dtype=np.int32),
    }
    state = random_state(stage).replace(frozen={"scale_factor": np.float32(0.7)})
    shardings = sharding.state_sharding(state, mesh)
    placed = jax.device_put(state, shardings)
    step = jit_train_step(stage, shardings, mesh)
    with jax.set_mesh(mesh):
        new, metrics = step(placed, sharding.put_batch(batch, mesh, 16), KEY)
    assert metrics.pop("skipped") == 0 and new.step == 1
    new, metrics = jax.device_get((new, metrics))
    moved = jax.tree.map(lambda a, b: a - b, new.params, state.params)
    return {"gradients": new.opt, "moved": moved, "ema": new.ema, "metrics": metrics}


@pytest.fixture(scope="module")
def whole_step():
    """Of the whole batch on one device."""
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return run_step(one, 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "accumulation"),
    [
        (2, 2, 2, 2),
        pytest.param(1, 8, 1, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_and_devices_make_the_step_of_the_whole_batch(
    monkeypatch, whole_step, data, fsdp, tensor, accumulation
):
    """Gradients, what they change, the average and the figures; masks of dropout are by example."""
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 128)  # so that these small ones are split
    mesh = sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})
    shapes = jax.eval_shape(make_stage(ldm=DROPOUT).init, KEY).params
    specs = {str(x.spec) for x in jax.tree.leaves(sharding.state_sharding(shapes, mesh))}
    for axis, size in (("fsdp", fsdp), ("tensor", tensor)):
        assert any(axis in spec for spec in specs) == (size > 1)
    found = run_step(mesh, accumulation)
    errors = {}
    for what, expected in whole_step.items():
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

        def error(ours, theirs, largest=largest):
            # Some gradients are zero but for rounding: of biases that a norm takes away again.
            return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 0.01 * largest)

        found_errors = jax.tree.leaves(jax.tree.map(error, found[what], expected))
        errors[what] = float(np.max(found_errors))
    print("largest relative errors:", errors)
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_dropout_masks_differ_by_step_and_example():
    """Otherwise the test above could not fail."""
    params = random_state(make_stage(ldm=DROPOUT)).params
    row = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    context = Cond(context=jnp.ones((2, LENGTH, 8)))

    @jax.jit
    def predict(keys):
        return DROPOUT.predict(params, jnp.repeat(row, 2, 0), jnp.array([9, 9]), context, keys)

    keys = jax.random.split(KEY, 3)
    a, b = predict(keys[:2])
    c, d = predict(keys[1:])
    assert np.abs(a - b).max() > 0.01 and np.abs(c - d).max() > 0.01
    np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_dtypes_of_parameters_average_and_moments(batch, accumulation):
    """Are those of the fresh state, and of the state after a step."""
    optimizer = make_optimizer(9, 1e-3, 0, 1.0, (0.9, 0.9), 0.0, 1.0, "bfloat16", "float32")
    stage = make_stage(
        optimizer=optimizer, accumulation=accumulation, param_dtype="bfloat16", ema_dtype="float32"
    )
    state = jax.eval_shape(stage.init, KEY)

    def dtypes(tree):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}

    moments = state.opt[1][0]
    assert dtypes(state.params) == {"bfloat16"} and dtypes(state.ema) == {"float32"}
    assert dtypes(moments.mu) == {"bfloat16"} and dtypes(moments.nu) == {"float32"}
    params = jax.eval_shape(LDM.autoencoder.init, KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    frozen = {"autoencoder": params, "scale_factor": jax.ShapeDtypeStruct((), jnp.float32)}
    state = state.replace(frozen=frozen)
    new, metrics = jax.eval_shape(stage.train_step, state, batch, KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert dtypes(metrics) == {"float32"}


def test_a_state_starts_from_anothers_parameters_in_its_own_dtypes():
    stage = make_stage(param_dtype="bfloat16", ema_dtype="float32")
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(stage.init, KEY))
    given = jax.tree.map(lambda x: np.full(x.shape, 1 + 2**-9, np.float32), state.params)
    new = diffusion_stage.start_from(state, given)
    for part, dtype, value in ((new.params, jnp.bfloat16, 1.0), (new.ema, jnp.float32, 1 + 2**-9)):
        for leaf in jax.tree.leaves(part):
            assert leaf.dtype == dtype and float(leaf.ravel()[0]) == value
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_the_average_follows_the_decay(fresh, frozen, batch):
    stage, state = plain_stage(), fresh.replace(frozen=frozen)
    new, _ = jax.jit(stage.train_step)(state, batch, KEY)
    jax.tree.map(  # decay (1 + 0) / (10 + 0) at the first update
        lambda ema, old, new: np.testing.assert_allclose(ema, 0.1 * old + 0.9 * new, atol=1e-6),
        new.ema,
        state.params,
        new.params,
    )


@pytest.mark.parametrize(("rate", "depends"), [(0.1, True), (1.0, False)])
def test_dropped_captions_do_not_matter(fresh, frozen, batch, rate, depends):
    stage = make_stage(condition_dropout=rate) if rate == 1.0 else plain_stage()
    params = jax.tree.map(lambda x: x + 0.1, fresh.params)  # away from zero-initialised layers
    state = fresh.replace(params=params, frozen=frozen)
    step = jax.jit(stage.train_step)
    other = batch | {"tokens": (batch["tokens"] + 7) % 20}
    losses = [float(step(state, b, KEY)[1]["loss"]) for b in (batch, other)]
    assert (losses[0] != losses[1]) == depends


def test_noise_depends_on_seed_and_step(fresh, frozen, batch):
    stage, state = plain_stage(), fresh.replace(frozen=frozen)
    step = jax.jit(stage.train_step)
    loss = float(step(state, batch, KEY)[1]["loss"])
    assert loss == float(step(state, batch, KEY)[1]["loss"])
    assert loss != float(step(state, batch, jax.random.key(6))[1]["loss"])
    assert loss != float(step(state.replace(step=state.step + 1), batch, KEY)[1]["loss"])


def test_preview_draws_its_prompts(fresh, frozen, batch):
    stage, state = plain_stage(), fresh.replace(frozen=frozen)
    images = jax.jit(stage.preview)(state, batch, KEY)
    assert images.shape == (2, 8, 8, 3)
    assert float(jnp.abs(images).max()) <= 1.0


@pytest.fixture
def encoded(frozen, batch):
    """The batch with moments in the images' place, and what is frozen without the encoder."""
    params = frozen["autoencoder"]
    images = to_float(batch["image"])
    posterior = LDM.autoencoder.apply({"params": params}, images, method="encode")
    decoder = {k: v for k, v in params.items() if k not in ("encoder", "quant_conv")}
    moments = {"moments": np.asarray(posterior.moments), "tokens": batch["tokens"]}
    return moments, frozen | {"autoencoder": decoder}


def away_from_zero(state):
    """The state without kernels that are zero, as some are at first: the loss depends on all."""

    def fill(x):
        return jnp.where(jnp.any(x != 0) | (x.ndim < 2), x, 0.1 * jax.random.normal(KEY, x.shape))

    return state.replace(params=jax.tree.map(fill, state.params))


def test_encoded_images_are_trained_on_alike(fresh, frozen, batch, encoded):
    stage, state = plain_stage(), away_from_zero(fresh)
    moments, rest = encoded
    train_step, eval_step = jax.jit(stage.train_step), jax.jit(stage.eval_step)
    ours, theirs = state.replace(frozen=rest), state.replace(frozen=frozen)
    for _ in range(2):
        ours, found = train_step(ours, moments, KEY)
        theirs, wanted = train_step(theirs, batch, KEY)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4)
    np.testing.assert_allclose(
        eval_step(ours, moments, KEY)["loss"], eval_step(theirs, batch, KEY)["loss"], rtol=1e-4
    )
    assert jax.tree.structure(ours.frozen) == jax.tree.structure(rest)
    pictures = jax.jit(stage.preview)(ours, moments, KEY)
    assert pictures.shape == (2, 8, 8, 3)


def test_the_posterior_of_encoded_images_is_sampled(fresh, encoded):
    moments, rest = encoded
    stage, state = plain_stage(), away_from_zero(fresh).replace(frozen=rest)
    mean, logvar = np.split(moments["moments"], 2, axis=-1)
    wide = moments | {"moments": np.concatenate([mean, logvar + 3], axis=-1)}
    step = jax.jit(stage.train_step)
    losses = [float(step(state, b, KEY)[1]["loss"]) for b in (moments, wide)]
    assert losses[0] != losses[1]
    noise = np.random.default_rng(0).normal(size=mean.shape)
    np.testing.assert_allclose(
        LDM.sample_latents(rest, moments["moments"], noise),
        0.7 * (mean + np.exp(0.5 * logvar) * noise),
        rtol=1e-4,
        atol=1e-6,
    )


def test_encoded_images_of_a_vq_autoencoder_have_no_noise():
    network = AutoencoderVQ(channels=4, channel_multipliers=(1, 2), num_groups=2)
    ldm = dataclasses.replace(LDM, autoencoder=network)
    moments = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float16)
    found = ldm.sample_latents({"scale_factor": 2.0}, moments, np.ones((2, 4, 4, 3)))
    np.testing.assert_array_equal(found, 2 * moments.astype(np.float32))
