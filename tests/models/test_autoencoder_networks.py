"""The autoencoders' shapes, sizes, precision, rematerialisation, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import autoencoder_kl, autoencoder_vq
from latent_diffusion_jax import build
from latent_diffusion_jax.models.autoencoder import (
    AutoencoderKL,
    AutoencoderVQ,
    DiagonalGaussian,
    Point,
)
from latent_diffusion_jax.runtime.trees import count
from tests.torch_networks import draw_params

SMALL = dict(channels=8, num_groups=4)
ONE_BLOCK = SMALL | dict(channel_multipliers=(1, 2), num_res_blocks=1)
KINDS = {"kl": (AutoencoderKL, {}), "vq": (AutoencoderVQ, dict(codebook_size=12))}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shapes_of(model, images):
    """Parameters of an autoencoder as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


# CompVis' released autoencoders, in millions of parameters.
@pytest.mark.parametrize(
    ("configs", "variant", "total", "encoder", "decoder"),
    [
        (autoencoder_kl, "f4", 55.31, 22.35, 32.96),
        (autoencoder_kl, "f8", 83.65, 34.16, 49.49),
        (autoencoder_kl, "f16", 69.61, 28.27, 41.34),
        (autoencoder_kl, "f32", 103.88, 42.61, 61.24),
        (autoencoder_vq, "f4", 55.32, 22.34, 32.96),
        (autoencoder_vq, "f4_noattn", 53.22, 21.29, 31.91),
        (autoencoder_vq, "f8", 67.72, 27.40, 40.25),
        (autoencoder_vq, "f8_n256", 67.65, 27.40, 40.25),
        (autoencoder_vq, "f16", 69.59, 28.16, 41.31),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_sizes_are_those_of_the_released_models(configs, variant, total, encoder, decoder):
    model = build.autoencoder(configs.get_config(variant))
    params = shapes_of(model, jnp.zeros((1, 64, 64, 3)))
    assert count(params) / 1e6 == pytest.approx(total, abs=0.005001)
    assert count(params["encoder"]) / 1e6 == pytest.approx(encoder, abs=0.005001)
    assert count(params["decoder"]) / 1e6 == pytest.approx(decoder, abs=0.005001)


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2, 2)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_shapes_follow_from_the_levels(kind, multipliers):
    """`embed_dim` and `z_channels` need not agree; images need not be square."""
    network, fields = KINDS[kind]
    model = network(**SMALL, **fields, channel_multipliers=multipliers, z_channels=6, embed_dim=2)
    factor = 2 ** (len(multipliers) - 1)
    assert model.downsampling_factor == factor
    images = jnp.zeros((2, 32, 16, 3))
    decoded, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)

    def encode(variables):
        posterior = model.apply(variables, images, method="encode")
        return posterior.mean, posterior.moments

    latents, posterior_moments = jax.eval_shape(encode, variables)
    assert decoded.shape == images.shape and decoded.dtype == jnp.float32
    assert latents.shape == (2, 32 // factor, 16 // factor, 2)
    moments = 2 if kind == "kl" else 1
    assert model.moments_channels == 2 * moments
    assert posterior_moments.shape == (2, 32 // factor, 16 // factor, 2 * moments)
    params = variables["params"]
    assert params["quant_conv"]["kernel"].shape == (1, 1, 6 * moments, 2 * moments)
    assert params["post_quant_conv"]["kernel"].shape == (1, 1, 2, 6)
    if kind == "vq":
        assert params["quantizer"]["codebook"].shape == (12, 2)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [(18, 16), (16, 18), (2, 4)])
def test_sizes_that_the_factor_does_not_divide_are_refused(kind, size):
    network, fields = KINDS[kind]
    model = network(**SMALL, **fields, channel_multipliers=(1, 1, 1))
    h, w = size
    message = (
        rf"images of {h}x{w} pixels cannot be encoded: height and width must be multiples of the "
        r"downsampling factor 4"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(model, jnp.zeros((1, h, w, 3)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_images_and_latents_of_another_number_of_channels_are_refused(kind):
    network, fields = KINDS[kind]
    model = network(**ONE_BLOCK, **fields)
    params = shapes_of(model, jnp.zeros((1, 8, 8, 3)))
    methods = ("encode", "decode") if kind == "kl" else ("encode", "decode_quantized")
    for method in methods:
        with pytest.raises(AssertionError, match="shape"):
            x = jnp.zeros((1, 8, 8, 5))
            jax.eval_shape(lambda p, x=x, m=method: model.apply({"params": p}, x, method=m), params)


def test_levels_that_do_not_fit_the_latents_are_refused():
    model = AutoencoderVQ(**ONE_BLOCK, levels=(8, 5), embed_dim=3)
    with pytest.raises(ValueError, match="2 levels do not fit latents of 3 channels"):
        shapes_of(model, jnp.zeros((1, 8, 8, 3)))


def test_moments_make_the_posterior_again():
    moments = normal(0, 2, 3, 3, 4)
    gaussian, point = DiagonalGaussian.from_moments(moments), Point.from_moments(moments)
    np.testing.assert_array_equal(gaussian.moments, moments)
    np.testing.assert_array_equal(point.moments, moments)
    np.testing.assert_array_equal(point.sample(normal(1, *moments.shape)), moments)
    assert AutoencoderKL.posterior is DiagonalGaussian and AutoencoderVQ.posterior is Point


@pytest.mark.parametrize("levels", [(), (4, 3, 2)])
def test_images_become_indices_and_the_indices_images(levels):
    model = AutoencoderVQ(**ONE_BLOCK, codebook_size=12, levels=levels)
    assert model.num_codes == (24 if levels else 12)
    images = normal(1, 2, 8, 8, 3)
    params = draw_params(model, images)
    assert ("quantizer" in params) == (not levels)

    def both_ways(network):
        z = network.encode(images).mean
        indices = network.indices(z)
        decoded = network.decode_quantized(network.lookup(indices))
        return indices, network.quantize(z).indices, decoded, network(images)

    indices, same, decoded, expected = jax.jit(
        lambda params: model.apply({"params": params}, method=both_ways)
    )(params)
    assert indices.shape == (2, 4, 4) and indices.dtype == jnp.int32
    assert indices.min() >= 0 and indices.max() < model.num_codes and len(np.unique(indices)) > 3
    np.testing.assert_array_equal(indices, same)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rematerialisation_changes_no_value_and_no_name(kind):
    network, fields = KINDS[kind]
    fields = ONE_BLOCK | fields | dict(attention_levels=(1,))
    images = normal(2, 1, 8, 8, 3)
    plain, remat = network(**fields), network(**fields, remat="blocks")
    params = draw_params(plain, images)
    assert jax.tree.structure(params) == jax.tree.structure(shapes_of(remat, images))
    decoded, same = (jax.jit(model.apply)({"params": params}, images) for model in (plain, remat))
    np.testing.assert_array_equal(same, decoded)


def test_rematerialisation_changes_no_gradient():
    images = normal(2, 1, 8, 8, 3)
    fields = SMALL | dict(channel_multipliers=(1,), num_res_blocks=1)
    params = draw_params(AutoencoderKL(**fields), images)

    def run(model):
        gradient = jax.jit(
            jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, images))))
        ).trace(params)
        blocks = str(gradient.jaxpr).count("remat") + str(gradient.jaxpr).count("checkpoint")
        return gradient.lower().compile()(params), blocks

    gradients, none = run(AutoencoderKL(**fields))
    same, some = run(AutoencoderKL(**fields, remat="blocks"))
    assert none == 0 and some > 0
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest),
        same,
        gradients,
    )


def test_half_precision_is_close_and_keeps_parameters_and_outputs_in_float32():
    full, half = AutoencoderKL(**ONE_BLOCK), AutoencoderKL(**ONE_BLOCK, dtype=jnp.bfloat16)
    images = normal(7, 1, 16, 16, 3)
    params = draw_params(half, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    z = normal(8, 1, 8, 8, 3)

    def run(model):
        def forward(network):
            return network.encode(images).mean, network.decode(z)

        return jax.jit(lambda params: model.apply({"params": params}, method=forward))(params)

    for exact, ours in zip(run(full), run(half), strict=True):
        assert ours.dtype == jnp.float32
        error = np.abs(ours - exact).max() / np.abs(exact).max()
        assert 1e-5 < error < 0.1  # it did compute in half precision
