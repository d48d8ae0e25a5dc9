"""Figures of reconstructions: the same as image by image, on any mesh, and their errors."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data.pipeline import DecodedSource, image_example
from latent_diffusion_jax.evaluation import reconstruction
from latent_diffusion_jax.evaluation.fid import Moments, frechet_distance
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.evaluation.reconstruction import measure_reconstructions, to_levels
from latent_diffusion_jax.evaluation.ssim import ssim
from latent_diffusion_jax.models import lpips
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.inception import Outputs
from latent_diffusion_jax.runtime import images, sharding
from latent_diffusion_jax.runtime.errors import UserError

FIELDS = dict(
    channels=4, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, mid_attention=False
)
COUNT, SIZE = 21, 16


class Photographs:
    """Smooth random colours as PNG files, some larger than others."""

    label_names = ()

    def __init__(self, count: int = COUNT, damaged: tuple[int, ...] = ()):
        self._count, self._damaged = count, damaged

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        small = np.random.default_rng(index).integers(0, 256, (4, 5, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((SIZE + 4 + index, SIZE + index), Image.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = b"no image" if index in self._damaged else buffer.getvalue()
        return {"image": data, "captions": [""], "label": None, "name": f"photo {index}"}


def source(channels: int = 3, **kwargs) -> DecodedSource:
    return DecodedSource(Photographs(**kwargs), 0.2, channels)


def init(network):
    size = network.downsampling_factor
    x = jnp.zeros((1, size, size, network.image_channels))
    return jax.jit(network.init)(jax.random.key(0), x)["params"]


@pytest.fixture(scope="module")
def kl():
    network = AutoencoderKL(**FIELDS)
    return network, init(network)


@pytest.fixture(scope="module")
def vq():
    network = AutoencoderVQ(codebook_size=40, **FIELDS)
    return network, init(network)


def mesh(devices: int = 8):
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])


def measure(model, src=None, devices=8, **kwargs):
    settings = dict(image_size=SIZE, num_images=COUNT, batch_size=8) | kwargs
    return measure_reconstructions(*model, src or source(), mesh(devices), **settings)


def one_by_one(model, size: int = SIZE, channels: int = 3):
    """Originals, reconstructions and their codes, by the network's own methods."""
    network, params = model

    @jax.jit
    def run(params, x):
        z = network.apply({"params": params}, x, method="encode").mean
        y = network.apply({"params": params}, z, method="decode")
        if isinstance(network, AutoencoderVQ):
            return y, network.apply({"params": params}, z, method="indices")
        return y, None

    src = source(channels)
    pixels = np.stack([image_example(src[i], None, size, False) for i in range(COUNT)])
    found = [run(params, pixels[i : i + 1].astype(np.float32) / 127.5 - 1) for i in range(COUNT)]
    return pixels, images.to_uint8(np.concatenate([y for y, _ in found])), [c for _, c in found]


