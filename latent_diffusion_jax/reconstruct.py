r"""Encodes an image of any size and decodes it again, to see what an autoencoder makes of it.

  python -m latent_diffusion_jax.reconstruct --first_stage=runs/kl_f8 --image=large.jpg --out=r.png

--first_stage is a workdir, a diffusers folder or a file of CompVis' layout. What is larger than
--tile goes through tile by tile, with the memory of one. Prints the PSNR.
"""

import pathlib

import numpy as np
from absl import flags

from latent_diffusion_jax import autoencoding
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.runtime import files, images, loggers
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError

FLAGS = flags.FLAGS


def read_image(path: pathlib.Path, channels: int, factor: int) -> np.ndarray:
    """An image file as uint8 [1, H, W, C], cropped at the right and the bottom to multiples.

    Raises:
      UserError: it cannot be read, or is smaller than `factor` pixels.
    """
    try:
        image = np.asarray(images.decode(images.read_bytes(path), channels))
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror}") from error
    except (ValueError, images.ChannelsError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error
    height, width = (side // factor * factor for side in image.shape[:2])
    if not height or not width:
        raise UserError(f"image {path} has less than {factor} pixels a side")
    return image[:height, :width].reshape(1, height, width, -1)


def reconstruct(
    first_stage: str, image: str, out: str, tile: int = 512, overlap: int = 128
) -> float:
    """Writes the reconstruction of an image file; its PSNR in dB.

    Raises:
      UserError: something cannot be read or written, or the tiles do not fit the autoencoder.
    """
    path = pathlib.Path(out).expanduser()
    if path.suffix.lower() != ".png":
        raise UserError(f"--out={out} must be a .png file")
    files.check_file(path, f"--out={out}")
    autoencoder = autoencoding.load(first_stage, tile=tile, overlap=overlap)
    network = autoencoder.stage.network
    original = read_image(
        pathlib.Path(image).expanduser(), network.image_channels, network.downsampling_factor
    )
    found = autoencoder.reconstruct(original)
    images.save_png(path, found[0])
    return float(psnr(original, found)[0])


def define_flags() -> None:
    flags.DEFINE_string("first_stage", None, "Workdir, diffusers folder or file.", required=True)
    flags.DEFINE_string("image", None, "Image file of any size.", required=True)
    flags.DEFINE_string("out", None, "PNG file to write.", required=True)
    flags.DEFINE_integer("tile", 512, "Side of a tile in pixels; 0: all at once.", lower_bound=0)
    flags.DEFINE_integer("overlap", 128, "Pixels that neighbouring tiles share.", lower_bound=0)


def main() -> None:
    loggers.set_up_logging()
    value = reconstruct(FLAGS.first_stage, FLAGS.image, FLAGS.out, FLAGS.tile, FLAGS.overlap)
    print(f"psnr {value:.2f} dB -> {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run(main, alone=True)
