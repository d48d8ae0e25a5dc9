"""Images of any number of channels: files as grey, RGB and RGBA, arrays as they are."""

import io

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.runtime import images


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(256, size=shape).astype(np.uint8)


WHOLE = encode(Image.fromarray(noise(32, 32)))


# Files.


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize(("channels", "wanted"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_file_gives_every_number_of_channels(mode, channels, wanted):
    image = Image.new(mode, (3, 2), 0)
    found = images.decode(encode(image, "TIFF" if mode == "CMYK" else "PNG"), channels)
    assert found.mode == wanted and found.size == (3, 2)


def test_alpha_is_kept_where_it_is_asked_for():
    pixels = noise(5, 7, 4)
    data = encode(Image.fromarray(pixels))
    np.testing.assert_array_equal(np.asarray(images.decode(data, 4)), pixels)
    opaque = np.asarray(images.decode(encode(Image.fromarray(pixels[..., :3])), 4))
    np.testing.assert_array_equal(opaque[..., :3], pixels[..., :3])
    assert (opaque[..., 3] == 255).all()


def test_grey_stays_what_it_is():
    pixels = noise(5, 7, 0)
    np.testing.assert_array_equal(
        np.asarray(images.decode(encode(Image.fromarray(pixels)), 1)), pixels
    )
    clear = Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA")
    assert np.asarray(images.decode(encode(clear), 1)).tolist() == [[50, 255]]


# Arrays.


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_arrays_stay_what_they_are(channels):
    pixels = noise(5, 7, channels)
    for data in (pixels, npy(pixels)):
        np.testing.assert_array_equal(images.decode(data, channels), pixels)
    np.testing.assert_array_equal(images.decode(npy(pixels[..., 0]), 1), pixels[..., :1])


@pytest.mark.parametrize(
    ("array", "channels"),
    [
        (noise(5, 7, 4), 3),
        (noise(5, 7, 0), 3),
        (noise(5, 7, 3)[None], 3),
        (noise(5, 7, 3).astype(np.float32), 3),
        (np.zeros((), np.uint8), 1),
    ],
)
def test_other_arrays_are_refused(array, channels):
    found = f"{array.dtype} {list(array.shape)}" if array.ndim != 2 else "uint8 [5, 7, 1]"
    for data in (array, npy(array)):
        with pytest.raises(images.ChannelsError) as raised:
            images.decode(data, channels)
        assert str(raised.value) == f"wanted uint8 [H, W, {channels}], found an array {found}"


@pytest.mark.parametrize("channels", [2, 5])
def test_files_with_other_channels_are_refused(channels):
    with pytest.raises(images.ChannelsError, match=f"wanted {channels} .* file of 3, .*1, 3 or 4"):
        images.decode(WHOLE, channels)
    with pytest.raises(ValueError, match=r".+"):  # damaged comes before
        images.decode(WHOLE[: len(WHOLE) // 2], channels)


ARRAY = npy(noise(8, 8))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(ARRAY[:8], id="first bytes"),
        pytest.param(ARRAY[:40], id="header"),
        pytest.param(ARRAY[:-9], id="cut off"),
        pytest.param(ARRAY[:10] + b"(" * 40 + ARRAY[50:], id="overwritten"),
        pytest.param(ARRAY.replace(b"(8, 8, 3)", b"(8, 9e9 )"), id="odd shape"),
        pytest.param(ARRAY.replace(b"(8, 8, 3), }   ", b"(8**9, 8**9), }"), id="no literal"),
        pytest.param(npy(noise(8, 8))[:10] + ARRAY[10:].replace(b"|u1", b"|O1"), id="objects"),
        pytest.param(
            ARRAY.replace(b"8, 8, 3), }" + b" " * 12, b"9" * 12 + b", 8, 3), }"), id="bomb"
        ),
        pytest.param(npy(np.zeros((0, 4, 3), np.uint8)), id="no pixels"),
    ],
)
def test_damaged_arrays_are_value_errors(data):
    with pytest.raises(ValueError, match=r".+"):
        images.decode(data)


def test_arrays_with_too_many_pixels_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 60)
    for data in (noise(8, 8), ARRAY):
        with pytest.raises(ValueError, match=r"^8x8 pixels are more than the 60 allowed$"):
            images.decode(data)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match="pixels are more than"):
        images.decode(ARRAY)
    long = ARRAY.replace(b"(8, 8, 3), }" + b" " * 6, b"(6, 8, 3000000), }")
    with pytest.raises(ValueError, match=r"^it is cut short: uint8 \[6, 8, 3000000\] is more than"):
        images.decode(long)


class Harmful:
    """Calls whatever it likes when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "harm"
    data = npy(np.array([Harmful(path)], dtype=object))
    with pytest.raises(ValueError, match="Object arrays"):
        images.decode(data)
    assert not path.exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays_are_resized_channel_by_channel(channels):
    pixels = noise(40, 60, channels)
    found = images.resize_and_crop(pixels, 16, np.random.default_rng(3), resize=20)
    assert found.shape == (16, 16, channels) and found.dtype == np.uint8
    for i in range(channels):
        plane = Image.fromarray(pixels[..., i].copy())
        expected = images.resize_and_crop(plane, 16, np.random.default_rng(3), resize=20)
        np.testing.assert_array_equal(found[..., i], expected[..., 0])


def test_a_band_is_no_alpha_channel():
    pixels = noise(40, 40, 4)
    pixels[..., 3] = 0  # would make Pillow's RGBA black when resized
    found = images.resize_and_crop(pixels, 20)
    assert found[..., :3].std() > 10 and not found[..., 3].any()
