"""Products and convolutions in bfloat16: the same numbers by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models import half_precision
from latent_diffusion_jax.models.half_precision import conv_general_dilated, dot_general
from tests.lowering import lowered


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random numbers that bfloat16 holds, in float32."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(jnp.asarray(numbers, jnp.bfloat16), np.float32)


def test_bfloat16_is_computed_otherwise_on_cpus_alone():
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 4, 4, 8), (3, 3, 8, 8)))

    def convolved(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def multiplied(x, kernel):
        return dot_general(x.reshape(-1, 8), kernel[0, 0], (((1,), (0,)), ((), ())))

    assert "stablehlo.convolution" not in lowered(convolved, "cpu", x, kernel)
    assert "stablehlo.convolution" in lowered(convolved, "tpu", x, kernel)
    assert "8xf32>" in lowered(multiplied, "cpu", x, kernel)
    assert "8xf32>" not in lowered(multiplied, "tpu", x, kernel)


@pytest.mark.parametrize("pixels", [1024, 20, 7])  # of a step; there are 60
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", ((1, 0), (0, 1)), ((0, 0), (2, 1))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_convolutions_are_the_same(monkeypatch, pixels, kernel, padding, strides):
    monkeypatch.setattr(half_precision, "STEP_PIXELS", pixels)
    x, weights = normal(0, 2, 6, 5, 8), normal(1, kernel, kernel, 8, 4)
    numbers = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def results(function, dtype):
        def apply(x, weights):
            y = function(x.astype(dtype), weights.astype(dtype), strides, padding, **numbers)
            assert y.dtype == dtype
            return jnp.vdot(normal(2, *y.shape), y.astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(apply, (0, 1), has_aux=True)(x, weights)
        return y, *gradients

    found = results(conv_general_dilated, jnp.bfloat16)
    expected = results(jax.lax.conv_general_dilated, jnp.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float32), b, atol=2**-8 * np.abs(b).max())
