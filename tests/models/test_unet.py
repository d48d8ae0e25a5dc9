"""The denoising UNet against `diffusers` with the same weights, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.models.unet_blocks import TimeResBlock
from latent_diffusion_jax.runtime import trees


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


def diffusers_names(model: UNet) -> list[tuple[str, str]]:
    """Our names to those of diffusers' UNets, as (pattern, replacement) pairs."""
    levels = len(model.channel_multipliers)
    attention = [
        (r"(/attentions/\d)/norm/", r"\1/group_norm/"),
        (r"(/attentions/\d)/([qkv])/", r"\1/to_\2/"),
        (r"(/attentions/\d)/proj_out/", r"\1/to_out/"),
    ]
    return [
        (r"^time_embed_0/", "time_embedding/linear_1/"),
        (r"^time_embed_1/", "time_embedding/linear_2/"),
        (r"^label_embed/embedding$", "class_embedding/weight"),
        (r"^vector_embed_0/", "class_embedding/linear_1/"),
        (r"^vector_embed_1/", "class_embedding/linear_2/"),
        (r"^norm_out/", "conv_norm_out/"),
        (r"^mid_(\d)_res/", r"mid_block/resnets/\1/"),
        (r"^mid_0_(transformer|attention)/", "mid_block/attentions/0/"),
        # diffusers counts up blocks from the lowest resolution.
        *((rf"^up_{level}_", f"up_blocks/{levels - 1 - level}/") for level in range(levels)),
        (r"^down_(\d)_", r"down_blocks/\1/"),
        (r"^(\w+_blocks/\d)/(\d)_res/", r"\1/resnets/\2/"),
        (r"^(\w+_blocks/\d)/(\d)_(transformer|attention)/", r"\1/attentions/\2/"),
        (r"/(down|up)sample/(kernel|weight|bias)", r"/\1samplers/0/conv/\2"),
        (r"/(down|up)sample/", r"/\1samplers/0/"),
        (r"(/(?:resnets|\w+samplers)/\d)/norm_in/", r"\1/norm1/"),
        (r"(/(?:resnets|\w+samplers)/\d)/norm_out/", r"\1/norm2/"),
        (r"(/(?:resnets|\w+samplers)/\d)/conv_in/", r"\1/conv1/"),
        (r"(/(?:resnets|\w+samplers)/\d)/conv_out/", r"\1/conv2/"),
        (r"(/(?:resnets|\w+samplers)/\d)/embedding/", r"\1/time_emb_proj/"),
        (r"(/resnets/\d)/shortcut/", r"\1/conv_shortcut/"),
        (r"/block_(\d)/", r"/transformer_blocks/\1/"),
        (r"/ff/proj_in/", "/ff/net/0/proj/"),
        (r"/ff/proj_out/", "/ff/net/2/"),
        *(attention if model.attention == "self" else []),
        (r"/to_out/", "/to_out/0/"),
    ]


def block_types(model: UNet, attending: str) -> dict[str, list[str]]:
    """Types of diffusers' blocks, the highest resolution first on the way down."""
    plain = ("ResnetDownsample", "ResnetUpsample") if model.resblock_updown else ("Down", "Up")
    types = [
        [
            f"{attending}{end}Block2D" if level in model.attention_levels else f"{block}Block2D"
            for level in range(len(model.channel_multipliers))
        ]
        for block, end in zip(plain, ("Down", "Up"), strict=True)
    ]
    return {"down_block_types": types[0], "up_block_types": types[1][::-1]}


