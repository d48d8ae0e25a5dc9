"""Quantisers: the codebook against `diffusers`, finite scalar quantisation against its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VectorQuantizer as DiffusersQuantizer

from latent_diffusion_jax.models import quantizer
from latent_diffusion_jax.models.quantizer import (
    FiniteScalarQuantizer,
    VectorQuantizer,
    nearest,
    straight_through,
)
from latent_diffusion_jax.training.autoencoder_losses import quantization_loss
from tests.torch_networks import nchw, nhwc


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(ours, expected, tolerance: float) -> None:
    """Relative to the largest element."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# A block of codes, not quite three blocks.
@pytest.mark.parametrize(("size", "dim"), [(50, 4), (2_500, 3)])
@pytest.mark.parametrize("legacy", [True, False])
def test_codebook_equals_diffusers(size, dim, legacy):
    model = VectorQuantizer(size, dim)
    z, weights, codebook = normal(0, 2, 5, 3, dim), normal(1, 2, 5, 3, dim), normal(2, size, dim)

    def total(z, codebook):
        out = model.apply({"params": {"codebook": codebook}}, z)
        loss = quantization_loss(out, 0.25, beta_on_codebook=legacy)
        return jnp.sum(weights * out.latents) + 3.0 * loss, (out, loss)

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (z_grad, codebook_grad), (out, loss) = run(z, codebook)

    reference = DiffusersQuantizer(size, dim, beta=0.25, legacy=legacy).double()
    reference.embedding.weight.data = torch.tensor(codebook, dtype=torch.float64)
    torch_z = nchw(z).requires_grad_()
    latents, torch_loss, (_, _, indices) = reference(torch_z)
    ((nchw(weights) * latents).sum() + 3.0 * torch_loss).backward()

    np.testing.assert_array_equal(out.indices, indices.reshape(2, 5, 3).numpy())
    assert len(np.unique(out.indices)) > 10 and out.indices.dtype == jnp.int32
    assert_close(out.latents, nhwc(latents), 1e-6)
    np.testing.assert_allclose(loss, torch_loss.item(), rtol=1e-5)
    assert_close(z_grad, nhwc(torch_z.grad), 1e-5)
    assert_close(codebook_grad, reference.embedding.weight.grad.numpy(), 1e-5)


def test_losses_are_of_each_image():
    model, z, codebook = VectorQuantizer(9, 2), normal(3, 3, 4, 4, 2), normal(4, 9, 2)
    out = model.apply({"params": {"codebook": codebook}}, z)
    expected = np.square(codebook[np.asarray(out.indices)] - z).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(out.codebook_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(out.commitment_loss, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 1_023, 1_024, 1_025, 2_048, 2_100])
def test_nearest_is_the_first_of_the_nearest(size):
    """On a grid of integers distances are exact, and many codes are the same."""
    rng = np.random.default_rng(size)
    codebook = rng.integers(-6, 7, (size, 3)).astype(np.float32)
    z = rng.integers(-8, 9, (5, 40, 3)).astype(np.float32)
    expected = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
    found = jax.jit(nearest)(z, codebook)
    np.testing.assert_array_equal(found, expected)
    # Codes that are equal throughout: always the first.
    same = jax.jit(nearest)(z, np.ones_like(codebook))
    np.testing.assert_array_equal(same, np.zeros((5, 40)))


def test_blocks_find_what_one_search_finds(monkeypatch):
    codebook, z = normal(5, 77, 4), normal(6, 3, 50, 4)
    expected = nearest(z, codebook)
    for at_once in (1, 10, 76, 77):
        monkeypatch.setattr(quantizer, "CODES_AT_ONCE", at_once)
        np.testing.assert_array_equal(nearest(z, codebook), expected)


def test_half_precision_latents_are_quantised_in_single():
    model, codebook = VectorQuantizer(9, 2), normal(4, 9, 2)
    z = jnp.asarray(normal(7, 1, 4, 4, 2), jnp.bfloat16)
    out = model.apply({"params": {"codebook": codebook}}, z)
    exact = model.apply({"params": {"codebook": codebook}}, z.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, out, exact)
    assert out.latents.dtype == out.codebook_loss.dtype == jnp.float32


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    z, q = normal(8, 5), normal(9, 5)
    value, pullback = jax.vjp(straight_through, z, q)
    np.testing.assert_allclose(value, q, rtol=1e-6)
    z_grad, q_grad = pullback(jnp.arange(5.0))
    np.testing.assert_array_equal(z_grad, np.arange(5.0))
    np.testing.assert_array_equal(q_grad, np.zeros(5))


