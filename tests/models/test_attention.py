"""The blocks around attention, against numpy in float64 and by their properties."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_diffusion_jax.models.attention import (
    GEGLU,
    Attention,
    CrossAttentionBlock,
    PixelAttention,
    SpatialTransformer,
)
from latent_diffusion_jax.runtime import sharding
from tests.plain_attention import normal, plain_attention


def project(params, name, x):
    dense = params[name]["dense"]
    return np.asarray(x, np.float64) @ dense["kernel"] + dense.get("bias", 0.0)


@pytest.mark.parametrize("context_shape", [None, (2, 3, 10)])
def test_attention_module_equals_numpy(random_params, context_shape):
    x = normal(9, 2, 5, 6)
    context = None if context_shape is None else normal(10, *context_shape)
    attention = Attention(num_heads=3, head_dim=4)  # inner width 12, input width 6
    params = random_params(attention, x, context)
    tokens = x if context is None else context
    q, k, v = (
        project(params, name, y).reshape(2, -1, 3, 4)
        for name, y in (("to_q", x), ("to_k", tokens), ("to_v", tokens))
    )
    expected = project(params, "to_out", plain_attention(q, k, v).reshape(2, 5, 12))
    assert "bias" not in params["to_q"]["dense"]
    out = attention.apply({"params": params}, x, context)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_geglu_equals_torch(random_params):
    x = normal(11, 2, 3, 6)
    geglu = GEGLU(multiplier=4)
    params = random_params(geglu, x)
    assert params["proj_in"]["dense"]["kernel"].shape == (6, 48)
    h, gate = np.split(project(params, "proj_in", x), 2, axis=-1)
    hidden = h * torch.nn.functional.gelu(torch.tensor(gate)).numpy()
    np.testing.assert_allclose(
        geglu.apply({"params": params}, x), project(params, "proj_out", hidden), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 1, 8), (2, 2, 2)])  # data, fsdp, tensor
def test_geglu_split_over_devices_moves_weights_alone(random_params, sizes):
    x = normal(11, 8, 16, 64)
    geglu = GEGLU()
    params = {"ff": random_params(geglu, x)}

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        params = sharding.gathered(params, x.dtype)["ff"]
        return jnp.sum(geglu.apply({"params": params}, x) ** 2)

    expected = jax.jit(gradients)(params, x)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    places = sharding.state_sharding(params, mesh), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        begun = GEGLU(dtype=jnp.bfloat16).init(jax.random.key(0), x)["params"]
        step = jax.jit(gradients, in_shardings=places, out_shardings=places)
        program = step.lower(params, x).compile()
        found = program(*jax.device_put((params, x), places))
    jax.tree.map(np.testing.assert_array_equal, begun, geglu.init(jax.random.key(0), x)["params"])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    text, (_, fsdp, tensor) = program.as_text(), sizes
    moved = re.findall(r"= f32\[([\d,]*)\]\S* collective-permute\(", text)
    # One half of what a device has of the bias, and of the kernel.
    halves = {512 // tensor // 2, 64 * 512 // tensor // 2}
    assert {math.prod(map(int, size.split(","))) for size in moved} == halves
    assert "all-to-all" not in text and ("all-gather" in text) == (fsdp > 1)


@pytest.mark.parametrize("attended", [True, False])
def test_cross_attention_block_attends_to_the_context(random_params, attended):
    x, context = normal(12, 2, 5, 8), normal(13, 2, 3, 8)
    block = CrossAttentionBlock(num_heads=2, head_dim=4)
    params = random_params(block, x, context)
    run = jax.jit(lambda tokens, c: block.apply({"params": params}, tokens, c))
    out = np.asarray(run(x, context if attended else None))
    moved = x.copy()
    moved[0, 2, 0] += 1.0  # one channel: layer norm does not see a shift of all
    # Self-attention lets every token see token 2, and no token of the other row.
    changed = np.abs(run(moved, context if attended else None) - out).max(axis=-1)
    assert changed[0].min() > 1e-4 and changed[1].max() < 1e-6
    if attended:
        other = context.copy()
        other[0, 1] += 1.0
        changed = np.abs(run(x, other) - out).max(axis=-1)
        assert changed[0].min() > 1e-4 and changed[1].max() < 1e-6
        reordered = run(x, context[:, [2, 0, 1]])
        np.testing.assert_allclose(reordered, out, rtol=0, atol=1e-5)


def test_spatial_transformer_starts_as_the_identity_and_leaves_it(random_params):
    x, context = normal(14, 2, 4, 2, 8), normal(15, 2, 3, 6)
    transformer = SpatialTransformer(num_heads=2, head_dim=4, depth=2, num_groups=4)
    init = jax.jit(
        transformer.init_with_output, compiler_options={"xla_backend_optimization_level": 0}
    )
    out, variables = init(jax.random.key(0, impl="rbg"), x, context)  # both compile fast
    np.testing.assert_array_equal(out, x)
    assert {"block_0", "block_1"} <= set(variables["params"])
    params = random_params(transformer, x, context)
    out = jax.jit(transformer.apply)({"params": params}, x, context)
    assert np.abs(out - x).max(axis=-1).min() > 0.01


@pytest.mark.parametrize(("heads", "epsilon"), [(1, 1e-6), (2, 1e-5)])
def test_pixel_attention_equals_numpy_over_all_pixels(random_params, heads, epsilon):
    x = 0.01 * normal(16, 2, 4, 2, 8)  # so small that the norm's epsilon shows
    attention = PixelAttention(num_groups=4, num_heads=heads, epsilon=epsilon)
    params = random_params(attention, x)
    norm = params["norm"]
    y = torch.nn.functional.group_norm(
        torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2),
        4,
        torch.tensor(norm["scale"], dtype=torch.float64),
        torch.tensor(norm["bias"], dtype=torch.float64),
        epsilon,
    )
    tokens = y.permute(0, 2, 3, 1).numpy().reshape(2, 8, 8)
    q, k, v = (project(params, name, tokens).reshape(2, 8, heads, -1) for name in "qkv")
    kernel, bias = params["proj_out"]["kernel"][0, 0], params["proj_out"]["bias"]
    expected = x + (plain_attention(q, k, v).reshape(2, 8, 8) @ kernel + bias).reshape(x.shape)
    out = attention.apply({"params": params}, x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
