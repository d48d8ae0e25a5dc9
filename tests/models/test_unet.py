"""The denoising UNet against `diffusers` with the same weights, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from latent_diffusion_jax.models.unet import TimeResBlock, UNet


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


def diffusers_names(levels: int) -> list[tuple[str, str]]:
    """Our names to those of `diffusers.UNet2DConditionModel`, as (pattern, replacement) pairs."""
    return [
        (r"^time_embed_0/", "time_embedding/linear_1/"),
        (r"^time_embed_1/", "time_embedding/linear_2/"),
        (r"^norm_out/", "conv_norm_out/"),
        (r"^mid_(\d)_res/", r"mid_block/resnets/\1/"),
        (r"^mid_0_transformer/", "mid_block/attentions/0/"),
        # diffusers counts up blocks from the lowest resolution.
        *((rf"^up_{level}_", f"up_blocks/{levels - 1 - level}/") for level in range(levels)),
        (r"^down_(\d)_", r"down_blocks/\1/"),
        (r"^(\w+_blocks/\d)/(\d)_res/", r"\1/resnets/\2/"),
        (r"^(\w+_blocks/\d)/(\d)_transformer/", r"\1/attentions/\2/"),
        (r"^(down_blocks/\d)/downsample/", r"\1/downsamplers/0/conv/"),
        (r"^(up_blocks/\d)/upsample/", r"\1/upsamplers/0/conv/"),
        (r"(/resnets/\d)/norm_in/", r"\1/norm1/"),
        (r"(/resnets/\d)/norm_out/", r"\1/norm2/"),
        (r"(/resnets/\d)/conv_in/", r"\1/conv1/"),
        (r"(/resnets/\d)/conv_out/", r"\1/conv2/"),
        (r"(/resnets/\d)/embedding/", r"\1/time_emb_proj/"),
        (r"(/resnets/\d)/shortcut/", r"\1/conv_shortcut/"),
        (r"/block_(\d)/", r"/transformer_blocks/\1/"),
        (r"/ff/proj_in/", "/ff/net/0/proj/"),
        (r"/ff/proj_out/", "/ff/net/2/"),
        (r"/to_out/", "/to_out/0/"),
    ]


def in_diffusers(model: UNet, params, in_channels: int, context_dim: int | None, to_torch):
    """The same network with the same weights, in float64."""
    levels = len(model.channel_multipliers)
    widths = [model.channels * m for m in model.channel_multipliers]
    attends = [level in model.attention_levels for level in range(levels)]
    reference = UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=model.out_channels,
        down_block_types=[("CrossAttn" * attend) + "DownBlock2D" for attend in attends],
        up_block_types=[("CrossAttn" * attend) + "UpBlock2D" for attend in attends[::-1]],
        block_out_channels=widths,
        layers_per_block=model.num_res_blocks,
        # Despite its name the number of heads.
        attention_head_dim=[width // model.head_dim for width in widths],
        cross_attention_dim=widths if context_dim is None else context_dim,
        transformer_layers_per_block=model.transformer_depth,
        norm_num_groups=model.num_groups,
        use_linear_projection=True,
        flip_sin_to_cos=True,
        freq_shift=0,
    ).double()
    reference.load_state_dict(to_torch(params, diffusers_names(levels)), strict=True)
    return reference


VARIANTS = {
    "lowest_level": dict(channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,)),
    "three_levels": dict(
        channel_multipliers=(1, 3, 2), num_res_blocks=1, attention_levels=(0,), head_dim=16
    ),
    "no_context": dict(
        channel_multipliers=(1, 2), num_res_blocks=2, attention_levels=(), transformer_depth=2
    ),
}
SMALL = dict(channels=16, head_dim=8, num_groups=8)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiled


def quiet(path, leaf):
    """Makes the inputs of norms so small that their epsilons show."""
    names = {"conv_in", "conv_out", "embedding", "proj_in"}
    return 0.01 * leaf if names & {key.key for key in path} else leaf


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_values_and_gradients_equal_diffusers(
    variant, random_params, to_torch, assert_gradients_equal
):
    model = UNet(**(SMALL | VARIANTS[variant]), out_channels=4)
    z_t, t = normal(0, 2, 8, 4, 3), np.array([3, 981])
    context = None if variant == "no_context" else normal(1, 2, 5, 12)
    params = random_params(model, z_t, t, context)
    if variant == "no_context":
        params = jax.tree_util.tree_map_with_path(quiet, params)
    weights = normal(2, 2, 8, 4, 4)

    def loss(params):
        out = model.apply({"params": params}, z_t, t, context)
        return jnp.sum(weights * out), out

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)(params)

    reference = in_diffusers(model, params, 3, None if context is None else 12, to_torch)
    theirs = reference(
        nchw(z_t), torch.tensor(t), None if context is None else torch.tensor(context).double()
    ).sample
    expected = theirs.detach().permute(0, 2, 3, 1).numpy()
    assert ours.shape == expected.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    (nchw(weights) * theirs).sum().backward()
    names = diffusers_names(len(model.channel_multipliers))
    assert_gradients_equal(to_torch(gradients, names), reference, 1e-3)


def test_the_unet_starts_at_zero():
    """Its last convolution does, so the first prediction is the mean of the noise."""
    model = UNet(**SMALL, channel_multipliers=(1,), num_res_blocks=1, attention_levels=())
    z_t, t, context = normal(3, 2, 8, 8, 3), np.array([0, 500]), normal(4, 2, 5, 12)
    init = jax.jit(model.init_with_output, compiler_options=QUICKLY)
    out, variables = init(jax.random.key(0, impl="rbg"), z_t, t, context)
    np.testing.assert_array_equal(out, np.zeros((2, 8, 8, 3)))
    assert np.any(variables["params"]["conv_in"]["kernel"])


@pytest.mark.parametrize("channels", [8, 16])
def test_a_residual_block_starts_as_its_shortcut(channels):
    x, embedding = normal(5, 2, 4, 4, 8), normal(6, 2, 32)
    block = TimeResBlock(channels, num_groups=4)
    out, variables = jax.jit(block.init_with_output)(jax.random.key(0), x, embedding)
    if channels == 8:
        assert "shortcut" not in variables["params"]
        np.testing.assert_array_equal(out, x)
    else:
        kernel = variables["params"]["shortcut"]["kernel"][0, 0]
        np.testing.assert_allclose(out, x @ np.asarray(kernel), rtol=0, atol=1e-5)


def test_rows_depend_on_their_own_latents_timestep_and_context_only(random_params):
    model = UNet(**SMALL, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(0,))
    z_t, t, context = normal(7, 2, 4, 4, 3), np.array([10, 700]), normal(8, 2, 5, 12)
    params = random_params(model, z_t, t, context)
    run = jax.jit(lambda z_t, t, context: model.apply({"params": params}, z_t, t, context))
    out = np.asarray(run(z_t, t, context))

    def changed(*arguments):
        return np.abs(run(*arguments) - out).max(axis=(1, 2, 3))

    first = np.array([1.0, 0.0], np.float32)
    for arguments in (
        (z_t + first[:, None, None, None], t, context),
        (z_t, t + np.array([1, 0]), context),
        (z_t, t, context + first[:, None, None]),
    ):
        own, other = changed(*arguments)
        assert own > 1e-3 and other < 1e-5
    np.testing.assert_allclose(run(z_t, t, context[:, ::-1]), out, rtol=0, atol=1e-4)


def test_half_precision_is_close_and_keeps_parameters_and_outputs_in_float32(random_params):
    fields = SMALL | dict(channel_multipliers=(1,), num_res_blocks=1, attention_levels=())
    full, half = UNet(**fields), UNet(**fields, dtype=jnp.bfloat16)
    arguments = normal(9, 2, 4, 4, 3), np.array([10, 700]), normal(10, 2, 5, 12)
    params = random_params(half, *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    exact = jax.jit(full.apply)({"params": params}, *arguments)
    out = jax.jit(half.apply)({"params": params}, *arguments)
    assert out.dtype == jnp.float32
    error = np.abs(out - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1  # it did compute in half precision
