"""Shared layers: against PyTorch, numpy and `diffusers`, and how they start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from latent_diffusion_jax.models import layers
from latent_diffusion_jax.models.layers import (
    NORM_STATISTICS,
    Dense,
    GroupNorm,
    UpsampleConv,
    conv,
    stored,
    timestep_embedding,
)
from tests.lowering import lowered


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [2, 32, 33])
def test_timestep_embedding_equals_diffusers(width):
    t = np.array([0, 1, 17, 500, 999])
    reference = get_timestep_embedding(
        torch.tensor(t), width, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    embedding = timestep_embedding(jnp.asarray(t), width)
    assert embedding.shape == (5, width) and embedding.dtype == jnp.float32
    # Angles reach 999 radians, so float32 leaves 1e-4 of a radian.
    np.testing.assert_allclose(embedding, reference.numpy(), rtol=0, atol=2e-4)


def test_timestep_embedding_tells_neighbouring_timesteps_apart():
    embedding = np.asarray(timestep_embedding(jnp.arange(1000), 32), np.float64)
    distances = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    assert distances[~np.eye(1000, dtype=bool)].min() > 0.3


def test_stored_arrays_and_all_their_derivatives_are_the_same():
    x, tangent = jnp.asarray(normal(12, 2, 3)), jnp.asarray(normal(13, 2, 3))

    def results(keep):
        def function(x):
            return jnp.sum(jnp.sin(keep(x) ** 2))

        gradient = jax.grad(function)
        return (
            function(x),
            gradient(x),
            jax.grad(jax.checkpoint(function))(x),
            jax.jvp(gradient, (x,), (tangent,))[1],
            jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(x),
            jax.vmap(gradient)(x),
        )

    jax.tree.map(np.testing.assert_array_equal, results(stored), results(lambda x: x))


def test_arrays_are_stored_on_cpus_alone():
    assert "optimization_barrier" in lowered(stored, "cpu", 1.0)
    assert "optimization_barrier" not in lowered(stored, "tpu", 1.0)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_equals_torch(random_params, groups, epsilon):
    x = 3 * normal(0, 2, 5, 3, 8) + 1
    norm = GroupNorm(groups, epsilon)
    params = random_params(norm, x)
    reference = torch.nn.functional.group_norm(
        torch.tensor(x).permute(0, 3, 1, 2),
        groups,
        torch.tensor(params["scale"]),
        torch.tensor(params["bias"]),
        epsilon,
    ).permute(0, 2, 3, 1)
    y = norm.apply({"params": params}, x)
    np.testing.assert_allclose(y, reference.numpy(), rtol=0, atol=1e-5)


def test_group_norm_keeps_its_precision_far_from_zero(random_params):
    x = normal(9, 1, 64, 64, 8) + 30  # of standard deviation 1
    norm = GroupNorm(4)
    params = random_params(norm, x)
    groups = x.astype(np.float64).reshape(1, -1, 4, 2)
    groups = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    expected = groups.reshape(x.shape) * params["scale"] + params["bias"]
    np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=0, atol=2e-3)


def test_group_norm_refuses_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="3 groups do not divide 8 channels"):
        GroupNorm(3).init(jax.random.key(0), normal(1, 1, 2, 2, 8))


def test_group_norm_computes_half_precision_inputs_in_float32():
    x = jnp.asarray(normal(1, 2, 4, 4, 8), jnp.bfloat16)
    norm = GroupNorm(4)
    params = norm.init(jax.random.key(0), x)
    y = norm.apply(params, x)
    assert y.dtype == jnp.bfloat16
    exact = norm.apply(params, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_group_norm_uses_the_statistics_that_it_is_given(random_params):
    x, y = normal(10, 2, 5, 3, 8), 2 * normal(11, 2, 4, 4, 8) + 1
    norm = GroupNorm(4)
    variables = {"params": random_params(norm, x)}
    plain, of_x = norm.apply(variables, x, mutable=[NORM_STATISTICS])
    assert set(norm.init(jax.random.key(0), x)) == {"params"}
    np.testing.assert_array_equal(plain, norm.apply(variables, x))
    np.testing.assert_allclose(norm.apply({**variables, **of_x}, x), plain, rtol=0, atol=1e-5)

    # Of y with the statistics of x: an affine map with the slope and the offset that x has.
    given, of_y = norm.apply({**variables, **of_x}, y, mutable=[NORM_STATISTICS])
    groups = x.reshape(2, 15, 4, 2)
    mean, std = (np.repeat(f(axis=(1, 3)), 2, -1)[:, None, None] for f in (groups.mean, groups.std))
    affine = variables["params"]
    expected = (y - mean) / np.sqrt(std**2 + 1e-5) * affine["scale"] + affine["bias"]
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
    own = norm.apply(variables, y, mutable=[NORM_STATISTICS])[1]
    jax.tree.map(np.testing.assert_array_equal, of_y, own)  # what is recorded are y's own


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # as whose it is traced
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_one_matrix_on_the_last_axis(
    random_params, monkeypatch, platform, leading, use_bias
):
    monkeypatch.setattr(layers.context_mesh, "platform", lambda: platform)
    x = normal(2, *leading, 5)
    dense = Dense(7, use_bias=use_bias)
    params = random_params(dense, x)
    assert set(params["dense"]) == ({"kernel", "bias"} if use_bias else {"kernel"})
    expected = x.astype(np.float64) @ params["dense"]["kernel"] + params["dense"].get("bias", 0.0)
    y = dense.apply({"params": params}, x)
    assert y.shape == (*leading, 7)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    gradient = jax.grad(lambda params: dense.apply({"params": params}, x).sum())(params)
    of_kernel = np.repeat(x.reshape(-1, 5).astype(np.float64).sum(0)[:, None], 7, axis=1)
    np.testing.assert_allclose(gradient["dense"]["kernel"], of_kernel, rtol=0, atol=1e-4)


def test_zero_initialised_layers_start_at_zero_and_others_do_not():
    x = normal(3, 1, 4, 4, 3)
    key = jax.random.key(0)
    for zero, plain in (
        (Dense(5, zero_init=True), Dense(5)),
        (conv(5, 3, jnp.float32, "c", zero_init=True), conv(5, 3, jnp.float32, "c")),
    ):
        assert not np.any(zero.init_with_output(key, x)[0])
        std = np.std(plain.init_with_output(key, x)[0])
        assert 0.3 < std < 3  # variance is kept


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "torch_padding"),
    [
        (3, 1, "SAME", (1, 1, 1, 1)),
        (1, 1, "SAME", (0, 0, 0, 0)),
        (3, 2, ((0, 1), (0, 1)), (0, 1, 0, 1)),
        (3, 2, ((1, 1), (1, 1)), (1, 1, 1, 1)),
    ],
)
def test_conv_equals_torch(random_params, kernel, strides, padding, torch_padding):
    x = normal(4, 2, 6, 8, 3)
    layer = conv(5, kernel, jnp.float32, "c", strides=strides, padding=padding)
    params = random_params(layer, x)
    reference = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), torch_padding),
        torch.tensor(params["kernel"]).permute(3, 2, 0, 1),
        torch.tensor(params["bias"]),
        strides,
    ).permute(0, 2, 3, 1)
    y = layer.apply({"params": params}, x)
    assert y.shape == reference.shape
    np.testing.assert_allclose(y, reference.numpy(), rtol=0, atol=1e-5)


class UpsampleThenConv(nn.Module):
    """What `UpsampleConv` computes, step by step."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv(self.features, 3, jnp.float32, "conv")(x)