def diffusers_unet(model: UNet, in_channels: int, context_dim: int | None) -> torch.nn.Module:
    """The network of diffusers that ours is, with random weights, in float64."""
    widths = [model.channels * m for m in model.channel_multipliers]
    fields = dict(
        in_channels=in_channels,
        out_channels=model.out_channels,
        block_out_channels=widths,
        layers_per_block=model.num_res_blocks,
        norm_num_groups=model.num_groups,
        norm_eps=model.norm_epsilon,
        flip_sin_to_cos=not model.as_in_ddpm,
        freq_shift=int(model.as_in_ddpm),
        downsample_padding=int(not model.as_in_ddpm),
        num_class_embeds=model.num_classes or None,
        resnet_time_scale_shift="scale_shift" if model.scale_shift_norm else "default",
    )
    if model.attention == "self":
        resampling = "resnet" if model.resblock_updown else "conv"
        return UNet2DModel(
            **fields,
            **block_types(model, "Attn"),
            attention_head_dim=model.head_dim,
            attn_norm_num_groups=model.num_groups if model.scale_shift_norm else None,
            downsample_type=resampling,
            upsample_type=resampling,
        ).double()
    if not (numbers := model.num_heads):
        numbers = [width // model.head_dim for width in widths]
    return UNet2DConditionModel(
        **fields,
        **block_types(model, "CrossAttn"),
        attention_head_dim=numbers,  # despite its name the number of heads
        cross_attention_dim=widths if context_dim is None else context_dim,
        transformer_layers_per_block=model.transformer_depth,
        use_linear_projection=True,
        class_embed_type="projection" if model.vector_dim else None,
        projection_class_embeddings_input_dim=model.vector_dim or None,
    ).double()


TWO = dict(channel_multipliers=(1, 2), num_res_blocks=1)
VARIANTS = {
    "lowest_level": TWO | dict(attention_levels=(1,)),
    "three_levels": dict(
        channel_multipliers=(1, 3, 2), num_res_blocks=1, attention_levels=(0,), head_dim=16
    ),
    "no_context": dict(
        channel_multipliers=(1, 2), num_res_blocks=2, attention_levels=(), transformer_depth=2
    ),
    "by_level": TWO | dict(
        attention_levels=(0, 1), num_heads=(2, 1), head_dim=0, transformer_depth=(1, 2),
    ),
    "vectors": TWO | dict(
        attention_levels=(1,), num_heads=2, head_dim=0, vector_dim=6, scale_shift_norm=True,
        remat="blocks",
    ),
    "self": TWO | dict(attention_levels=(1,), attention="self", norm_epsilon=1e-6),
    "ddpm": TWO | dict(attention_levels=(1,), attention="self", head_dim=32, as_in_ddpm=True),
    "res_blocks": dict(
        channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_levels=(1,), attention="self",
        resblock_updown=True, scale_shift_norm=True, num_classes=5, remat="blocks",
    ),
}  # fmt: skip
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
    with_context = variant != "no_context" and model.attention == "transformer"
    context = normal(1, 2, 5, 12) if with_context else None
    vector = np.array([4, 1]) if model.num_classes else None
    if model.vector_dim:
        vector = normal(3, 2, model.vector_dim)
    params = random_params(model, z_t, t, context, vector)
    if variant in ("no_context", "self"):
        params = jax.tree_util.tree_map_with_path(quiet, params)
    weights = normal(2, 2, 8, 4, 4)

    def loss(params):
        out = model.apply({"params": params}, z_t, t, context, vector)
        return jnp.sum(weights * out), out

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)(params)

    reference = diffusers_unet(model, 3, 12 if with_context else None)
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}

    def in_diffusers(tree) -> dict[str, torch.Tensor]:
        # A 1x1 convolution over pixels may be a linear layer on tokens there.
        named = to_torch(tree, diffusers_names(model))
        return {name: x.reshape(shapes.get(name, x.shape)) for name, x in named.items()}

    reference.load_state_dict(in_diffusers(params), strict=True)
    arguments = [] if model.attention == "self" else [None]
    if with_context:
        arguments = [torch.tensor(context).double()]
    labels = None if vector is None else torch.tensor(vector)
    if model.vector_dim:
        labels = labels.double()
    theirs = reference(nchw(z_t), torch.tensor(t), *arguments, class_labels=labels).sample
    expected = theirs.detach().permute(0, 2, 3, 1).numpy()
    assert ours.shape == expected.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    (nchw(weights) * theirs).sum().backward()
    assert_gradients_equal(in_diffusers(gradients), reference, 1e-3)


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


def test_resampling_without_convolutions_is_averaging_and_repeating(random_params):
    """The same as convolutions whose kernels average, and pass on what is repeated."""
    fields = SMALL | TWO | dict(attention_levels=())
    plain, convolving = UNet(**fields, conv_resample=False), UNet(**fields)
    arguments = normal(11, 2, 8, 4, 3), np.array([10, 700]), normal(12, 2, 5, 12)
    params = random_params(plain, *arguments)
    average, center = np.zeros((3, 3, 16, 16)), np.zeros((3, 3, 32, 32))
    average[1:, 1:], center[1, 1] = np.eye(16) / 4, np.eye(32)
    assert not {"down_0_downsample", "up_1_upsample"} & params.keys()
    out = jax.jit(plain.apply)({"params": params}, *arguments)
    params |= {
        "down_0_downsample": {"kernel": average, "bias": np.zeros(16)},
        "up_1_upsample": {"kernel": center, "bias": np.zeros(32)},
    }
    expected = jax.jit(convolving.apply)({"params": params}, *arguments)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_dropout_is_active_where_a_key_is_given(random_params, remat):
    fields = SMALL | dict(channel_multipliers=(1,), num_res_blocks=1, attention_levels=())
    model, without = UNet(**fields, dropout=0.5, remat=remat), UNet(**fields)
    arguments = normal(13, 2, 4, 4, 3), np.array([10, 700]), normal(14, 2, 5, 12)
    params = random_params(model, *arguments)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 2)
        return model.apply({"params": params}, *arguments, dropout_keys=keys)

    expected = jax.jit(without.apply)({"params": params}, *arguments)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, *arguments), expected)
    out = run(jax.random.key(0))
    np.testing.assert_array_equal(run(jax.random.key(0)), out)
    assert np.abs(out - expected).max() > 0.01
    assert np.abs(run(jax.random.key(1)) - out).max() > 0.01


