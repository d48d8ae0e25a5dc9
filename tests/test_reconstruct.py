"""Images of any size through an autoencoder, tiled or not, from Python and by the command."""

import os

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_diffusion_jax import autoencoding, first_stages
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.reconstruct import reconstruct
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float


def pattern(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 // width, y * 255 // height, (x // 8 + y // 8) % 2 * 90], axis=-1)
    return image.astype(np.uint8)[None]


def test_small_images_go_through_the_plain_network(trained_workdir):
    autoencoder = autoencoding.load(trained_workdir)
    images = pattern(32, 48)
    stage = autoencoder.stage
    z = stage.network.apply({"params": stage.params}, to_float(images), method="encode").mean
    np.testing.assert_allclose(autoencoder.encode(images), z, rtol=1e-5, atol=1e-5)
    decoded = autoencoder.decode(np.asarray(z))
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    found = autoencoder.reconstruct(images)  # another program
    np.testing.assert_allclose(found.astype(int), decoded.astype(int), atol=1)


def test_tiles_give_nearly_the_whole_images_result(trained_workdir):
    images = pattern(192, 256)
    whole = autoencoding.load(trained_workdir, tile=0)
    tiled = autoencoding.load(trained_workdir, tile=128, overlap=32)
    # The smoke network has no attention: what differs is normalisation by the statistics of a
    # collage in place of the image's.
    z, z_tiled = whole.encode(images), tiled.encode(images)
    assert z.shape == z_tiled.shape == (1, 48, 64, 3)
    assert 0 < np.sqrt(np.mean((z - z_tiled) ** 2)) < 0.25 * z.std()
    assert psnr(whole.decode(z), tiled.decode(z))[0] > 25


def test_the_command_writes_the_reconstruction(trained_workdir, tmp_path):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(pattern(37, 50)[0]).save(source)  # cropped to 36 x 48
    value = reconstruct(str(trained_workdir), str(source), str(out))
    found = np.asarray(Image.open(out))
    assert found.shape == (36, 48, 3)
    np.testing.assert_allclose(value, psnr(pattern(37, 50)[:, :36, :48], found[None])[0], rtol=1e-6)


def test_what_does_not_fit_is_named(trained_workdir, tmp_path):
    autoencoder = autoencoding.load(trained_workdir)
    with pytest.raises(UserError, match=r"50x37 pixels .* multiples of the downsampling factor 4"):
        autoencoder.encode(pattern(37, 50))
    with pytest.raises(UserError, match=r"expected \[B, H, W, 3\]"):
        autoencoder.encode(np.zeros((1, 16, 16, 4), np.uint8))
    with pytest.raises(UserError, match=r"expected \[B, h, w, 3\]"):
        autoencoder.decode(np.zeros((16, 16, 3), np.float32))
    with pytest.raises(UserError, match="overlap=64 pixels must be less than tile=64"):
        autoencoding.load(trained_workdir, tile=64, overlap=64)
    with pytest.raises(UserError, match=r"cannot read image .*none\.png: No such file"):
        reconstruct(str(trained_workdir), str(tmp_path / "none.png"), "x.png")
    os.mkfifo(tmp_path / "pipe.png")  # to be read from for ever
    with pytest.raises(UserError, match=r"cannot read image .*pipe\.png: it is no ordinary file"):
        reconstruct(str(trained_workdir), str(tmp_path / "pipe.png"), "x.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"cannot read image .*broken\.png"):
        reconstruct(str(trained_workdir), str(tmp_path / "broken.png"), "x.png")
    Image.new("RGB", (3, 50)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin\.png has less than 4 pixels a side"):
        reconstruct(str(trained_workdir), str(tmp_path / "thin.png"), "x.png")


def test_weights_that_are_too_large_give_no_picture(tmp_path):
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(3e38)
    vae.save_pretrained(tmp_path / "vae")
    Image.fromarray(pattern(32, 32)[0]).save(tmp_path / "in.png")
    with pytest.raises(UserError, match=r"decoded is no picture, but not finite.*for float32"):
        reconstruct(*(str(tmp_path / name) for name in ("vae", "in.png", "out.png")))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_give_no_picture(trained_workdir, value):
    autoencoder = autoencoding.load(trained_workdir)
    decoder, encoder = (autoencoder.stage.params[name] for name in ("decoder", "encoder"))
    latents = autoencoder.encode(pattern(32, 32))
    decoder["conv_out"]["bias"] += value
    with pytest.raises(UserError, match=r"decoded is no picture, but not finite.*for float32"):
        autoencoder.decode(latents)
    encoder["conv_out"]["bias"] += value
    with pytest.raises(UserError, match="encoded is not finite: its weights are damaged"):
        autoencoder.encode(pattern(32, 32))


def test_a_tiled_program_needs_the_memory_of_a_tile(trained_workdir):
    stage = first_stages.open_first_stage(trained_workdir)

    def temporary_bytes(tile: int, side: int) -> int:
        autoencoder = autoencoding.Autoencoder(stage, tile, 16)
        z = jax.ShapeDtypeStruct((1, side // 4, side // 4, 3), np.float32)
        compiled = jax.jit(autoencoder._decode_any).lower(stage.params, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    canvas = 256 * 256 * 3 * 4
    assert temporary_bytes(64, 256) < temporary_bytes(0, 64) + 3 * canvas
    assert temporary_bytes(0, 256) > 8 * temporary_bytes(0, 64)
