"""Losses of the first stage against PyTorch and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_diffusion_jax.training.autoencoder_losses import (
    adaptive_weight,
    generator_loss,
    hinge_loss,
    reconstruction_loss,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES, RECONSTRUCTIONS = normal(0, 3, 4, 5, 2), normal(1, 3, 4, 5, 2)


def test_reconstruction_loss_is_l1_summed_over_an_image():
    expected = np.abs(IMAGES.astype(np.float64) - RECONSTRUCTIONS).sum() / 3
    np.testing.assert_allclose(reconstruction_loss(IMAGES, RECONSTRUCTIONS), expected, rtol=1e-6)
    assert reconstruction_loss(IMAGES, IMAGES) == 0.0


def test_perceptual_distance_is_added_to_every_element():
    """The reference's arithmetic: rec = |x - y| + p; sum(rec) / B."""
    perceptual = np.array([0.1, 0.0, 2.0], np.float32)
    x, y, p = (torch.tensor(a) for a in (IMAGES, RECONSTRUCTIONS, perceptual))
    rec = torch.abs(x - y) + p[:, None, None, None]
    expected = torch.sum(rec) / rec.shape[0]
    ours = reconstruction_loss(IMAGES, RECONSTRUCTIONS, perceptual)
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-6)
    plain = reconstruction_loss(IMAGES, RECONSTRUCTIONS)
    np.testing.assert_allclose(ours - plain, 4 * 5 * 2 * perceptual.mean(), rtol=1e-5)


def test_hinge_loss_and_its_gradients_equal_torch():
    real, fake = 2 * normal(2, 3, 6, 6, 1), 2 * normal(3, 3, 6, 6, 1)
    torch_real, torch_fake = (torch.tensor(x, requires_grad=True) for x in (real, fake))
    expected = 0.5 * (torch.mean(F.relu(1.0 - torch_real)) + torch.mean(F.relu(1.0 + torch_fake)))
    expected.backward()
    loss, gradients = jax.value_and_grad(hinge_loss, (0, 1))(jnp.asarray(real), jnp.asarray(fake))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], torch_real.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(gradients[1], torch_fake.grad.numpy(), rtol=1e-6)


def test_hinge_loss_is_zero_beyond_the_margins_and_one_for_an_undecided_discriminator():
    assert hinge_loss(jnp.full(4, 1.5), jnp.full(4, -1.5)) == 0.0
    assert hinge_loss(jnp.zeros(4), jnp.zeros(4)) == 1.0
    assert hinge_loss(jnp.full(4, -1.0), jnp.full(4, 1.0)) == 2.0


def test_generator_loss_is_minus_the_mean_logit():
    logits = normal(4, 3, 6, 6, 1)
    np.testing.assert_allclose(generator_loss(logits), -logits.astype(float).mean(), rtol=1e-5)


def test_adaptive_weight_equals_torch():
    nll, gan = normal(5, 3, 3, 8, 3), 0.01 * normal(6, 3, 3, 8, 3)
    expected = torch.norm(torch.tensor(nll)) / (torch.norm(torch.tensor(gan)) + 1e-4)
    assert 50 < expected < 200
    np.testing.assert_allclose(adaptive_weight(nll, gan), expected.item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("reconstruction", "generator", "expected"),
    [(0.0, 1.0, 0.0), (5.0, 0.0, 1e4), (3.0, 1e-4, 1e4)],
)
def test_adaptive_weight_stays_finite_within_its_bounds(reconstruction, generator, expected):
    direction = jnp.asarray([0.6, 0.0, 0.8])
    weight = adaptive_weight(reconstruction * direction, generator * direction)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_adaptive_weight_balances_the_two_gradients():
    nll, gan = normal(7, 20), 3 * normal(8, 20)
    weight = adaptive_weight(nll, gan)
    np.testing.assert_allclose(weight * np.linalg.norm(gan), np.linalg.norm(nll), rtol=1e-4)


def test_no_gradient_flows_through_the_adaptive_weight():
    gradients = jax.grad(adaptive_weight, (0, 1))(jnp.ones(3), jnp.ones(3))
    np.testing.assert_array_equal(gradients, np.zeros((2, 3)))
