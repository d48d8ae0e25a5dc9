"""Images on the host: decode, resize, crop, grids, PNG files. numpy uint8 [H, W, C] throughout."""

import functools
import io
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TILELENGTH,
    TILEWIDTH,
)

from latent_diffusion_jax.runtime import files
from latent_diffusion_jax.runtime.errors import StorageError, UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for what image files give, by channels
MAX_ASPECT = 64  # of the long side to the short one: scaled by that, it would fill the memory
MAX_FILE = 2**30  # bytes
MAX_PIXELS = 2**26  # 8192x8192; a file of some KiB can hold far more than the memory
LEVELS = "those of images are whole, from 0, of 16 bits at most"
SIGNED = 2  # as TIFFs call it
STRIP = 2**20  # pixels that are converted together
# Others of Pillow's run programs of other vendors, or are not for pictures like these.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
NPY_MAGIC = b"\x93NUMPY"  # first bytes of a .npy file


ARRAY_ENDS = ((), (1,), (3,), (4,))  # shapes of arrays after height and width

Picture = str | pathlib.Path | Image.Image | np.ndarray


class ChannelsError(Exception):
    """An image is whole and cannot give what is wanted; says what is wanted and what was found."""


def decode(data: bytes | np.ndarray, channels: int = 3) -> Image.Image | np.ndarray:
    """Encoded bytes -> upright image with so many channels.

    Image files become grey (1), RGB (3) or RGBA (4), whatever they hold; without an alpha channel
    transparent parts become white. Arrays, and the contents of .npy files, stay what they are:
    uint8 [H, W, channels], or [H, W] for one channel.

    Raises:
      ValueError: the bytes are no whole image in one of `FORMATS`, or it is too large or too long.
      ChannelsError: an array has another shape or dtype, or image files have no such `channels`.
    """
    if isinstance(data, np.ndarray):
        return _checked_array(data, channels)
    if data.startswith(NPY_MAGIC):
        try:
            _check_npy_header(data)
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # a damaged header fails in any way that Python's parser can
            raise ValueError(str(error) or type(error).__name__) from error
        return _checked_array(array, channels)
    image = _open(data)
    if channels not in MODES:
        raise ChannelsError(
            f"wanted {channels} channels, found an image file of {len(image.getbands())}, which "
            "can give 1, 3 or 4; others come as arrays: from a TFDS feature Tensor or .npy files"
        )
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips at 255
        image = _eight_bits(image, *_grey_scale(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def read_bytes(path: pathlib.Path) -> bytes:
    """What an image file holds.

    Raises:
      OSError: it is not there, is a folder, or cannot be read.
      ValueError: it is a pipe, a device, or larger than any picture.
    """
    return files.read_bytes(path, MAX_FILE)


def read(path: str | pathlib.Path, channels: int = 3) -> Image.Image | np.ndarray:
    """An image file, see `decode`.

    Raises:
      UserError: it cannot be read, or is no whole image.
    """
    try:
        return decode(read_bytes(pathlib.Path(path).expanduser()), channels)
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror or error}") from error
    except (ValueError, ChannelsError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """Encoded bytes -> upright image in the file's own mode."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        _check_size(image.width, image.height)
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles are read as a whole
        _check_pixels(int(tags.get(TILEWIDTH, 0)), int(tags.get(TILELENGTH, 0)))
        if image.mode == "F":
            raise ValueError(f"its pixels are floats, whose range nobody knows; {LEVELS}")
        if SIGNED in tags.get(SAMPLEFORMAT, ()):
            raise ValueError(f"its levels are signed, whose range nobody knows; {LEVELS}")
        _scale_transparent(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except UnidentifiedImageError as error:
        raise ValueError(f"no image in a format that is known ({', '.join(_formats())})") from error
    except MemoryError:
        raise
    except Exception as error:  # of any kind, by the format
        raise ValueError(str(error) or type(error).__name__) from error


def _checked_array(array: np.ndarray, channels: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != channels:
        found = f"{array.dtype} {list(array.shape)}"
        raise ChannelsError(f"wanted uint8 [H, W, {channels}], found an array {found}")
    if not array.size:
        raise ValueError("an array without pixels")
    _check_size(array.shape[1], array.shape[0])
    return array


def _check_npy_header(data: bytes) -> None:
    """Raises ValueError where a .npy file claims too many pixels, or more than it holds."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:  # the other versions are for longer headers, of records with many fields
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if len(shape) > 1:
        _check_pixels(shape[1], shape[0])
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"it is cut short: {dtype} {list(shape)} is more than it holds")


def _scale_transparent(image: Image.Image) -> None:
    """Makes the transparent level of a PNG, which is in the file's bits, one of Pillow's 8.

    Of 16 bits of colour Pillow keeps the upper eight, by which a colour is then transparent.
    """
    level, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or level is None or not tiles:
        return
    bits = tiles[0].args  # as Pillow calls what it reads
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = level * {"L;2": 85, "L;4": 17}[bits]
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in level)


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The highest level of an image of over 8 bits, and whether that is black.

    Raises:
      ValueError: it is of 32 bits.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:  # no TIFF: Pillow has scaled it to 16 bits
        return 65535, False
    bits = tags[BITSPERSAMPLE][0]
    if bits > 16:
        raise ValueError(f"its levels are of {bits} bits, whose range nobody knows; {LEVELS}")
    return 2**bits - 1, tags.get(PHOTOMETRIC_INTERPRETATION, 0) == 0  # as Pillow for 8 bits


