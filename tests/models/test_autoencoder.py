"""The KL autoencoder against `diffusers` with the same weights, and its posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, DiagonalGaussian


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def diffusers_names(levels: int) -> list[tuple[str, str]]:
    """Our names to those of `diffusers.AutoencoderKL`, as (pattern, replacement) pairs."""
    return [
        (r"/norm_out/", "/conv_norm_out/"),
        (r"/mid/block_1/", "/mid_block/resnets/0/"),
        (r"/mid/block_2/", "/mid_block/resnets/1/"),
        (r"/mid/attn_1/", "/mid_block/attentions/0/"),
        (r"/down_(\d)_block_(\d)/", r"/down_blocks/\1/resnets/\2/"),
        (r"/down_(\d)_attn_(\d)/", r"/down_blocks/\1/attentions/\2/"),
        (r"/down_(\d)_downsample/", r"/down_blocks/\1/downsamplers/0/conv/"),
        # diffusers counts up blocks from the lowest resolution.
        *((rf"/up_{level}_", f"/up_blocks/{levels - 1 - level}/") for level in range(levels)),
        (r"(/up_blocks/\d)/block_(\d)/", r"\1/resnets/\2/"),
        (r"(/up_blocks/\d)/attn_(\d)/", r"\1/attentions/\2/"),
        (r"(/up_blocks/\d)/upsample/", r"\1/upsamplers/0/conv/"),
        (r"/shortcut/", "/conv_shortcut/"),
        (r"(/attentions/\d)/norm/", r"\1/group_norm/"),
        (r"(/attentions/\d)/([qkv])/", r"\1/to_\2/"),
        (r"(/attentions/\d)/proj_out/", r"\1/to_out/0/"),
    ]


def in_diffusers(model: AutoencoderKL, params, to_torch) -> DiffusersAutoencoder:
    """The same network with the same weights, in float64."""
    levels = range(len(model.channel_multipliers))
    attends = [level in model.attention_levels for level in levels]
    reference = DiffusersAutoencoder(
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        down_block_types=[f"{'Attn' * attend}DownEncoderBlock2D" for attend in attends],
        up_block_types=[f"{'Attn' * attend}UpDecoderBlock2D" for attend in attends[::-1]],
        block_out_channels=[model.channels * m for m in model.channel_multipliers],
        layers_per_block=model.num_res_blocks,
        latent_channels=model.z_channels,
        norm_num_groups=model.num_groups,
        mid_block_add_attention=model.mid_attention,
    ).double()
    state = to_torch(params, diffusers_names(len(levels)))
    # A 1x1 convolution over pixels there is a linear layer on tokens.
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    state = {name: tensor.reshape(shapes[name]) for name, tensor in state.items()}
    reference.load_state_dict(state, strict=True)
    return reference


SMALL = dict(channels=8, num_groups=4)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiled
VARIANTS = {
    "mid_attention": dict(channel_multipliers=(1, 2), num_res_blocks=1),
    "no_attention": dict(channel_multipliers=(1, 2, 1), num_res_blocks=2, mid_attention=False),
    "everywhere": dict(channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(0, 1)),
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


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_values_and_gradients_equal_diffusers(
    variant, random_params, to_torch, assert_gradients_equal
):
    model = AutoencoderKL(**SMALL, **VARIANTS[variant])
    factor = model.downsampling_factor
    images = normal(0, 2, 16, 8, model.image_channels)
    noise = normal(1, 2, 16 // factor, 8 // factor, model.embed_dim)
    params = random_params(model, images, noise)
    weights = normal(2, *images.shape), normal(3, *noise.shape), normal(4, *noise.shape)

    def loss(params):
        decoded, posterior = model.apply({"params": params}, images, noise)
        terms = zip(weights, (decoded, posterior.mean, posterior.logvar), strict=True)
        return sum(jnp.sum(w * y) for w, y in terms), (decoded, posterior)

    gradients, (decoded, posterior) = jax.jit(
        jax.grad(loss, has_aux=True), compiler_options=QUICKLY
    )(params)

    reference = in_diffusers(model, params, to_torch)
    theirs = reference.encode(nchw(images)).latent_dist
    z = theirs.mean + theirs.std * nchw(noise)
    theirs_decoded = reference.decode(z).sample
    for ours, their in (
        (posterior.mean, theirs.mean),
        (posterior.logvar, theirs.logvar),
        (decoded, theirs_decoded),
    ):
        expected = nhwc(their)
        assert ours.shape == expected.shape and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    outputs = (theirs_decoded, theirs.mean, theirs.logvar)
    sum((nchw(w) * y).sum() for w, y in zip(weights, outputs, strict=True)).backward()
    names = diffusers_names(len(model.channel_multipliers))
    parameters = dict(reference.named_parameters())
    gradients = {
        name: gradient.reshape(parameters[name].shape)
        for name, gradient in to_torch(gradients, names).items()
    }
    assert_gradients_equal(gradients, reference, 1e-4)


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


def test_kl_is_zero_for_the_standard_normal_and_positive_otherwise():
    zeros = jnp.zeros((3, 2, 2, 4))
    np.testing.assert_array_equal(DiagonalGaussian(zeros, zeros).kl(), np.zeros(3))
    for mean, logvar in ((zeros + 0.1, zeros), (zeros, zeros + 0.1), (zeros, zeros - 0.1)):
        assert (DiagonalGaussian(mean, logvar).kl() > 1e-3).all()


def test_posterior_of_half_precision_moments_is_float32():
    posterior = DiagonalGaussian.from_moments(jnp.ones((1, 2, 2, 6), jnp.bfloat16))
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2, 2)])
def test_shapes_follow_from_the_levels(multipliers):
    """`embed_dim` and `z_channels` need not agree; images need not be square."""
    model = AutoencoderKL(**SMALL, channel_multipliers=multipliers, z_channels=6, embed_dim=2)
    factor = 2 ** (len(multipliers) - 1)
    assert model.downsampling_factor == factor
    images = jnp.zeros((2, 32, 16, 3))
    noise = jnp.zeros((2, 32 // factor, 16 // factor, 2))
    (decoded, posterior), variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, noise)
    )
    assert decoded.shape == images.shape
    assert posterior.mean.shape == posterior.logvar.shape == noise.shape
    assert variables["params"]["quant_conv"]["kernel"].shape == (1, 1, 12, 4)
    assert variables["params"]["post_quant_conv"]["kernel"].shape == (1, 1, 2, 6)


def test_half_precision_is_close_and_keeps_parameters_and_outputs_in_float32(random_params):
    fields = SMALL | VARIANTS["mid_attention"]
    full, half = AutoencoderKL(**fields), AutoencoderKL(**fields, dtype=jnp.bfloat16)
    images, noise = normal(7, 1, 16, 16, 3), np.zeros((1, 8, 8, 3), np.float32)
    params = random_params(half, images, noise)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    exact, _ = jax.jit(full.apply)({"params": params}, images, noise)
    decoded, posterior = jax.jit(half.apply)({"params": params}, images, noise)
    assert decoded.dtype == posterior.mean.dtype == jnp.float32
    error = np.abs(decoded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1  # it did compute in half precision
