"""The one attention against numpy in float64, whole and in steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from latent_diffusion_jax.models import dot_product_attention as module
from latent_diffusion_jax.models.dot_product_attention import dot_product_attention
from tests.lowering import lowered
from tests.plain_attention import normal, plain_attention


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
        monkeypatch.setattr(module, "step_sizes", lambda *sizes, on_cpu: steps)


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
    assert module.step_sizes(*sizes, on_cpu=on_cpu) == expected


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
    monkeypatch.setattr(module, "CPU_SCORES", 0)
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