def test_codes_are_found_from_their_indices_and_back():
    codebook = normal(10, 30, 3)
    model, variables = VectorQuantizer(30, 3), {"params": {"codebook": codebook}}
    indices = np.arange(30).reshape(1, 5, 6)
    codes = model.apply(variables, indices, method="lookup")
    np.testing.assert_array_equal(codes, codebook.reshape(1, 5, 6, 3))
    np.testing.assert_array_equal(model.apply(variables, codes, method="indices"), indices)
    z = normal(11, 2, 4, 4, 3)
    found = model.apply(variables, model.apply(variables, z, method="indices"), method="lookup")
    np.testing.assert_allclose(model.apply(variables, z).latents, found, atol=1e-6)


def test_the_codebook_starts_uniform_within_its_inverse_size():
    params = VectorQuantizer(200, 8).init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))["params"]
    codes = np.asarray(params["codebook"])
    assert codes.shape == (200, 8)
    assert abs(codes).max() <= 1 / 200 and abs(codes).max() > 0.99 / 200
    np.testing.assert_allclose(codes.std(), 1 / 200 / math.sqrt(3), rtol=0.05)


# Finite scalar quantisation. The paper's bound, appendix A.1, in float64: with L levels a channel
# is squashed to an interval a little wider than L - 1, so that exactly L integers are in reach.

LEVELS = [(2,), (3,), (4,), (8, 6, 5), (7, 5, 5, 5), (3, 2, 4)]


def bound(z: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Real numbers -> what is rounded, and its derivative."""
    width = 1.001 * (levels - 1) / 2
    middle = 0.0 if levels % 2 else 0.5
    squashed = np.tanh(z + 0.5 * math.log((width + middle) / (width - middle)))
    return width * squashed - middle, width * (1 - squashed**2)


def unbound(y: np.ndarray, levels: int) -> np.ndarray:
    """The inverse of `bound`."""
    width = 1.001 * (levels - 1) / 2
    middle = 0.0 if levels % 2 else 0.5
    return np.arctanh((y + middle) / width) - np.arctanh(middle / width)


def run_fsq(levels, z, weights):
    model = FiniteScalarQuantizer(levels)

    def total(z):
        out = model.apply({}, z)
        return jnp.sum(weights * out.latents), out

    return jax.jit(jax.grad(total, has_aux=True))(z)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_finite_scalars_equal_the_papers_formula(levels):
    z, weights = 2 * normal(12, 4, 5, 6, len(levels)), normal(13, 4, 5, 6, len(levels))
    gradient, out = run_fsq(levels, z, weights)
    index, factor = np.zeros((4, 5, 6), int), 1
    for channel, n in enumerate(levels):
        bounded, slope = bound(z[..., channel].astype(np.float64), n)
        assert np.abs(bounded - np.floor(bounded) - 0.5).min() > 1e-5, "too close to a tie"
        rounded, half = np.round(bounded), n // 2
        assert rounded.min() >= -half and rounded.max() <= (n - 1) // 2
        np.testing.assert_allclose(out.latents[..., channel], rounded / half, atol=1e-6)
        expected = weights[..., channel] * slope / half
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradient[..., channel], expected, rtol=0, atol=1e-4 * scale)
        index += factor * (rounded.astype(int) + half)
        factor *= n
    np.testing.assert_array_equal(out.indices, index)
    assert out.indices.dtype == jnp.int32
    for loss in (out.codebook_loss, out.commitment_loss):
        np.testing.assert_array_equal(loss, np.zeros(4))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_combination_of_levels_is_a_code(levels):
    model, size = FiniteScalarQuantizer(levels), math.prod(levels)
    assert model.codebook_size == size
    indices = np.arange(size)
    codes = np.asarray(model.apply({}, indices, method="lookup"))
    assert codes.shape == (size, len(levels)) and len(np.unique(codes, axis=0)) == size
    assert codes.min() == -1.0 and codes.max() <= 1.0
    # A latent that is rounded to each of them.
    scales = [n // 2 for n in levels]
    z = np.stack([unbound(codes[:, i] * s, levels[i]) for i, s in enumerate(scales)], -1)
    z = z.astype(np.float32)[None, None]
    _, out = run_fsq(levels, z, 1.0)
    np.testing.assert_allclose(out.latents[0, 0], codes, atol=1e-6)
    np.testing.assert_array_equal(out.indices[0, 0], indices)
    np.testing.assert_array_equal(model.apply({}, z, method="indices")[0, 0], indices)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_outermost_values_are_reached_and_not_left(levels):
    far = np.array([[-50.0], [50.0]], np.float32) * np.ones(len(levels), np.float32)
    latents = run_fsq(levels, far.reshape(2, 1, 1, -1), 1.0)[1].latents[:, 0, 0]
    np.testing.assert_array_equal(latents[0], -np.ones(len(levels)))
    np.testing.assert_allclose(latents[1], [(n - 1) // 2 / (n // 2) for n in levels])


def test_finite_scalars_have_no_parameters():
    assert not FiniteScalarQuantizer((4, 4)).init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)))
