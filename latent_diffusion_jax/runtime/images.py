"""Images on the host: decode, resize, crop, grids, PNG files. numpy uint8 [H, W, C] throughout."""

import io
import math
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> upright RGB image; transparent parts become white.

    Raises:
      ValueError: the bytes are no whole image in a format that Pillow reads, or it is too large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError("no image in a format that is known") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips at 255
        levels = np.clip(np.asarray(image, np.int64), 0, 65535) / 257.0
        image = Image.fromarray(np.round(levels).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, size: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Short side to `size` (Pillow's bicubic filter), then a square crop.

    Args:
      image: any size.
      size: side of the square in pixels.
      rng: where to crop; None crops the centre.

    Returns:
      uint8 [size, size, 3].
    """
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if rng is None:
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left = int(rng.integers(width - size + 1))
        top = int(rng.integers(height - size + 1))
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] -> uint8, rounded to the nearest level."""
    return np.clip(np.round((np.asarray(images, np.float32) + 1.0) * 127.5), 0, 255).astype(
        np.uint8
    )


def grid(images: np.ndarray, columns: int, pad: int = 2, min_size: int = 96) -> np.ndarray:
    """uint8 [N, H, W, C] -> one picture to look at, white lines between the images.

    Args:
      images: all of one size.
      columns: images in a row.
      pad: width of the lines in pixels.
      min_size: smaller images are enlarged, each pixel repeated, to at least this many pixels.
    """
    factor = max(1, -(-min_size // min(images.shape[1:3])))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, h, w, c = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        canvas[top : top + h, left : left + w] = image
    return canvas


def save_png(path: str | pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] (or [H, W, 1]) as a PNG, making its folder where needed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")
