"""Both autoencoders against `diffusers` with the same weights, and the KL's posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ, DiagonalGaussian
from latent_diffusion_jax.training.autoencoder_losses import quantization_loss
from tests.torch_networks import (
    check_gradients,
    diffusers_autoencoder,
    draw_params,
    in_diffusers,
    nchw,
    nhwc,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SMALL = dict(channels=8, num_groups=4)
VARIANTS = {
    "no_attention": dict(channel_multipliers=(1, 2, 1), num_res_blocks=2, mid_attention=False),
    "everywhere": dict(
        channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(0, 1), image_channels=5
    ),
    "one_level": dict(
        channel_multipliers=(1, 3, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        mid_attention=False,
        image_channels=1,
        z_channels=4,
        embed_dim=4,
    ),
}


def check_outputs(ours, theirs) -> None:
    for our, their in zip(ours, theirs, strict=True):
        expected = nhwc(their)
        assert our.shape == expected.shape and our.dtype == jnp.float32
        np.testing.assert_allclose(our, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_kl_values_and_gradients_equal_diffusers(variant):
    model = AutoencoderKL(**SMALL, **VARIANTS[variant])
    factor = model.downsampling_factor
    images = normal(0, 2, 16, 8, model.image_channels)
    noise = normal(1, 2, 16 // factor, 8 // factor, model.embed_dim)
    params = draw_params(model, images)
    weights = normal(2, *images.shape), normal(3, *noise.shape), normal(4, *noise.shape)

    def forward(network):
        posterior = network.encode(images)
        return network.decode(posterior.sample(noise)), posterior.mean, posterior.logvar

    def loss(params):
        outputs = model.apply({"params": params}, method=forward)
        return sum(jnp.sum(w * y) for w, y in zip(weights, outputs, strict=True)), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)

    reference = diffusers_autoencoder(model, params)
    posterior = reference.encode(nchw(images)).latent_dist
    z = posterior.mean + posterior.std * nchw(noise)
    expected = reference.decode(z).sample, posterior.mean, posterior.logvar
    check_outputs(outputs, expected)
    sum((nchw(w) * y).sum() for w, y in zip(weights, expected, strict=True)).backward()
    check_gradients(in_diffusers(gradients, reference), reference, 1e-4)


@pytest.mark.parametrize(("variant", "embed_dim"), [("everywhere", 3), ("one_level", 2)])
def test_vq_values_and_gradients_equal_diffusers(variant, embed_dim):
    fields = VARIANTS[variant] | dict(codebook_size=40, embed_dim=embed_dim)
    model = AutoencoderVQ(**SMALL, **fields)
    factor = model.downsampling_factor
    images = normal(0, 2, 16, 8, model.image_channels)
    params = draw_params(model, images, seed=1)
    weights = normal(2, *images.shape), normal(3, 2, 16 // factor, 8 // factor, model.embed_dim)

    def forward(network):
        z = network.encode(images).mean
        quantized = network.quantize(z)
        # With as much weight as the other terms.
        loss = 300.0 * quantization_loss(quantized, 0.25, beta_on_codebook=True)
        decoded = network.decode_quantized(quantized.latents)
        return (decoded, z), loss, quantized.indices

    def total(params):
        outputs, loss, indices = model.apply({"params": params}, method=forward)
        terms = zip(weights, outputs, strict=True)
        return sum(jnp.sum(w * y) for w, y in terms) + loss, (outputs, loss, indices)

    gradients, (outputs, loss, indices) = jax.jit(jax.grad(total, has_aux=True))(params)

    reference = diffusers_autoencoder(model, params)
    latents = reference.encode(nchw(images)).latents
    quantized, torch_loss, (_, _, torch_indices) = reference.quantize(latents)
    expected = reference.decode(quantized, force_not_quantize=True).sample, latents
    check_outputs(outputs, expected)
    np.testing.assert_array_equal(indices.reshape(-1), torch_indices.numpy())
    assert len(np.unique(indices)) > 5
    np.testing.assert_allclose(loss, 300.0 * torch_loss.item(), rtol=1e-5)
    terms = zip(weights, expected, strict=True)
    (sum((nchw(w) * y).sum() for w, y in terms) + 300.0 * torch_loss).backward()
    check_gradients(in_diffusers(gradients, reference), reference, 1e-4)


def test_posterior_equals_diffusers():
    moments = 3 * normal(5, 2, 4, 3, 8)
    moments[0, 0, 0] = [1, 2, 3, 4, -100.0, 100.0, -30.5, 20.5]  # beyond both clips
    moments[1, 0, 0, 4:] = 0.0
    ours = DiagonalGaussian.from_moments(jnp.asarray(moments))
    theirs = DiagonalGaussianDistribution(nchw(moments))
    np.testing.assert_allclose(ours.mean, nhwc(theirs.mean), rtol=1e-6)
    np.testing.assert_allclose(ours.logvar, nhwc(theirs.logvar), rtol=1e-6)
    np.testing.assert_allclose(ours.kl(), theirs.kl().numpy(), rtol=1e-5)
    noise = normal(6, 2, 4, 3, 4)
    expected = nhwc(theirs.mean + theirs.std * nchw(noise))
    np.testing.assert_allclose(ours.sample(jnp.asarray(noise)), expected, rtol=1e-5)


def test_gradients_of_the_kl_equal_diffusers():
    moments = normal(5, 2, 4, 3, 8)
    ours = jax.grad(lambda m: DiagonalGaussian.from_moments(m).kl().sum())(jnp.asarray(moments))
    theirs = nchw(moments).requires_grad_()
    DiagonalGaussianDistribution(theirs).kl().sum().backward()
    np.testing.assert_allclose(ours, nhwc(theirs.grad), rtol=1e-4, atol=1e-6)


def test_kl_is_zero_for_the_standard_normal_and_positive_otherwise():
    zeros = jnp.zeros((3, 2, 2, 4))
    np.testing.assert_array_equal(DiagonalGaussian(zeros, zeros).kl(), np.zeros(3))
    for mean, logvar in ((zeros + 0.1, zeros), (zeros, zeros + 0.1), (zeros, zeros - 0.1)):
        assert (DiagonalGaussian(mean, logvar).kl() > 1e-3).all()


def test_posterior_of_half_precision_moments_is_float32():
    posterior = DiagonalGaussian.from_moments(jnp.ones((1, 2, 2, 6), jnp.bfloat16))
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32