def test_dropout_keeps_the_mean_of_what_a_block_adds(random_params):
    x, embedding = np.repeat(normal(15, 1, 4, 4, 8), 256, 0), np.zeros((256, 32), np.float32)
    params = random_params(TimeResBlock(8, num_groups=4), x, embedding)
    run = [
        jax.jit(
            lambda key, rate=rate: TimeResBlock(8, num_groups=4, dropout=rate).apply(
                {"params": params}, x, embedding, jax.random.split(key, 256)
            )
        )(jax.random.key(0))
        for rate in (0.0, 0.25)
    ]
    spread = np.std(run[1], axis=0)
    assert spread.min() > 0.05
    assert np.abs(np.mean(run[1], axis=0) - run[0][0]).max() < 5 * spread.max() / 16


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(num_heads=2, head_dim=8), "num_heads=2 and head_dim=8: one of them"),
        (dict(num_heads=3), "num_heads=3 does not divide the 16 channels of level 0"),
        (dict(head_dim=(8, 12)), "head_dim=12 does not divide the 32 channels of level 1"),
        (dict(num_heads=(2, 2, 2)), r"num_heads=\(2, 2, 2\) must have one entry for each of 2"),
        (dict(head_dim=8, transformer_depth=(1,)), r"transformer_depth=\(1,\) must have one entry"),
        (dict(attention="spatial"), "unknown attention 'spatial'"),
        (dict(attention="self", head_dim=8), "takes no context"),
        (dict(num_classes=3, vector_dim=4, head_dim=8), "num_classes=3 and vector_dim=4"),
        (dict(num_classes=3, head_dim=8), "needs a vector"),
        (dict(channel_multipliers=(1, 2, 2, 2), attention_levels=()), "multiples of 8"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, said):
    fields = dict(channels=16, num_groups=8, attention_levels=(0,)) | TWO | fields
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 4, 3), (1,), (1, 5, 6))]
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(UNet(**fields).init, jax.random.key(0), *shapes)


def test_a_vector_that_is_not_asked_for_is_refused():
    with pytest.raises(ValueError, match="takes no vector"):
        UNet(**SMALL).apply({}, np.zeros((1, 8, 8, 3)), np.zeros(1), None, np.zeros(1, np.int32))


def test_heads_have_32_channels_where_nothing_is_said():
    assert UNet().heads == ((6, 32), (12, 32), (18, 32), (30, 32))


LDM = dict(channel_multipliers=(1, 2, 3, 4))
SD = dict(channels=320, channel_multipliers=(1, 2, 4, 4), attention_levels=(0, 1, 2))
PUBLISHED = {  # fields, channels of the input, width of the context, millions of parameters
    "stable-diffusion-1": (SD | dict(num_heads=8, out_channels=4), 4, 768, 859.52),
    "stable-diffusion-1-inpainting": (SD | dict(num_heads=8, out_channels=4), 9, 768, 859.54),
    "stable-diffusion-2.1": (SD | dict(head_dim=64, out_channels=4), 4, 1024, 865.91),
    "txt2img-1p4B": (SD | dict(num_heads=8, out_channels=4), 4, 1280, 872.30),
    "cin256-v2": (dict(num_heads=1), 3, 512, 400.92),
    "layout2img-openimages256": (
        LDM | dict(channels=128, num_heads=1, transformer_depth=3), 3, 512, 246.28
    ),
    "celebahq-ldm-vq-4": (LDM | dict(channels=224, attention="self", head_dim=32), 3, None, 274.06),
    "lsun_churches-ldm-kl-8": (
        dict(channels=192, channel_multipliers=(1, 2, 2, 4, 4), attention_levels=(0, 1, 2, 3),
             attention="self", num_heads=8, scale_shift_norm=True, resblock_updown=True,
             out_channels=4), 4, None, 294.97,
    ),
    "semantic_synthesis256": (
        dict(channels=128, channel_multipliers=(1, 4, 8), attention_levels=(), attention="self",
             num_heads=8), 6, None, 215.23,
    ),
    "bsr_sr": (
        dict(channels=160, channel_multipliers=(1, 2, 2, 4), attention_levels=(3,),
             attention="self"), 6, None, 113.62,
    ),
    "inpainting_big": (
        LDM | dict(channels=256, attention="self", num_heads=8, resblock_updown=True), 7, None,
        387.25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_have_their_number_of_parameters(name):
    """What CompVis' code counts for its configs, in millions."""
    fields, in_channels, context_dim, millions = PUBLISHED[name]
    context = None if context_dim is None else jnp.zeros((1, 1, context_dim))
    z_t, t = jnp.zeros((1, 16, 16, in_channels)), jnp.zeros(1)
    params = jax.eval_shape(UNet(**fields).init, jax.random.key(0), z_t, t, context)
    assert round(trees.count(params) / 1e6, 2) == millions
