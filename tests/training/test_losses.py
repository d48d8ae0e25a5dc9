"""Losses of the first stage against PyTorch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_diffusion_jax.models.quantizer import Quantized
from latent_diffusion_jax.training.autoencoder_losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    quantization_loss,
    r1_penalty,
    reconstruction_loss,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_against_torch(ours, theirs, *arguments) -> None:
    """Two functions of the same arguments: the value and the gradient by each of them."""
    doubles = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arguments]
    expected = theirs(*doubles)
    expected.backward()
    argnums = tuple(range(len(arguments)))
    value, gradients = jax.value_and_grad(ours, argnums)(*map(jnp.asarray, arguments))
    assert value.shape == ()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for gradient, double in zip(gradients, doubles, strict=True):
        largest = double.grad.abs().max().item()
        np.testing.assert_allclose(gradient, double.grad.numpy(), rtol=1e-4, atol=1e-5 * largest)


IMAGES, RECONSTRUCTIONS = normal(0, 3, 4, 5, 2), normal(1, 3, 4, 5, 2)
REAL, FAKE = 2 * normal(2, 3, 6, 6, 1), 2 * normal(3, 3, 6, 6, 1)


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reconstruction_loss_equals_torch(pixel_loss, reduction):
    """The references' arithmetic: the perceptual distance is added to every element."""
    perceptual, logvar = np.array([0.1, 0.0, 2.0], np.float32), np.float32(-0.7)

    def theirs(x, y, perceptual, logvar):
        rec = torch.abs(x - y) if pixel_loss == "l1" else (x - y) ** 2
        nll = (rec + perceptual[:, None, None, None]) / torch.exp(logvar) + logvar
        return torch.mean(nll) if reduction == "mean" else torch.sum(nll) / nll.shape[0]

    def ours(x, y, perceptual, logvar):
        fields = dict(pixel_loss=pixel_loss, reduction=reduction)
        return reconstruction_loss(x, y, perceptual, logvar, **fields)

    check_against_torch(ours, theirs, IMAGES, RECONSTRUCTIONS, perceptual, logvar)


def test_reconstruction_loss_is_l1_summed_over_an_image_by_default():
    expected = np.abs(IMAGES.astype(np.float64) - RECONSTRUCTIONS).sum() / 3
    np.testing.assert_allclose(reconstruction_loss(IMAGES, RECONSTRUCTIONS), expected, rtol=1e-6)
    zero = np.float32(0.0)
    with_logvar = reconstruction_loss(IMAGES, RECONSTRUCTIONS, None, zero)
    np.testing.assert_allclose(with_logvar, expected, rtol=1e-6)
    assert reconstruction_loss(IMAGES, IMAGES) == 0.0


def test_the_best_logvar_is_the_logarithm_of_the_distance():
    distance = np.abs(IMAGES - RECONSTRUCTIONS).mean()
    slope = jax.grad(lambda v: reconstruction_loss(IMAGES, RECONSTRUCTIONS, None, v))
    np.testing.assert_allclose(slope(jnp.log(distance)), 0.0, atol=1e-4)
    assert slope(jnp.log(distance) + 0.1) > 1 and slope(jnp.log(distance) - 0.1) < -1


@pytest.mark.parametrize("beta_on_codebook", [True, False])
def test_quantization_loss_weighs_one_of_the_terms(beta_on_codebook):
    codebook, commitment = np.array([1.0, 3.0], np.float32), np.array([10.0, 50.0], np.float32)
    quantized = Quantized(latents=None, indices=None, codebook_loss=codebook,
                          commitment_loss=commitment)  # fmt: skip
    loss = quantization_loss(quantized, 0.25, beta_on_codebook)
    expected = 0.25 * 2.0 + 30.0 if beta_on_codebook else 2.0 + 0.25 * 30.0
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_hinge_loss_equals_torch():
    def theirs(real, fake):
        return 0.5 * (torch.mean(F.relu(1.0 - real)) + torch.mean(F.relu(1.0 + fake)))

    check_against_torch(discriminator_loss, theirs, REAL, FAKE)


def test_vanilla_loss_equals_torch():
    def theirs(real, fake):
        bce = F.binary_cross_entropy_with_logits
        return 0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))

    check_against_torch(lambda r, f: discriminator_loss(r, f, "vanilla"), theirs, REAL, FAKE)


def test_hinge_loss_is_zero_beyond_the_margins_and_one_for_an_undecided_discriminator():
    assert discriminator_loss(jnp.full(4, 1.5), jnp.full(4, -1.5)) == 0.0
    assert discriminator_loss(jnp.zeros(4), jnp.zeros(4)) == 1.0
    assert discriminator_loss(jnp.full(4, -1.0), jnp.full(4, 1.0)) == 2.0


def test_generator_losses_equal_torch():
    check_against_torch(generator_loss, lambda fake: -torch.mean(fake), FAKE)

    def non_saturating(fake):
        return -torch.mean(torch.log(torch.sigmoid(fake)))

    check_against_torch(lambda fake: generator_loss(fake, "non_saturating"), non_saturating, FAKE)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_losses_of_extreme_logits_are_finite(kind):
    far = jnp.asarray([-1e4, 1e4])
    value, gradients = jax.value_and_grad(discriminator_loss, (0, 1))(far, far, kind)
    assert np.isfinite(value) and np.isfinite(gradients).all()
    value, gradient = jax.value_and_grad(generator_loss)(far, "non_saturating")
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_lecam_penalty_equals_torch():
    """Equation 3 of the paper: real logits against the average of the fake ones, and back."""
    real_average, fake_average = 0.4, -0.3

    def theirs(real, fake):
        above = torch.mean(F.relu(real - fake_average) ** 2)
        return above + torch.mean(F.relu(real_average - fake) ** 2)

    def ours(real, fake):
        return lecam_penalty(real, fake, jnp.float32(real_average), jnp.float32(fake_average))

    check_against_torch(ours, theirs, REAL, FAKE)


def test_r1_penalty_equals_torch_through_a_second_derivative():
    """A small discriminator; the penalty's gradient by its weights."""
    images, first, second = normal(4, 3, 4, 4, 2), normal(5, 2, 6), normal(6, 6)

    def theirs(images, first, second):
        x = images * 1.0
        logits = torch.tanh(x @ first) @ second  # [B, H, W]
        total = logits.mean(dim=(1, 2)).sum()
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        return 0.5 * grad.square().sum(dim=(1, 2, 3)).mean()

    def ours(images, first, second):
        def total(x):
            return jnp.mean(jnp.tanh(x @ first) @ second, axis=(1, 2)).sum()

        return r1_penalty(jax.grad(total)(images))

    check_against_torch(ours, theirs, images, first, second)


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
