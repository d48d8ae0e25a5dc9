"""The first stage's step: one pass for both networks equals the losses written out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.training import autoencoder_stage
from latent_diffusion_jax.training.state import sample_keys, to_float

AUTOENCODER = AutoencoderKL(
    channels=4, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2, mid_attention=False
)
DISCRIMINATOR = PatchDiscriminator(channels=4, num_layers=2)
KEY = jax.random.key(3)


def make_stage(disc_start=0, optimizer=None, perceptual=None):
    optimizers = dict.fromkeys(("autoencoder", "discriminator"), optimizer or optax.sgd(1.0))
    return autoencoder_stage.make_stage(
        AUTOENCODER,
        DISCRIMINATOR,
        optimizers,
        (16, 16, 3),
        kl_weight=0.01,
        perceptual=perceptual,
        perceptual_weight=0.5,
        disc_start=disc_start,
        disc_weight=0.7,
    )


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)}


def perceptual_toy(params, x, y):
    return params * jnp.mean(jnp.square(x.mean(-1) - y.mean(-1)), axis=(1, 2))


def test_both_updates_are_the_gradients_of_the_losses_written_out(batch):
    stage = make_stage(perceptual=perceptual_toy)
    state = jax.jit(stage.init)(jax.random.key(0)).replace(frozen=jnp.float32(2.0))
    new, metrics = jax.jit(stage.train_step)(state, batch, KEY)

    images = to_float(batch["image"])
    keys = sample_keys(KEY, jnp.zeros((), jnp.int32), 4)
    noise = jnp.stack([jax.random.normal(key, (8, 8, 3)) for key in keys])
    disc_params = state.params["discriminator"]

    def logits(params, x):
        return DISCRIMINATOR.apply({"params": params}, x)

    def forward(params):
        return AUTOENCODER.apply({"params": params}, images, noise)

    def nll(params):
        fake = forward(params)[0]
        distance = 0.5 * perceptual_toy(2.0, images, fake)
        return (jnp.abs(images - fake) + distance[:, None, None, None]).sum() / 4

    def adversarial(params):
        return -logits(disc_params, forward(params)[0]).mean()

    def last(grads):
        return jnp.linalg.norm(grads["decoder"]["conv_out"]["kernel"])

    params = state.params["autoencoder"]
    nll_grads, g_grads = jax.jit(jax.grad(nll))(params), jax.jit(jax.grad(adversarial))(params)
    weight = 0.7 * jnp.clip(last(nll_grads) / (last(g_grads) + 1e-4), 0, 1e4)
    kl_grads = jax.jit(jax.grad(lambda p: 0.01 * forward(p)[1].kl().mean()))(params)
    total = jax.tree.map(lambda a, b, c: a + weight * b + c, nll_grads, g_grads, kl_grads)
    expected = jax.tree.map(jnp.subtract, params, total)  # sgd(1.0)
    scale = optax.tree.norm(total)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale),
        new.params["autoencoder"],
        expected,
    )
    np.testing.assert_allclose(metrics["d_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["rec_loss"], nll(params), rtol=1e-5)

    def d_loss(params):
        real, fake = logits(params, images), logits(params, forward(state.params["autoencoder"])[0])
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    d_grads = jax.jit(jax.grad(d_loss))(disc_params)
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(new, old - grad, atol=1e-5),
        new.params["discriminator"],
        disc_params,
        d_grads,
    )


def test_the_adversarial_term_waits_for_its_start(batch):
    stage = make_stage(disc_start=2, optimizer=optax.adam(1e-3))
    state = jax.jit(stage.init)(jax.random.key(0))
    first, step = state, jax.jit(stage.train_step)
    for n in range(2):
        state, metrics = step(state, batch, KEY)
        assert metrics["d_weight"] == 0 and metrics["d_loss"] == 0, n
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        (first.params["discriminator"], first.opt["discriminator"]),
        (state.params["discriminator"], state.opt["discriminator"]),
    )
    assert jax.tree.all(same)
    state, metrics = step(state, batch, KEY)
    assert metrics["d_weight"] > 0 and metrics["d_loss"] > 0
    assert not jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()),
            first.params["discriminator"],
            state.params["discriminator"],
        )
    )


def test_it_learns_to_reconstruct_a_batch():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    for image, level in zip(images, (250, 200, 150, 100), strict=True):
        image[4:12, 4:12] = level
    batch = {"image": images}
    stage = make_stage(disc_start=1000, optimizer=optax.adam(5e-3))
    state, step = jax.jit(stage.init)(jax.random.key(0)), jax.jit(stage.train_step)
    before = float(stage.eval_step(state, batch, KEY)["psnr"].mean())
    for _ in range(150):
        state, _ = step(state, batch, KEY)
    assert float(stage.eval_step(state, batch, KEY)["psnr"].mean()) > before + 12
    preview = stage.preview(state, batch, KEY)
    assert preview.shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(preview[0::2], to_float(images))