def _eight_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Grey levels to the nearest of 8 bits, in strips: a whole picture would take 1 GiB.

    Args:
      image: of mode I or I;16.
      white: the highest level.
      inverted: that one is black.

    Returns:
      Mode L; LA where a level is transparent.
    """
    transparent = image.info.get("transparency")
    found = np.empty((image.height, image.width, 1 if transparent is None else 2), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        levels = np.asarray(strip, np.int32)
        grey = (levels * 255 + white // 2) // white
        found[top : top + rows, :, 0] = 255 - grey if inverted else grey
        if transparent is not None:
            found[top : top + rows, :, 1] = np.where(levels == transparent, 0, 255)
    return Image.fromarray(found[..., 0] if transparent is None else found)


def _check_size(width: int, height: int) -> None:
    _check_pixels(width, height)
    _check_aspect(width, height)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS} allowed")


def _check_aspect(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is over {MAX_ASPECT} times the other")


def resize_and_crop(
    image: Image.Image | np.ndarray,
    size: int,
    rng: np.random.Generator | None = None,
    resize: int = 0,
) -> np.ndarray:
    """Short side to `resize` (Pillow's bicubic filter), then a square crop.

    Args:
      image: any size; as an array uint8 [H, W, C], whose channels are resized one by one.
      size: side of the square in pixels.
      rng: where to crop; None crops the centre.
      resize: length of the short side to crop from in pixels, at least `size`; 0: `size` itself;
        -1: as it is, enlarged to `size` where it is shorter.

    Returns:
      uint8 [size, size, C].
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    short = {0: size, -1: max(size, min(width, height))}.get(resize, resize)
    if short < size:
        raise ValueError(f"resize={resize} must be 0, -1 or at least the crop of {size} pixels")
    scale = short / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if rng is None:
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left = int(rng.integers(width - size + 1))
        top = int(rng.integers(height - size + 1))

    def cut(plane: Image.Image) -> np.ndarray:
        if plane.size != (width, height):
            plane = plane.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(plane.crop((left, top, left + size, top + size)), np.uint8)

    if isinstance(image, Image.Image):
        return cut(image).reshape(size, size, -1)  # grey images come without an axis for it
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([cut(plane) for plane in planes], axis=-1)


def of_size(picture: Picture, size: tuple[int, int], channels: int) -> np.ndarray:
    """A picture as uint8 [H, W, channels], resized where its size is not (height, width).

    Raises:
      UserError: it is no picture, cannot be read, or there are no pictures of so many channels.
    """
    if channels not in MODES:
        raise UserError(f"there are no pictures of {channels} channels, only of 1, 3 and 4")
    if isinstance(picture, str | pathlib.Path):
        picture = read(picture, channels)
    if isinstance(picture, np.ndarray):
        shape = picture.shape
        if picture.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ARRAY_ENDS:
            raise UserError(
                f"images as arrays must be uint8 [H, W] or [H, W, 1, 3 or 4], got {picture.dtype} "
                f"{list(shape)}"
            )
        picture = Image.fromarray(picture[..., 0] if shape[2:] == (1,) else picture)
    if not isinstance(picture, Image.Image):
        raise UserError(
            f"an image is a file's name, a Pillow image or an array, got {type(picture).__name__}"
        )
    picture = picture.convert(MODES[channels])
    if picture.size != size[::-1]:
        grey = channels == 1  # such as masks, whose edges stay sharp
        chosen = Image.Resampling.NEAREST if grey else Image.Resampling.LANCZOS
        picture = picture.resize(size[::-1], chosen)
    return np.asarray(picture).reshape(*size, channels)


def to_float(images: Any) -> Any:
    """uint8 images, NumPy's or JAX's, to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] -> uint8, rounded to the nearest level."""
    return np.clip(np.round((np.asarray(images, np.float32) + 1.0) * 127.5), 0, 255).astype(
        np.uint8
    )


def grid(images: np.ndarray, columns: int, pad: int = 2, min_size: int = 96) -> np.ndarray:
    """uint8 [N, H, W, C] -> one picture to look at, white lines between the images.

    Args:
      images: all of one size; see `shown` for what becomes of their channels.
      columns: images in a row.
      pad: width of the lines in pixels.
      min_size: smaller images are enlarged, each pixel repeated, to at least this many pixels.
    """
    images = shown(images)
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


def shown(images: np.ndarray) -> np.ndarray:
    """The channels [..., C] that a picture can show: all of 1, 3 or 4, else the first three.

    Of two, the first.
    """
    if images.shape[-1] in MODES:
        return images
    return images[..., :3] if images.shape[-1] > 3 else images[..., :1]


def save_png(path: str | pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C] as a PNG, making its folder where needed; see `shown`.

    Raises:
      StorageError: it cannot be written.
    """
    path, image = pathlib.Path(path), shown(image)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
