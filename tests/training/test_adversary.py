"""The discriminator in training: nothing before its start, then its gradients and penalties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.training.adversary import Adversary, update_if
from tests.first_stages import ACTIVATION, DISCRIMINATOR, LOSSES, same
from tests.torch_networks import draw_params


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES, FAKE = normal(0, 2, 16, 16, 3), normal(1, 2, 16, 16, 3)


def make_adversary(network=ACTIVATION, **changes) -> Adversary:
    return Adversary(network, dataclasses.replace(LOSSES, **changes))


@pytest.fixture(scope="module")
def params():
    return draw_params(ACTIVATION, IMAGES)


@pytest.mark.parametrize("weights", [{}, {"r1_weight": 0.5, "lecam_weight": 0.25}], ids=str)
def test_gradients_are_zero_before_the_start(params, weights):
    adversary = make_adversary(discriminator_loss="vanilla", **weights)
    averages = adversary.init_averages()
    run = jax.jit(adversary.grads)
    for started in (False, True):
        grads, figures = run(params, averages, IMAGES, FAKE, jnp.asarray(started))
        names = {"d_loss", "logits_real", "logits_fake"}
        assert set(figures) == names | ({"r1", "lecam"} if weights else set())
        assert all(bool(np.any(leaf)) == started for leaf in jax.tree.leaves((grads, figures)))
        assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_the_weighted_penalties_are_not_in_the_reported_loss(params):
    figures = [
        jax.jit(adversary.grads)(params, adversary.init_averages(), IMAGES, FAKE, True)[1]
        for adversary in (make_adversary(), make_adversary(r1_weight=0.5, lecam_weight=0.25))
    ]
    np.testing.assert_allclose(figures[0]["d_loss"], figures[1]["d_loss"], rtol=1e-6)


def test_the_generators_gradient_is_by_the_reconstructions(params):
    for kind, slope in (("linear", lambda x: -1.0), ("non_saturating", lambda x: -sigmoid(-x))):
        adversary = make_adversary(generator_loss=kind)
        loss, gradient = jax.jit(adversary.generator_grad)(params, FAKE)
        logits, pullback = jax.vjp(lambda fake: ACTIVATION.apply({"params": params}, fake), FAKE)
        expected = -np.mean(logits) if kind == "linear" else -np.log(sigmoid(logits)).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        (expected,) = pullback(jnp.broadcast_to(slope(logits) / logits.size, logits.shape))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * scale)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def test_activation_norms_start_from_the_images_of_the_first_adversarial_step(params):
    run = jax.jit(make_adversary(disc_start=3).initialized)
    for step in (0, 2, 4):
        assert same(run(params, IMAGES, step), params)
    started = run(params, IMAGES, 3)
    h = ACTIVATION.apply(
        {"params": started}, IMAGES, capture_intermediates=lambda m, _: m.name == "norm_1"
    )[1]["intermediates"]["norm_1"]["__call__"][0]
    np.testing.assert_allclose(np.mean(h, axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(h, axis=(0, 1, 2), ddof=1), 1.0, atol=1e-4)
    batch_norm = draw_params(DISCRIMINATOR, IMAGES)
    adversary = make_adversary(DISCRIMINATOR, disc_start=3)
    assert adversary.initialized(batch_norm, IMAGES, 3) is batch_norm


def test_averages_of_the_logits_follow_the_decay_from_the_start_on():
    adversary = make_adversary(lecam_weight=0.1, lecam_decay=0.9)
    averages = adversary.init_averages()
    assert averages == {"logits": {"real": 0.0, "fake": 0.0}}
    figures = {"logits_real": jnp.float32(2.0), "logits_fake": jnp.float32(-1.0)}
    before = adversary.update_averages(averages, figures, jnp.asarray(False))
    assert before == averages
    averages = adversary.update_averages(averages, figures, jnp.asarray(True))
    averages = adversary.update_averages(averages, figures, jnp.asarray(True))
    np.testing.assert_allclose(averages["logits"]["real"], 2.0 * (1 - 0.81), rtol=1e-5)
    np.testing.assert_allclose(averages["logits"]["fake"], -(1 - 0.81), rtol=1e-5)
    assert make_adversary().init_averages() == {}
    assert make_adversary().update_averages({}, figures, jnp.asarray(True)) == {}


def test_an_update_before_the_start_leaves_parameters_and_moments_alone():
    optimizer = optax.adam(0.1)
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.arange(3.0)}
    opt = optimizer.init(params)
    old = update_if(jnp.asarray(False), optimizer, grads, opt, params)
    assert same(old, (params, opt))
    new_params, new_opt = update_if(jnp.asarray(True), optimizer, grads, opt, params)
    np.testing.assert_allclose(new_params["w"], [1.0, 0.9, 0.9], rtol=1e-5)
    assert int(new_opt[0].count) == 1
