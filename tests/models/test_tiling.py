"""Tiling: weights, exactness where the network is local, memory, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models import tiling
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.layers import NORM_STATISTICS
from latent_diffusion_jax.runtime.errors import UserError


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolve(x: jax.Array, kernel: np.ndarray, strides: int = 1, padding="SAME") -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


KERNELS = [normal(i, 3, 3, a, b) / 5 for i, (a, b) in enumerate(((2, 4), (4, 4), (4, 3)))]


def decode(z: jax.Array) -> jax.Array:
    """Three 3x3 convolutions around a doubling: sees 2 latent pixels to each side, [.., 2 -> 3]."""
    h = jnp.tanh(convolve(z, KERNELS[0]))
    h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
    return convolve(jnp.tanh(convolve(h, KERNELS[1])), KERNELS[2])


def encode(x: jax.Array) -> jax.Array:
    """Halves, padded to the right and below as the autoencoder, [.., 2 -> 3]."""
    h = convolve(jnp.tanh(convolve(x, KERNELS[0])), KERNELS[1], 2, ((0, 1), (0, 1)))
    return convolve(jnp.tanh(h), KERNELS[2])


SIZES = [(40, 24), (33, 57), (16, 40), (17, 16), (100, 5)]  # of latents, with tiles of 16


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [8, 11, 15])
def test_decoding_a_local_network_is_exact(size, overlap):
    z = normal(0, 2, *size, 2)
    tiled = jax.jit(
        lambda z: tiling.tiled_decode(decode, z, factor=2, tile=32, overlap=2 * overlap)
    )(z)
    whole = jax.jit(decode)(z)
    assert tiled.shape == whole.shape and tiled.dtype == whole.dtype
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_encoding_a_local_network_is_exact(size):
    x = normal(1, 2, 2 * size[0], 2 * size[1], 2)
    tiled = jax.jit(lambda x: tiling.tiled_encode(encode, x, factor=2, tile=32, overlap=16))(x)
    whole = jax.jit(encode)(x)
    assert tiled.shape == whole.shape
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=2e-6)


def test_too_little_overlap_shows_at_the_borders_only():
    z = normal(0, 1, 16, 28, 2)  # tiles begin at 0 and 12
    tiled = tiling.tiled_decode(decode, z, factor=2, tile=32, overlap=8)
    wrong = np.abs(tiled - decode(z)).max(axis=(0, 1, 3)) > 1e-5  # by column
    assert wrong[24:32].any()
    assert not wrong[:24].any() and not wrong[32:].any()


@pytest.mark.parametrize("size", [1, 7, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("overlap", [0, 1, 4, 9, 15])
def test_tiles_cover_everything_and_weights_sum_to_one(size, overlap):
    tile = min(size, 16)
    starts = tiling.tile_starts(size, 16, overlap)
    weights = tiling.tile_weights(size, tile, overlap, starts)
    assert starts[0] == 0 and starts[-1] + tile == size
    assert (np.diff(starts) <= 16 - overlap).all() and (np.diff(starts) > 0).all()
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert (weights >= 0).all() and (weights[0, 0], weights[-1, -1]) == (1.0, 1.0)
    if len(starts) > 1 and overlap >= 4:  # nothing from where a tile sees padding
        assert (weights[1:, : overlap // 4] == 0).all()
        assert (weights[:-1, tile - overlap // 4 :] == 0).all()


def test_tone_changes_smoothly_between_tiles():
    """Tiles of one colour each: no step between neighbouring pixels is a visible edge."""
    z = np.arange(64, dtype=np.float32)[None, None, :, None].repeat(16, 1)

    def tone(z):  # a tile is all of the colour of its mean
        return jnp.broadcast_to(z.mean(axis=(1, 2, 3), keepdims=True), z.shape)

    row = tiling.tiled_decode(tone, z, factor=1, tile=16, overlap=8)[0, 0, :, 0]
    steps = np.diff(row)
    assert (steps >= 0).all() and row[-1] - row[0] == 48.0
    assert steps.max() <= 8 * 0.4  # of the difference of 8 over 4 pixels


def test_small_latents_are_decoded_at_once():
    seen = []

    def spy(z):
        seen.append(z.shape)
        return decode(z)

    z = normal(2, 3, 16, 9, 2)
    tiled = tiling.tiled_decode(spy, z, factor=2, tile=32, overlap=8)
    assert seen == [(3, 16, 9, 2)]
    np.testing.assert_array_equal(tiled, decode(z))


def test_half_precision_is_blended_in_float32_and_returned_as_it_came():
    z = normal(3, 1, 40, 16, 2)
    half = tiling.tiled_decode(
        lambda z: decode(z).astype(jnp.bfloat16), z, factor=2, tile=32, overlap=16
    )
    assert half.dtype == jnp.bfloat16
    whole = decode(z)
    assert np.abs(half.astype(np.float32) - whole).max() <= np.abs(whole).max() / 100


def test_gradients_flow_through_tiles():
    z = normal(4, 1, 40, 16, 2)

    def tiled(z):
        return jnp.sum(tiling.tiled_decode(decode, z, factor=2, tile=32, overlap=16) ** 2)

    tangent = normal(5, *z.shape)
    _, ours = jax.jvp(tiled, (z,), (tangent,))
    _, theirs = jax.jvp(lambda z: jnp.sum(decode(z) ** 2), (z,), (tangent,))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def autoencoder(attention: bool) -> tuple[AutoencoderKL, dict]:
    model = AutoencoderKL(
        channels=8,
        channel_multipliers=(1, 2),
        num_groups=4,
        num_res_blocks=1,
        mid_attention=attention,
    )
    return model, model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_a_collage_has_pieces_from_all_over():
    y, x = np.mgrid[:200, :24]
    image = np.stack([y, x], axis=-1)[None].astype(np.float32)
    found = np.asarray(tiling.collage(jnp.asarray(image), 64))
    assert found.shape == (1, 64, 24, 2)
    np.testing.assert_array_equal(found[0, :, :, 1], x[:64])  # narrow enough to be whole
    rows = found[0, :, 0, 0].reshape(8, 8)  # 8 pieces of 8 rows
    assert np.all(np.diff(rows, axis=1) == 1)
    np.testing.assert_array_equal(rows[:, 0], np.round(np.linspace(0, 192, 8)))
    np.testing.assert_array_equal(tiling.collage(jnp.asarray(image), 200), image)
    # A side that eight does not divide, and one too small for two pieces.
    assert tiling.collage(jnp.asarray(image), 60).shape == (1, 60, 24, 2)
    one = np.asarray(tiling.collage(jnp.asarray(image), 13))[0, :, 0, 0]
    np.testing.assert_array_equal(one, np.arange(93, 106))


def test_tiles_with_the_statistics_of_a_collage_have_one_tone():
    """Latents that are dark on one side and bright on the other: against the whole image."""
    model, variables = autoencoder(attention=False)
    z = normal(7, 1, 16, 128, 3) + np.linspace(-3, 3, 128, dtype=np.float32)[:, None]

    def decode(z, statistics):
        return model.apply(
            {**variables, **statistics}, z, method="decode", mutable=[NORM_STATISTICS]
        )

    def tiled(z, shared):
        statistics = decode(tiling.collage(z, 32), {})[1] if shared else {}
        return tiling.tiled_decode(
            lambda z: decode(z, statistics)[0], z, factor=2, tile=64, overlap=32
        )

    whole = jax.jit(lambda z: model.apply(variables, z, method="decode"))(z)
    alone, shared = (
        float(jnp.abs(jax.jit(tiled, static_argnums=1)(z, shared) - whole).mean())
        for shared in (False, True)
    )
    assert shared < 0.5 * alone


def temporaries(function, *shapes: tuple[int, ...]) -> int:
    """Bytes that the compiled program needs besides its arguments and its result."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_large_image_takes_the_memory_of_a_tile():
    model, params = autoencoder(attention=True)

    def whole(z):
        return model.apply(params, z, method="decode")

    def tiled(z):
        return tiling.tiled_decode(whole, z, factor=2, tile=64, overlap=16)

    def tiled_back(x):
        return tiling.tiled_encode(
            lambda x: model.apply(params, x, method="encode").mean, x, factor=2, tile=64, overlap=16
        )

    one = temporaries(whole, (1, 32, 32, 3))
    canvas = 4 * 256 * 256 * 3
    assert temporaries(tiled, (1, 128, 128, 3)) < 1.2 * one + canvas
    assert temporaries(tiled_back, (1, 256, 256, 3)) < 1.2 * one + canvas
    assert temporaries(whole, (1, 256, 256, 3)) > 4 * one  # what tiling saves


@pytest.mark.parametrize("tile,overlap", [(30, 8), (32, 9), (-32, -64)])
def test_tiles_that_do_not_fit_the_factor_are_refused(tile, overlap):
    name, value = ("overlap", 9) if overlap == 9 else ("tile", tile)
    for function in (tiling.tiled_decode, tiling.tiled_encode):
        with pytest.raises(UserError, match=f"^tiling: {name}={value} .* multiple of 4, "):
            function(decode, jnp.zeros((1, 8, 8, 2)), factor=4, tile=tile, overlap=overlap)


@pytest.mark.parametrize("overlap", [32, 64])
def test_an_overlap_of_a_whole_tile_is_refused(overlap):
    for function in (tiling.tiled_decode, tiling.tiled_encode):
        with pytest.raises(UserError, match=f"overlap={overlap} pixels must be less than tile=32"):
            function(decode, jnp.zeros((1, 8, 8, 2)), factor=2, tile=32, overlap=overlap)


def test_images_that_the_factor_does_not_divide_are_refused():
    with pytest.raises(UserError, match=r"image of 41x40 is not divisible by 2"):
        tiling.tiled_encode(encode, jnp.zeros((1, 40, 41, 2)), factor=2, tile=32, overlap=16)
