"""Host images: decoding to RGB, cropping, and the way to uint8, grids and PNG files."""

import io
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import StorageError, UserError

ROOT = pathlib.Path(__file__).parents[2]


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(256, size=shape).astype(np.uint8)


def test_to_float_spans_minus_one_to_one():
    found = images.to_float(np.array([0, 255], np.uint8))
    np.testing.assert_array_equal(found, [-1.0, 1.0])
    assert found.dtype == np.float32


def decoded(data: bytes) -> np.ndarray:
    image = images.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# Decoding.


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_rgb_is_unchanged(format):
    pixels = noise(5, 7)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(pixels), format, **options)
    np.testing.assert_array_equal(decoded(data), pixels)


def test_transparent_parts_become_white():
    pixels = noise(5, 7, 4)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = (9, 9, 9, 0), (9, 8, 7, 255), (0, 100, 200, 128)
    found = decoded(encode(Image.fromarray(pixels)))
    alpha = pixels[..., 3:] / 255.0
    np.testing.assert_allclose(found, pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 1].tolist() == [9, 8, 7]


def test_grey_with_transparency():
    pixels = np.array([[[50, 255], [50, 0]]], np.uint8)
    found = decoded(encode(Image.fromarray(pixels, "LA")))
    assert found.tolist() == [[[50] * 3, [255] * 3]]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([250, 0, 0, 0, 240, 0, 0, 0, 230])
    image.putdata([0, 1, 2])
    return image


def test_palette():
    assert decoded(encode(palette_image())).tolist() == [[[250, 0, 0], [0, 240, 0], [0, 0, 230]]]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_transparency(format):
    found = decoded(encode(palette_image(), format, transparency=1))
    assert found.tolist() == [[[250, 0, 0], [255, 255, 255], [0, 0, 230]]]


def test_rgb_with_a_transparent_colour():
    pixels = np.array([[[10, 20, 30], [10, 20, 31]]], np.uint8)
    found = decoded(encode(Image.fromarray(pixels), transparency=(10, 20, 30)))
    assert found.tolist() == [[[255, 255, 255], [10, 20, 31]]]


def test_grey():
    pixels = noise(5, 7, 0)
    np.testing.assert_array_equal(
        decoded(encode(Image.fromarray(pixels))), pixels[..., None].repeat(3, axis=2)
    )


def test_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    assert decoded(encode(image)).tolist() == [[[0] * 3, [255] * 3]]


def test_grey_of_16_bits_keeps_its_contrast():
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = decoded(encode(Image.fromarray(levels)))
    np.testing.assert_allclose(found[..., 0], levels / 65535 * 255, atol=1)