@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_upsample_conv_is_upsampling_and_convolution(random_params, size):
    x, weights = normal(6, 2, *size, 5), normal(7, 2, 2 * size[0], 2 * size[1], 3)
    two, one = UpsampleThenConv(3), UpsampleConv(3)
    params = random_params(two, x)["conv"]
    shapes = jax.tree.map(np.shape, one.init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(np.shape, params)
    params["kernel"] += 0.2 * normal(8, *params["kernel"].shape)  # biased, so that sums matter

    def of_two(params, x):
        return two.apply({"params": {"conv": params}}, x)

    def of_one(params, x):
        return one.apply({"params": params}, x)

    np.testing.assert_allclose(of_one(params, x), of_two(params, x), rtol=0, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda params, x, f=f: jnp.sum(weights * f(params, x)), (0, 1))(params, x)
        for f in (of_one, of_two)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), ours, theirs)


def test_upsample_conv_starts_as_a_convolution_does():
    x = jnp.zeros((1, 2, 2, 64))
    ours = UpsampleConv(64).init(jax.random.key(0), x)["params"]
    theirs = conv(64, 3, jnp.float32, "conv").init(jax.random.key(0), x)["params"]
    ratio = float(jnp.std(ours["kernel"]) / jnp.std(theirs["kernel"]))
    assert ratio == pytest.approx(1.0, abs=0.02)
    assert not ours["bias"].any()


def test_upsample_conv_computes_in_the_dtype_it_is_given(random_params):
    x = jnp.asarray(normal(9, 1, 4, 4, 8), jnp.bfloat16)
    half, full = UpsampleConv(4, jnp.bfloat16), UpsampleConv(4)
    params = {"params": random_params(half, x)}
    y = half.apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), full.apply(params, x.astype(jnp.float32)), rtol=0, atol=0.05
    )


def test_both_forms_of_a_convolved_upsampling_are_the_same():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 4, 6)).astype(np.float32)
    kernels = [[layers._folded(kernel, row, column) for column in (0, 1)] for row in (0, 1)]
    four, one = layers._four_convolutions(x, kernels), layers._one_convolution(x, kernels)
    assert four.shape == one.shape == (2, 3, 2, 5, 2, 6)
    np.testing.assert_allclose(one, four, rtol=0, atol=1e-5)
