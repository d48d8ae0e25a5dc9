"""Attention against numpy in float64, and the properties of the blocks around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from latent_diffusion_jax.models import attention as attention_module
from latent_diffusion_jax.models.attention import (
    GEGLU,
    Attention,
    CrossAttentionBlock,
    PixelAttention,
    SpatialTransformer,
    dot_product_attention,
)
from tests.lowering import lowered


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(d)) v for each batch row and head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = q[b, :, head] @ k[b, :, head].T / np.sqrt(q.shape[-1])
            if causal:
                scores = np.where(np.tri(*scores.shape), scores, -np.inf)
            out[b, :, head] = scipy.special.softmax(scores, axis=-1) @ v[b, :, head]
    return out


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (6, 3), (1, 7), (4, 1)])
def test_attention_equals_numpy(queries, keys):
    q, k, v = normal(0, 2, queries, 3, 8), normal(1, 2, keys, 3, 8), normal(2, 2, keys, 3, 8)
    out = dot_product_attention(2 * q, k, v)
    assert out.shape == q.shape
    np.testing.assert_allclose(out, plain_attention(2 * q, k, v), rtol=0, atol=2e-6)


STEPS = {"whole": None, "one_head": (1, 4), "all_heads": (2, 4)}


@pytest.fixture(params=STEPS)
def computed(request, monkeypatch):
    """Attention with all scores at once, and in steps of 4 queries."""
    steps = STEPS[request.param]
    if steps is not None:
        monkeypatch.setattr(attention_module, "step_sizes", lambda *sizes, on_cpu: steps)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(8, 3, False), (11, 7, False), (11, 11, True)],
)
def test_values_and_gradients_equal_numpy(computed, queries, keys, causal):
    q, k, v = normal(0, 2, queries, 2, 8), normal(1, 2, keys, 2, 8), normal(2, 2, keys, 2, 8)
    weights, step = normal(3, 2, queries, 2, 8), 1e-4
    run = jax.jit(
        jax.value_and_grad(
            lambda *args: jnp.sum(weights * dot_product_attention(*args, causal=causal)), (0, 1, 2)
        )
    )
    value, gradients = run(q, k, v)

    def plain(*arguments) -> float:
        return (weights * plain_attention(*arguments, causal)).sum()

    np.testing.assert_allclose(value, plain(q, k, v), rtol=0, atol=2e-5)
    out = dot_product_attention(q, k, v, causal=causal)
    np.testing.assert_allclose(out, plain_attention(q, k, v, causal), rtol=0, atol=2e-6)
    # Derivatives along random directions, by differences in float64.
    for place in range(3):
        arguments = [np.asarray(x, np.float64) for x in (q, k, v)]
        direction = normal(4 + place, *arguments[place].shape)
        values = []
        for sign in (1, -1):
            moved = list(arguments)
            moved[place] = arguments[place] + sign * step * direction
            values.append(plain(*moved))
        slope = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose((gradients[place] * direction).sum(), slope, atol=1e-4)


def test_causal_attention_does_not_see_later_tokens(computed):
    q, k, v = (normal(seed, 1, 10, 2, 4) for seed in (0, 1, 2))
    out = np.asarray(dot_product_attention(q, k, v, causal=True))
    later = np.arange(10)[None, :, None, None] > 6
    moved = np.asarray(dot_product_attention(q, k + later, v - later, causal=True))
    np.testing.assert_array_equal(moved[:, :7], out[:, :7])
    assert np.abs(moved - out)[:, 7:].max(axis=(0, 2, 3)).min() > 0.1
    with pytest.raises(ValueError, match="as many queries as keys, not 10 and 9"):
        dot_product_attention(q, k[:, :9], v[:, :9], causal=True)


@pytest.mark.parametrize(
    ("on_cpu", "sizes", "expected"),
    [
        (True, (64, 64, 2, 64), (2, 64)),
        (True, (1, 4096, 8, 4096), (1, 256)),
        (True, (2, 4096, 8, 4096), (1, 128)),
        (True, (2, 4096, 8, 77), (1, 4096)),
        (True, (4096, 77, 8, 77), (1, 64)),
        (False, (1, 4096, 8, 4096), (8, 4096)),
        (False, (8, 4096, 8, 4096), (8, 512)),
        (False, (4, 9216, 8, 9216), (8, 384)),
        (False, (1024, 4096, 8, 4096), (8, 128)),
    ],
)
def test_steps_fit_the_device(on_cpu, sizes, expected):
    """Sizes are batch, queries, heads, keys; expected are heads and queries of a step."""
    assert attention_module.step_sizes(*sizes, on_cpu=on_cpu) == expected


def test_steps_are_those_of_the_platform_that_is_compiled_for():
    x = jax.ShapeDtypeStruct((1, 2048, 8, 8), jnp.float32)

    def in_steps(platform: str) -> bool:
        return "stablehlo.while" in lowered(dot_product_attention, platform, x, x, x)

    assert in_steps("cpu") and not in_steps("tpu") and not in_steps("cuda")


@pytest.mark.parametrize(("heads", "head_dim"), [(8, 40), (1, 512)])  # a UNet's, an autoencoder's
def test_scores_of_4096_tokens_are_never_all_there(heads, head_dim):
    """Those of eight heads are 512 MiB, and twice as much in the backward pass."""
    x = jax.ShapeDtypeStruct((1, 4096, heads, head_dim), jnp.float32)

    def loss(*arguments):
        return jnp.sum(jnp.square(dot_product_attention(*arguments)))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20


def test_a_batch_that_is_spread_over_devices_remains_so(monkeypatch):
    monkeypatch.setattr(attention_module, "CPU_SCORES", 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((8, 512, 2, 8), jnp.float32, sharding=rows)

    def loss(*arguments):
        return jnp.sum(jnp.square(dot_product_attention(*arguments)))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()
    assert "while" in text and "all-gather" not in text and "all-to-all" not in text


def test_attention_does_not_see_the_order_of_the_keys():
    q, k, v = normal(3, 2, 4, 2, 8), normal(4, 2, 6, 2, 8), normal(5, 2, 6, 2, 8)
    order = np.array([3, 0, 5, 1, 4, 2])
    out = dot_product_attention(q, k, v)
    np.testing.assert_allclose(
        dot_product_attention(q, k[:, order], v[:, order]), out, rtol=0, atol=1e-6
    )
    assert np.abs(dot_product_attention(q, k[:, order], v) - out).max() > 0.1


def test_attention_survives_large_scores():
    q, k, v = 100 * normal(6, 1, 4, 1, 8), 100 * normal(7, 1, 5, 1, 8), normal(8, 1, 5, 1, 8)
    out = dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, plain_attention(q, k, v), rtol=0, atol=1e-4)


def test_scores_of_half_precision_inputs_are_float32():
    """Scores 128.5 and 128 differ in float32 and are the same number in bfloat16."""
    q = jnp.array([1.0, 1.0, 0.0, 0.0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[256.0, 1.0, 0.0, 0.0], [256.0, 0.0, 0.0, 0.0]], jnp.bfloat16)
    v = jnp.array([[1.0], [0.0]], jnp.bfloat16) * jnp.ones(4, jnp.bfloat16)
    out = dot_product_attention(q, k.reshape(1, 2, 1, 4), v.reshape(1, 2, 1, 4))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), scipy.special.expit(0.5), atol=0.003)


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