def test_cmyk_jpeg():
    red = decoded(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(red, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=3)
    grey = decoded(encode(Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "JPEG"))
    np.testing.assert_allclose(grey, 100, atol=3)


WHOLE = encode(Image.fromarray(noise(32, 32)))
JPEG = encode(Image.fromarray(noise(32, 32)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"some text, not an image\n" * 50, id="text"),
        pytest.param(WHOLE[:4], id="first bytes"),
        pytest.param(WHOLE[:40], id="header"),
        pytest.param(WHOLE[: len(WHOLE) // 2], id="half a PNG"),
        pytest.param(JPEG[: len(JPEG) // 2], id="half a JPEG"),
        pytest.param(WHOLE[:100] + b"\xff" * 50 + WHOLE[150:], id="overwritten"),
        # Pillow would let another program draw the first, and raise errors of its own for the rest.
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", id="EPS"),
        pytest.param(b"DDS " + struct.pack("<I", 124) + bytes(120), id="DDS"),
        pytest.param(b"BLP2" + bytes(200), id="BLP"),
    ],
)
def test_damaged_images_are_value_errors(data):
    with pytest.raises(ValueError, match=r".+"):
        images.decode(data)


@pytest.mark.parametrize("size", [(650, 10), (10, 650)])
def test_images_that_are_far_too_long(size):
    """Scaled up so that the short side is as long as the crop, they would fill the memory."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png")
    for data in (file.getvalue(), np.zeros((*size[::-1], 3), np.uint8)):
        with pytest.raises(ValueError, match=r"one side is over 64 times the other"):
            images.decode(data)
    assert images.decode(np.zeros((640, 10, 3), np.uint8)).shape == (640, 10, 3)


def test_what_is_no_ordinary_file_is_not_read(tmp_path, monkeypatch):
    pipe, large = tmp_path / "pipe.png", tmp_path / "large.png"
    os.mkfifo(pipe)  # of which reading would wait for ever
    with large.open("wb") as file:
        file.truncate(2**40)
    for path, said in ((pipe, "it is no ordinary file"), (large, "1048576 MiB are more than")):
        with pytest.raises(UserError, match=f"cannot read image {path}: .*{said}"):
            images.read(path)
        with pytest.raises(ValueError, match=said):
            images.read_bytes(path)
    with pytest.raises(UserError, match=f"cannot read image {tmp_path}: Is a directory"):
        images.read(tmp_path)


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.png"
    with pytest.raises(StorageError, match=f"cannot write {path}: "):
        images.save_png(path, np.zeros((4, 4, 3), np.uint8))


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)  # the image has 1024
    with pytest.raises(ValueError, match=r"^32x32 pixels are more than the 1000 allowed$"):
        images.decode(WHOLE)


MEASURE = """
import io, pathlib, sys
from latent_diffusion_jax.runtime import images

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

data = pathlib.Path(sys.argv[1]).read_bytes()
images.decode(pathlib.Path(sys.argv[2]).read_bytes())
before = peak()
image = images.decode(data)
print((peak() - before) / (image.width * image.height))
"""


def test_large_pictures_of_16_bits_take_few_bytes_a_pixel(tmp_path):
    for name, size in (("large.png", 4096), ("small.png", 16)):
        data = encode(Image.fromarray(np.full((size, size), 1000, np.uint16)), compress_level=1)
        (tmp_path / name).write_bytes(data)
    args = [sys.executable, "-c", MEASURE, tmp_path / "large.png", tmp_path / "small.png"]
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT, check=True)
    assert 4 <= float(done.stdout) < 10  # Pillow's RGB has four


def test_strips_of_16_bits_are_the_whole(monkeypatch):
    levels = np.arange(65536).astype(np.uint16).reshape(512, 128)
    expected = np.round(levels / 257.0).astype(np.uint8)
    monkeypatch.setattr(images, "STRIP", 1000)  # seven rows of 128
    for data in (encode(Image.fromarray(levels)), encode(Image.fromarray(levels), "TIFF")):
        np.testing.assert_array_equal(np.asarray(images.decode(data, 1)), expected)


def tiff(levels, bits, kind="<u2", *, format=1, photometric=1, deflate=False) -> bytes:
    """A grey TIFF of one strip; of twelve bits, two levels in three bytes."""
    height, width = np.shape(levels)
    data = np.asarray(levels).astype(kind).tobytes()
    if bits == 12:
        data = bytes.fromhex("".join(f"{level:03x}" for level in np.ravel(levels)))
    data = zlib.compress(data) if deflate else data
    tags = [
        (256, width), (257, height), (258, bits), (259, 8 if deflate else 1), (262, photometric),
        (273, 8), (277, 1), (278, height), (279, len(data)), (339, format),
    ]  # fmt: skip
    order = ">" if kind[0] == ">" else "<"
    listed = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    mark = b"MM" if order == ">" else b"II"
    header = mark + struct.pack(order + "HI", 42, 8 + len(data))
    return header + data + struct.pack(order + "H", len(tags)) + listed + bytes(4)


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize(
    ("levels", "options", "expected"),
    [
        ([0, 2048, 4088, 4095], {"bits": 12}, [0, 128, 255, 255]),
        ([0, 128, 129, 65535], {"bits": 16}, [0, 0, 1, 255]),
        ([0, 128, 129, 65535], {"bits": 16, "kind": ">u2"}, [0, 0, 1, 255]),
        ([0, 128, 129, 65535], {"bits": 16, "photometric": 0}, [255, 255, 254, 0]),
        ([0, 1, 128, 255], {"bits": 8, "kind": "u1", "photometric": 0}, [255, 254, 127, 0]),
    ],
)
def test_white_is_white_in_tiffs_of_any_bits(levels, options, expected, deflate):
    found = images.decode(tiff([levels], **options, deflate=deflate), 1)
    assert found.mode == "L" and np.asarray(found).tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 8, "kind": "i1", "format": 2}, "its levels are signed"),
        ({"bits": 16, "kind": "<i2", "format": 2}, "its levels are signed"),
        ({"bits": 16, "kind": ">i2", "format": 2}, "its levels are signed"),
        ({"bits": 32, "kind": "<i4", "format": 2}, "its levels are signed"),
        ({"bits": 32, "kind": "<u4"}, "its levels are of 32 bits"),
        ({"bits": 32, "kind": "<f4", "format": 3}, "its pixels are floats"),
    ],
)
def test_levels_of_unknown_range_are_refused(options, said):
    """They would be a black picture, or a white one."""
    said += ", whose range nobody knows; those of images are whole, from 0, of 16 bits at most"
    with pytest.raises(ValueError, match=said):
        images.decode(tiff([[0, 1, 7, 100]], **options))


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(("maximum", "middle"), [(65535, 32768), (4095, 2048), (255, 128)])
def test_pgm_of_any_bits(maximum, middle, text):
    levels = [0, middle, maximum]
    data = np.array(levels, ">u2" if maximum > 255 else "u1").tobytes()
    if text:
        data = " ".join(map(str, levels)).encode()
    found = images.decode(b"P%d 3 1 %d\n" % (2 if text else 5, maximum) + data, 1)
    assert np.asarray(found).tolist() == [[0, 128, 255]]


def png(bits, kind, width, rows, transparent) -> bytes:
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    levels = struct.pack(f">{len(transparent)}H", *transparent)
    data = zlib.compress(b"\0" + rows)
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", levels) + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 0, 4, b"\x1b", [1]), [[0, 255], [85, 0], [170, 255], [255, 255]]),
        (png(4, 0, 4, b"\x01\x5f", [5]), [[0, 255], [17, 255], [85, 0], [255, 255]]),
        (png(8, 0, 2, b"\x05\x06", [5]), [[5, 0], [6, 255]]),
        (png(16, 0, 3, b"\x05\x05\x05\x06\xff\xff", [0x0505]), [[5, 0], [5, 255], [255, 255]]),
        (png(8, 2, 2, b"\x05\x05\x05\x06\x06\x06", [5] * 3), [[5, 0], [6, 255]]),
        (png(16, 2, 2, b"\x12\x34" * 3 + b"\x34\x12" * 3, [0x1234] * 3), [[18, 0], [52, 255]]),
    ],
    ids=["2 bits", "4 bits", "8 bits", "16 bits", "colour of 8", "colour of 16"],
)
def test_a_transparent_level_of_any_bits(data, expected):
    found = np.asarray(images.decode(data, 4))
    assert found[0, :, [0, 3]].T.tolist() == expected
    white = np.asarray(images.decode(data, 1))[0].tolist()
    assert white == [level if alpha else 255 for level, alpha in expected]


def tiled_tiff(side, tile):
    """Black, of one tile."""
    packed = zlib.compress(bytes(3 * tile**2))
    long, short = 4, 3
    tags = [  # (tag, kind, values): sizes, 3 x 8 bits, deflate, RGB, together; the tile
        (256, long, [side]), (257, long, [side]), (258, short, [8, 8, 8]), (259, short, [8]),
        (262, short, [2]), (277, short, [3]), (284, short, [1]),
        (322, long, [tile]), (323, long, [tile]), (324, long, [0]), (325, long, [len(packed)]),
    ]  # fmt: skip
    behind = 8 + 2 + 12 * len(tags) + 4
    places = {258: behind, 324: behind + 6}
    listed = b"".join(
        struct.pack("<HHII", tag, kind, len(values), places.get(tag, values[0]))
        for tag, kind, values in tags
    )
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return header + listed + bytes(4) + struct.pack("<3H", 8, 8, 8) + packed


def test_tiles_that_are_far_larger_than_the_image_are_refused():
    """The decoder makes room for a whole one."""
    assert decoded(tiled_tiff(64, 128)).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="16384x16384 pixels are more than"):
        images.decode(tiled_tiff(64, 16384))


# Cropping.


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)], ids=["centre", "random"])
@pytest.mark.parametrize(
    ("width", "height"), [(64, 32), (32, 64), (100, 17), (3, 5), (1, 1), (16, 16), (33, 32)]
)
def test_crop_is_square_at_any_size(width, height, rng):
    found = images.resize_and_crop(Image.fromarray(noise(height, width)), 16, rng)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8


def test_nothing_happens_at_the_right_size():
    pixels = noise(16, 16)
    np.testing.assert_array_equal(images.resize_and_crop(Image.fromarray(pixels), 16), pixels)


def test_centre_crop_without_resizing():
    for width in (26, 27):  # the odd pixel is cut off at the end
        pixels = noise(16, width)
        found = images.resize_and_crop(Image.fromarray(pixels), 16)
        np.testing.assert_array_equal(found, pixels[:, 5:21])
    tall = images.resize_and_crop(Image.fromarray(pixels.transpose(1, 0, 2)), 16)
    np.testing.assert_array_equal(tall, pixels.transpose(1, 0, 2)[5:21])


def test_resizing_is_pillows_bicubic_of_the_whole_image():
    image = Image.fromarray(noise(64, 96))
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))[:, 4:20]
    np.testing.assert_array_equal(images.resize_and_crop(image, 16), expected)


def test_random_crops_reach_every_place_and_none_outside():
    pixels = noise(16, 20)
    rng = np.random.default_rng(0)
    expected = {pixels[:, left : left + 16].tobytes(): left for left in range(5)}
    found = {
        expected[images.resize_and_crop(Image.fromarray(pixels), 16, rng).tobytes()]
        for _ in range(100)
    }
    assert found == set(range(5))


def test_random_crops_of_tall_images():
    pixels = noise(20, 16)
    rng = np.random.default_rng(0)
    expected = {pixels[top : top + 16].tobytes(): top for top in range(5)}
    found = {
        expected[images.resize_and_crop(Image.fromarray(pixels), 16, rng).tobytes()]
        for _ in range(100)
    }
    assert found == set(range(5))


def test_crops_come_from_the_short_side_that_is_asked_for():
    image = Image.fromarray(noise(64, 96))
    whole = np.asarray(image.resize((36, 24), Image.Resampling.BICUBIC))
    found = images.resize_and_crop(image, 16, resize=24)
    np.testing.assert_array_equal(found, whole[4:20, 10:26])
    places = {
        whole[top : top + 16, left : left + 16].tobytes() for top in range(9) for left in range(21)
    }
    rng = np.random.default_rng(0)
    crops = {images.resize_and_crop(image, 16, rng, resize=24).tobytes() for _ in range(1500)}
    assert crops == places


def test_images_may_keep_their_size():
    pixels = noise(30, 50)
    found = images.resize_and_crop(Image.fromarray(pixels), 16, resize=-1)
    np.testing.assert_array_equal(found, pixels[7:23, 17:33])
    rng = np.random.default_rng(0)
    crop = images.resize_and_crop(Image.fromarray(pixels), 16, rng, resize=-1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3))
    assert (windows == crop).all(axis=(-1, -2, -3)).sum() == 1
    small = Image.fromarray(noise(8, 10))  # enlarged, as without it
    np.testing.assert_array_equal(
        images.resize_and_crop(small, 16, resize=-1), images.resize_and_crop(small, 16)
    )


@pytest.mark.parametrize("resize", [-2, 1, 15])
def test_no_crop_from_less_than_its_size(resize):
    with pytest.raises(ValueError, match=f"resize={resize} .*at least the crop of 16 pixels"):
        images.resize_and_crop(Image.fromarray(noise(30, 50)), 16, resize=resize)


# To uint8, grids and files.


def test_to_uint8_is_the_inverse_of_scaling():
    levels = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        found = images.to_uint8(levels.astype(dtype) / 127.5 - 1.0)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clips():
    level = 1 / 127.5
    values = np.array([-1.0 + 0.4 * level, -1.0 + 0.6 * level, 1.0 - 0.4 * level, -1.7, 1.7])
    assert images.to_uint8(values).tolist() == [0, 1, 255, 0, 255]


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(5, 3, (2, 3)), (6, 3, (2, 3)), (2, 8, (1, 2)), (1, 1, (1, 1))],
)
def test_grid_layout(count, columns, shape):
    pictures = noise(count * 4, 5).reshape(count, 4, 5, 3) // 2  # darker than the lines
    found = images.grid(pictures, columns, pad=2, min_size=1)
    assert found.shape == (shape[0] * 6 + 2, shape[1] * 7 + 2, 3) and found.dtype == np.uint8
    rest = found.copy()
    for i, picture in enumerate(pictures):
        top, left = 2 + i // shape[1] * 6, 2 + i % shape[1] * 7
        np.testing.assert_array_equal(found[top : top + 4, left : left + 5], picture)
        rest[top : top + 4, left : left + 5] = 255
    assert (rest == 255).all()


def test_small_images_are_enlarged_in_a_grid():
    pictures = noise(8, 5).reshape(2, 4, 5, 3)
    found = images.grid(pictures, 2, pad=1, min_size=10)  # four pixels to twelve: three times
    assert found.shape == (12 + 2, 2 * 15 + 3, 3)
    np.testing.assert_array_equal(found[1:13:3, 1:16:3], pictures[0])
    np.testing.assert_array_equal(found[3:13:3, 3:16:3], pictures[0])
    np.testing.assert_array_equal(found[1:13:3, 17:32:3], pictures[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    path = tmp_path / "new" / "folder" / "image.png"
    pixels = noise(6, 9, channels)
    images.save_png(path, pixels)
    np.testing.assert_array_equal(decoded(path.read_bytes()), pixels.repeat(3 // channels, axis=2))


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 4), (5, 3), (13, 3)])
def test_pictures_show_the_first_channels(tmp_path, channels, shown):
    pixels = noise(6, 9, channels)
    images.save_png(tmp_path / "image.png", pixels)
    found = np.asarray(Image.open(tmp_path / "image.png"))
    np.testing.assert_array_equal(found.reshape(6, 9, shown), pixels[..., :shown])
    whole = images.grid(pixels[None], 1, pad=1, min_size=1)
    np.testing.assert_array_equal(whole[1:-1, 1:-1], pixels[..., :shown])


def test_png_whatever_the_file_is_called(tmp_path):
    images.save_png(tmp_path / "image.out", noise(2, 2))
    assert Image.open(tmp_path / "image.out").format == "PNG"


def test_photos_taken_sideways_are_turned_upright():
    image = Image.new("RGB", (20, 40), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held to the right: turn by 270 degrees to see it upright
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = images.decode(buffer.getvalue())
    assert upright.size == (40, 20)
    assert upright.getpixel((5, 10)) == (255, 0, 0) and upright.getpixel((35, 10)) == (0, 0, 255)