@pytest.mark.parametrize("devices", [1, 8])
def test_figures_are_those_of_single_images(kl, devices):
    figures, pairs = measure(kl, devices=devices, num_shown=5)
    x, y, _ = one_by_one(kl)
    assert figures.keys() == {"psnr", "psnr_std", "ssim", "ssim_std"}
    for name, values in (("psnr", psnr(x, y)), ("ssim", ssim(x, y))):
        np.testing.assert_allclose(figures[name], values.mean(), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(figures[f"{name}_std"], values.std(), rtol=1e-3)
    assert pairs.shape == (10, SIZE, SIZE, 3) and pairs.dtype == np.uint8
    np.testing.assert_array_equal(pairs[::2], x[:5])
    assert np.abs(pairs[1::2].astype(int) - y[:5]).max() <= 1  # of the last bit of a float


def test_codes_are_counted_over_all_images(vq):
    figures, _ = measure(vq)
    codes = np.concatenate(one_by_one(vq)[2])
    shares = np.bincount(codes.ravel(), minlength=40) / codes.size
    entropy = -sum(p * np.log(p) for p in shares if p)
    assert 1 < np.sum(shares > 0) < 40
    assert figures["codebook_usage"] == np.mean(shares > 0)
    np.testing.assert_allclose(figures["codebook_perplexity"], np.exp(entropy), rtol=1e-6)


def test_num_images_takes_the_first(kl, vq):
    one, _ = measure(kl, num_images=1)
    x, y, _ = one_by_one(kl)
    np.testing.assert_allclose(one["psnr"], psnr(x[:1], y[:1])[0], rtol=1e-4)
    assert one["psnr_std"] == 0.0
    assert measure(vq, num_images=1)[0]["codebook_usage"] <= measure(vq)[0]["codebook_usage"]


def test_more_images_than_there_are_is_all(kl):
    assert measure(kl, num_images=1000)[0] == measure(kl)[0]


def test_larger_images_and_crops(kl):
    figures, pairs = measure(kl, image_size=24, resize=48, num_shown=1)
    expected = image_example(source()[0], None, 24, False, resize=48)
    np.testing.assert_array_equal(pairs[0], expected)
    assert figures != measure(kl, image_size=24)[0]


class Averages(nn.Module):
    """In the place of Inception: colours of the image's quarters, and a parameter."""

    @nn.compact
    def __call__(self, x):
        assert x.shape[-1] == 3
        gain = self.param("gain", nn.initializers.ones, ())
        halves = (x.shape[1] // 2, x.shape[2] // 2)
        features = gain * nn.avg_pool(x.astype(jnp.float32), halves, halves)
        features = features.reshape(len(x), -1)
        return Outputs(features, features, features)


def averages(x: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    quarters = x.reshape(len(x), 2, half, 2, half, x.shape[-1]).mean((2, 4), dtype=np.float64)
    return quarters.reshape(len(x), -1)


@pytest.mark.parametrize("devices", [1, 8])
def test_rfid_is_the_distance_of_all_features(kl, monkeypatch, devices):
    monkeypatch.setattr(reconstruction, "InceptionV3", Averages)
    params = {"gain": np.float32(2)}
    figures, _ = measure(kl, devices=devices, inception_params=params)
    x, y, _ = one_by_one(kl)
    expected = frechet_distance(Moments.of(2 * averages(x)), Moments.of(2 * averages(y)))
    assert expected > 100
    np.testing.assert_allclose(figures["rfid"], expected, rtol=1e-3)


@pytest.fixture
def narrow_lpips(monkeypatch):
    """Random parameters of LPIPS with a narrow VGG."""
    monkeypatch.setattr(lpips, "VGG_BLOCKS", ((2, 2), (2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    x = jnp.zeros((1, 16, 16, 3))
    return jax.jit(lpips.LPIPS().init)(jax.random.key(1), x, x)["params"]


def test_lpips_of_the_rounded_images(kl, narrow_lpips):
    figures, _ = measure(kl, lpips_params=narrow_lpips)
    x, y, _ = (part for part in one_by_one(kl))
    x, y = (part.astype(np.float32) / 127.5 - 1 for part in (x, y))
    expected = np.asarray(lpips.LPIPS().apply({"params": narrow_lpips}, x, y))
    assert expected.mean() > 1e-3
    np.testing.assert_allclose(figures["lpips"], expected.mean(), rtol=1e-3)
    np.testing.assert_allclose(figures["lpips_std"], expected.std(), rtol=1e-2)


def test_grey_is_shown_to_the_judges_in_three_channels(narrow_lpips, monkeypatch):
    monkeypatch.setattr(reconstruction, "InceptionV3", Averages)
    network = AutoencoderKL(image_channels=1, **FIELDS)
    model = network, init(network)
    given = dict(lpips_params=narrow_lpips, inception_params={"gain": np.float32(1)})
    figures, pairs = measure(model, source(channels=1), **given)
    x, y, _ = one_by_one(model, channels=1)
    assert pairs.shape[-1] == x.shape[-1] == 1
    x, y = x.repeat(3, axis=-1), y.repeat(3, axis=-1)
    expected = frechet_distance(Moments.of(averages(x)), Moments.of(averages(y)))
    np.testing.assert_allclose(figures["rfid"], expected, rtol=1e-3)
    assert figures["lpips"] > 0


def test_four_channels_have_psnr_and_ssim_alone(narrow_lpips):
    network = AutoencoderKL(image_channels=4, **FIELDS)
    model = network, init(network)
    figures, pairs = measure(model, source(channels=4))
    assert figures.keys() == {"psnr", "psnr_std", "ssim", "ssim_std"} and pairs.shape[-1] == 4
    for judge in ("lpips_params", "inception_params"):
        with pytest.raises(UserError, match=r"1 or 3 channels.* have 4; leave their weights out"):
            measure(model, source(channels=4), **{judge: narrow_lpips})


@pytest.mark.parametrize("own", [[0, 1, 2, 3], [2, 3], [0, 3]])
def test_a_process_has_its_own_rows_of_every_batch(own):
    """They need not follow each other on TPUs; and little is read ahead."""
    asked = []

    def read(index):
        asked.append(index)
        return np.array([index])

    batches = reconstruction._rows(read, 103, own, 4, 2)
    first = next(batches)
    assert len(asked) <= 4 * len(own) + 4
    found = [first, *batches]
    expected = [[[4 * batch + row] for row in own] for batch in range(26)]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_levels_are_rounded_as_on_the_host():
    x = np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)
    x[0] = np.linspace(-1, 1, 50)
    x[1] = (np.arange(50) + 0.5) / 127.5 - 1
    np.testing.assert_array_equal(jax.jit(to_levels)(x), images.to_uint8(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(image_size=17), r"image_size=17 .* factor 2; 16 or 18 would be"),
        (dict(image_size=1), r"image_size=1 .* factor 2; 2 would be"),
        (dict(image_size=10), r"image_size=10 is too small .* SSIM needs at least 11"),
        (dict(image_size=12, lpips_params={}), r"=12 is too small .* LPIPS needs at least 16"),
        (dict(image_size=10, inception_params={}), r"=10 is too small .* SSIM needs at least 11"),
        (dict(batch_size=12), r"batch_size=12 is not divisible .* = 8; 8 or 16"),
        (dict(num_images=1, inception_params={}), "at least two images"),
    ],
)
def test_bad_arguments_have_one_clear_error(kl, kwargs, message):
    with pytest.raises(UserError, match=message):
        measure(kl, **kwargs)


def test_damaged_weights_are_noticed(kl):
    network, params = kl
    broken = params | {"quant_conv": jax.tree.map(lambda x: x * np.nan, params["quant_conv"])}
    with pytest.raises(UserError, match="8 of 8 reconstructions are not finite numbers"):
        measure((network, broken))


def test_damaged_images_are_replaced_and_too_many_are_an_error(kl):
    src = source(damaged=(3, 9))
    measure(kl, src)
    assert src.damaged == {3: "photo 3", 9: "photo 9"}
    with pytest.raises(UserError, match="5 of 21 images cannot be decoded"):
        measure(kl, source(damaged=(1, 3, 5, 7, 9)))
