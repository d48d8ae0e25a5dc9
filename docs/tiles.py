"""Makes the README's picture of a large image decoded in tiles, beside the same one decoded whole.

  python docs/tiles.py runs/kl_photos

docs/tiles.png: a 2048x2048 image decoded in tiles of 512, at a quarter of its size; and at full
size, around a place where four tiles meet, in tiles, whole, and eight times their difference.
Prints the error and the memory of both. Takes some minutes: at a factor of 4 the whole image's
attention is between 262,144 pixels.
"""

import pathlib
import sys

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from latent_diffusion_jax import autoencoding
from latent_diffusion_jax.runtime import images

SIDE, TILE, OVERLAP, SHOWN = 2048, 512, 128, 512


def temporaries(autoencoder: autoencoding.Autoencoder, latents: np.ndarray) -> float:
    """MiB that a program that decodes takes beside its arguments and results."""
    program = jax.jit(autoencoder._decode_any).lower(autoencoder.stage.params, latents).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def main(workdir: str) -> None:
    tiled = autoencoding.load(workdir, tile=TILE, overlap=OVERLAP)
    whole = autoencoding.Autoencoder(tiled.stage, tile=0)
    photo = Image.fromarray(load_sample_images().images[0])
    original = np.asarray(images.resize_and_crop(photo, SIDE))[None]
    latents = tiled.encode(original)
    factor = tiled.stage.network.downsampling_factor
    one_tile = latents[:, : TILE // factor, : TILE // factor]
    print(f"{temporaries(tiled, latents):.0f} MiB in tiles")
    print(f"{temporaries(whole, one_tile):.0f} MiB for {TILE}x{TILE} pixels")
    print(f"{temporaries(whole, latents):.0f} MiB for {SIDE}x{SIDE} pixels whole")

    ours = tiled.decode(latents).astype(int)
    reference = whole.decode(latents).astype(int)
    difference = np.abs(ours - reference)
    psnr = 10 * np.log10(255**2 / np.square(difference).mean())
    print(
        f"in tiles against whole: PSNR {psnr:.1f} dB, largest difference {difference.max()} of 255"
    )
    starts = np.arange(TILE - OVERLAP, SIDE - 1, TILE - OVERLAP)
    steps = np.abs(np.diff(ours, axis=2)).mean((0, 1, 3))
    print(f"from a column of pixels to the next: {steps[starts - 1].mean():.2f} where tiles begin,")
    print(f"{np.delete(steps, starts - 1).mean():.2f} elsewhere")

    small = Image.fromarray(ours[0].astype(np.uint8)).resize((SHOWN, SHOWN), Image.Resampling.BOX)
    middle = starts[1] + OVERLAP // 2  # of where tiles are blended
    corner = slice(middle - SHOWN // 2, middle + SHOWN // 2)
    crops = [x[0, corner, corner] for x in (ours, reference, np.minimum(8 * difference, 255))]
    shown = np.stack([np.asarray(small), *crops]).astype(np.uint8)
    path = pathlib.Path(__file__).parent / "tiles.png"
    images.save_png(path, images.grid(shown, columns=4))


if __name__ == "__main__":
    main(*sys.argv[1:])
