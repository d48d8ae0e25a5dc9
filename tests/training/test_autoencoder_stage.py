"""What the first stage's step does over several steps, and what it leaves alone.

That one step is right is in test_first_stage_step.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.training import autoencoder_stage
from latent_diffusion_jax.training.codebook import CodebookAverage
from latent_diffusion_jax.training.optimizer import make_optimizer
from latent_diffusion_jax.training.state import jit_train_step
from tests.first_stages import (
    ACTIVATION,
    DISCRIMINATOR,
    KEY,
    KL,
    SIZE,
    VQ,
    draw_batch,
    make_stage,
    random_state,
    same,
    sgd,
)

NO_GAN = dict(disc_weight=0.0)


def perceptual_mean(params, x, y):
    return params * jnp.mean(jnp.square(x - y), axis=(1, 2, 3))


def test_the_adversarial_term_waits_for_its_start():
    stage = make_stage(
        discriminator=ACTIVATION, optimizer=optax.adam(1e-3), disc_start=2, lecam_weight=0.1
    )
    first = state = random_state(stage, KL, ACTIVATION)
    step, batch = jax.jit(stage.train_step), draw_batch(2)

    def adversarial(state):
        return state.params["discriminator"], state.opt["discriminator"], state.averages

    for _ in range(2):
        old, (state, metrics) = state, step(state, batch, KEY)
        assert metrics["d_weight"] == 0 and metrics["d_loss"] == 0 and metrics["lecam"] == 0
        expected = metrics["rec_loss"] + 0.01 * metrics["kl"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert same(adversarial(state), adversarial(first))
        assert not same(state.params["autoencoder"], old.params["autoencoder"])
    # Now it starts from the data: far from what was drawn, and not again at the step after.
    for expected_change in (1.0, 0.0):
        old, (state, metrics) = state, step(state, batch, KEY)
        assert metrics["d_weight"] > 0 and metrics["d_loss"] > 0
        before, after = (s.params["discriminator"] for s in (old, state))
        moved = np.abs(after["norm_1"]["shift"] - before["norm_1"]["shift"]).max()
        assert (moved > 0.05) == bool(expected_change) and moved > 0
        assert not same(after["conv_1"], before["conv_1"])
        assert not same(state.averages, old.averages)


@pytest.mark.parametrize("network", [KL, VQ], ids=["kl", "vq"])
def test_finetuning_the_decoder_leaves_the_latents_alone(network):
    """Bit for bit; what stays has no moments, and the regularising term does not count."""
    results = []
    for weight in (0.0, 100.0):
        # The weight decay moves all that is trained, whatever its gradient.
        stage = make_stage(
            network,
            optimizer=optax.adamw(1e-3, weight_decay=0.1),
            fields=dict(trained="decoder", ema_decay=0.9),
            kl_weight=weight,
            **(NO_GAN if network is KL else dict(update_order="generator_first")),
        )
        state = random_state(stage, network, DISCRIMINATOR)
        new, metrics = jax.jit(stage.train_step)(state, draw_batch(2), KEY)
        results.append((new, metrics))
        if network is VQ:
            break  # its terms do not reach the decoder anyway
    for part in ("encoder", "quant_conv", "quantizer"):
        if part in state.params["autoencoder"]:
            old = state.params["autoencoder"][part]
            assert same(new.params["autoencoder"][part], old), part
            assert same(new.ema["autoencoder"][part], old), part
    for part in ("decoder", "post_quant_conv"):
        old, current = state.params["autoencoder"][part], new.params["autoencoder"][part]
        changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), old, current)
        assert jax.tree.all(changed), part
        assert not same(new.ema["autoencoder"][part], old), part
    moments = [name for name in flatten_names(new.opt["autoencoder"]) if "/autoencoder/" in name]
    assert moments
    assert all("/decoder/" in name or "/post_quant_conv/" in name for name in moments)
    if network is KL:
        (without, figures), (with_kl, others) = results
        assert same(without.params["autoencoder"], with_kl.params["autoencoder"])
        np.testing.assert_array_equal(figures["grad_norm"], others["grad_norm"])
        assert others["kl"] > 0


def test_without_adversarial_weight_there_is_no_discriminator():
    stage = make_stage(VQ, **NO_GAN)
    shapes = jax.eval_shape(stage.init, KEY)
    assert set(shapes.params) == set(shapes.opt) == {"autoencoder"} and shapes.averages is None
    new, metrics = jax.eval_shape(stage.train_step, shapes, draw_batch(2), KEY)
    assert jax.tree.structure(new) == jax.tree.structure(shapes)
    expected = {"loss", "rec_loss", "l1", "quantization", "grad_norm"}
    assert set(metrics) == expected | {"codebook_usage", "perplexity"}


def run_accumulated(network, accumulation, sizes=None, **changes):
    """A step of everything that does not depend on the statistics of a micro-batch."""
    average = CodebookAverage(0.5, 0.0) if network is VQ else None
    stage = make_stage(
        network,
        ACTIVATION,
        fields=dict(
            accumulation=accumulation, codebook_average=average, perceptual=perceptual_mean
        ),
        adaptive_weight=False,
        **changes,
    )
    state = random_state(stage, network, ACTIVATION).replace(frozen=jnp.float32(2.0))
    batch = draw_batch(8)
    if sizes is None:
        return *jax.jit(stage.train_step)(state, batch, KEY), state
    mesh = sharding.make_mesh(sizes)
    shardings = sharding.state_sharding(state, mesh)
    assert any("fsdp" in str(x.spec) for x in jax.tree.leaves(shardings.params))
    placed = jax.device_put(state, shardings)
    step = jit_train_step(stage, shardings, mesh)
    with jax.set_mesh(mesh):
        new, metrics = step(placed, sharding.put_batch(batch, mesh, 8), KEY)
    assert metrics.pop("skipped") == 0
    return *jax.device_get((new, metrics)), state


def check_same_step(ours, expected) -> None:
    new, metrics, state = expected
    assert set(ours[1]) == set(metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(ours[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert jax.tree.structure(ours[0]) == jax.tree.structure(new)
    for name in new.opt:
        largest = max(np.abs(g).max() for g in jax.tree.leaves(new.opt[name]))

        def check(a, b, largest=largest):
            # Some gradients are zero but for rounding: of biases that a norm takes away again.
            scale = max(np.abs(b).max(), 0.01 * largest)
            assert np.abs(a - b).max() <= 1e-5 * scale

        jax.tree.map(check, ours[0].opt[name], new.opt[name])
        assert not same(new.params[name], state.params[name])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6),
        (ours[0].params, ours[0].averages),
        (new.params, new.averages),
    )


OPTIONS = {
    "vq": (VQ, dict(update_order="generator_first", lecam_weight=0.1)),
    "kl": (KL, dict(r1_weight=0.1, learn_logvar=True)),
}


@pytest.mark.parametrize("kind", [pytest.param("kl", marks=pytest.mark.slow), "vq"])
def test_micro_batches_make_the_step_of_the_whole_batch(kind, monkeypatch):
    network, changes = OPTIONS[kind]
    whole = run_accumulated(network, 1, **changes)
    check_same_step(run_accumulated(network, 2, **changes), whole)
    if kind == "vq":  # as it runs on other devices: in a loop, with branches
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, default, **others: default(*args)
        )
        check_same_step(run_accumulated(network, 2, **changes), whole)


@pytest.mark.parametrize(
    ("kind", "accumulation", "sizes"),
    [
        ("kl", 1, {"data": 1, "fsdp": 8, "tensor": 1}),
        ("vq", 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_devices_make_the_step_of_one(kind, accumulation, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 128)  # so that these small ones are split
    network, changes = OPTIONS[kind]
    found = run_accumulated(network, accumulation, sizes, **changes)
    check_same_step(found, run_accumulated(network, 1, **changes))


def test_a_codebook_of_moving_averages_is_not_the_optimizers():
    """Whose weight decay would shrink it; its neighbours do feel it."""
    average = CodebookAverage(0.6, 0.0)
    fields = dict(codebook_average=average, ema_decay=0.9)
    optimizer = optax.adamw(1e-3, weight_decay=100.0)
    stage = make_stage(VQ, optimizer=optimizer, fields=fields, **NO_GAN)
    state = random_state(stage, VQ, DISCRIMINATOR)
    codebook = np.asarray(state.params["autoencoder"]["quantizer"]["codebook"])
    batch = draw_batch(3)
    new, metrics = jax.jit(stage.train_step)(state, batch, KEY)

    variables = {"params": state.params["autoencoder"]}
    z = jax.jit(lambda x: VQ.apply(variables, x, method="encode").mean)(to_float(batch["image"]))
    z = np.asarray(z, np.float64).reshape(-1, 3)
    chosen = np.square(z[:, None] - codebook).sum(-1).argmin(-1)
    counts = np.bincount(chosen, minlength=20) / len(z)
    shares = 0.6 / 20 + 0.4 * counts
    sums = 0.6 * codebook / 20 + 0.4 * np.stack([z[chosen == i].sum(0) for i in range(20)]) / len(z)
    expected = sums / shares[:, None]
    found = new.params["autoencoder"]["quantizer"]["codebook"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(new.averages["codebook"]["shares"], shares, rtol=1e-5)
    of_ema = new.ema["autoencoder"]["quantizer"]["codebook"]
    np.testing.assert_allclose(of_ema, 0.1 * codebook + 0.9 * expected, rtol=0, atol=1e-5)
    kernel = lambda s: np.abs(s.params["autoencoder"]["decoder"]["conv_in"]["kernel"]).mean()  # noqa: E731
    assert kernel(new) < 0.95 * kernel(state)
    # The reported term is the commitment alone, weighed as the convention says.
    distance = np.square(z - codebook[chosen]).mean()
    np.testing.assert_allclose(metrics["quantization"], distance, rtol=1e-4)
    np.testing.assert_allclose(metrics["codebook_usage"], (counts > 0).mean(), rtol=1e-6)
    entropy = -np.sum(counts[counts > 0] * np.log(counts[counts > 0]))
    np.testing.assert_allclose(metrics["perplexity"], np.exp(entropy), rtol=1e-5)


def test_the_average_follows_its_decay_and_is_what_is_evaluated():
    fields = dict(ema_decay=0.9, perceptual=perceptual_mean)
    stage = make_stage(optimizer=sgd(1e-2), fields=fields, **NO_GAN)
    state = jax.jit(stage.init)(KEY).replace(frozen=jnp.float32(2.0))
    assert same(state.ema, {"autoencoder": state.params["autoencoder"]})
    batch = draw_batch(2)
    new, _ = jax.jit(stage.train_step)(state, batch, KEY)
    jax.tree.map(  # decay (1 + 0) / (10 + 0) at the first update
        lambda ema, old, new: np.testing.assert_allclose(ema, 0.1 * old + 0.9 * new, atol=1e-6),
        new.ema["autoencoder"],
        state.params["autoencoder"],
        new.params["autoencoder"],
    )
    images = np.asarray(to_float(batch["image"]), np.float64)
    decoded = jax.jit(KL.apply)({"params": new.ema["autoencoder"]}, to_float(batch["image"]))
    decoded = np.clip(np.asarray(decoded, np.float64), -1.0, 1.0)
    figures, preview = jax.jit(lambda *args: (stage.eval_step(*args), stage.preview(*args)))(
        new, batch, KEY
    )
    assert set(figures) == {"l1", "psnr", "lpips"}
    mse = np.square((decoded - images) / 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(figures["psnr"], -10 * np.log10(mse), rtol=1e-5)
    np.testing.assert_allclose(figures["l1"], np.abs(decoded - images).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(figures["lpips"], 8 * mse, rtol=1e-4)
    assert preview.shape == (4, SIZE, SIZE, 3)
    np.testing.assert_allclose(preview[0::2], images, atol=1e-6)
    np.testing.assert_allclose(preview[1::2], decoded, atol=1e-4)


def test_it_learns_to_reconstruct_a_batch():
    images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    for image, level in zip(images, (250, 200, 150, 100), strict=True):
        image[4:12, 4:12] = level
    batch = {"image": images}
    stage = make_stage(optimizer=optax.adam(5e-3), **NO_GAN)
    state, step = jax.jit(stage.init)(jax.random.key(0)), jax.jit(stage.train_step)
    evaluate = jax.jit(stage.eval_step)
    before = float(evaluate(state, batch, KEY)["psnr"].mean())
    for _ in range(150):
        state, _ = step(state, batch, KEY)
    assert float(evaluate(state, batch, KEY)["psnr"].mean()) > before + 12


def test_a_state_starts_from_anothers_parameters_with_all_that_follows_them():
    average = CodebookAverage(0.9, 0.0)
    fields = dict(codebook_average=average, ema_decay=0.9)
    stage = make_stage(VQ, fields=fields, logvar=-0.25, learn_logvar=True, **NO_GAN)
    state = jax.jit(stage.init)(KEY)
    assert state.params["logvar"] == -0.25 and state.step == 0
    other = jax.tree.map(lambda x: x + 1.0, state.params["autoencoder"])
    new = autoencoder_stage.start_from(state, other)
    assert same(new.params["autoencoder"], other) and same(new.ema["autoencoder"], other)
    codebook = other["quantizer"]["codebook"]
    assert same(new.averages["codebook"], average.init(codebook))
    assert same((new.opt, new.step), (state.opt, state.step))


@pytest.mark.parametrize("network", [KL, VQ], ids=["kl", "vq"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dtypes_of_parameters_and_average(network, accumulation):
    """Are those of the fresh state, and of the state after a step."""
    average = CodebookAverage(0.5, 0.5) if network is VQ else None
    stage = make_stage(
        network,
        ACTIVATION,
        fields=dict(
            ema_decay=0.9, codebook_average=average, accumulation=accumulation,
            param_dtype="bfloat16", ema_dtype="float32", perceptual=perceptual_mean,
        ),
        optimizer=make_optimizer(9, 1e-3, 0, 1.0, (0.9, 0.9), 0.0, 1.0),
        learn_logvar=True, lecam_weight=0.1, update_order="generator_first",
    )  # fmt: skip
    state = jax.eval_shape(stage.init, KEY).replace(frozen=jax.ShapeDtypeStruct((), jnp.float32))
    params = flatten_names(state.params)
    assert {str(params.pop("logvar").dtype)} == {"float32"}
    assert {str(leaf.dtype) for leaf in params.values()} == {"bfloat16"}
    others = jax.tree.leaves((state.ema, state.averages)) + [
        leaf for leaf in jax.tree.leaves(state.opt) if leaf.ndim
    ]
    assert {str(leaf.dtype) for leaf in others} == {"float32"}
    new, metrics = jax.eval_shape(stage.train_step, state, draw_batch(4), KEY)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
    assert jax.tree.all(same)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(metrics)} == {"float32"}
