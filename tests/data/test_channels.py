"""From files to crops with the channels that the autoencoder has, and what is said without them."""

import io

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime.errors import UserError


def file_of(image) -> bytes:
    """A PNG of an image, an .npy file of an array."""
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        np.save(buffer, image)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()


def decoded(folder, channels: int) -> pipeline.DecodedSource:
    """The training images of a folder without captions; all of them may be damaged."""
    records = open_source(str(folder), "train", caption_key="")
    return pipeline.DecodedSource(records, 1.0, channels)


@pytest.mark.parametrize(
    ("channels", "level"), [(1, [18]), (3, [10, 20, 30]), (4, [10, 20, 30, 255])]
)
def test_image_files_give_the_channels_that_are_asked_for(make_folder, channels, level):
    image = file_of(Image.new("RGB", (12, 6), (10, 20, 30)))
    source = decoded(make_folder({"a.png": image, "b.png": image}), channels)
    for rng in (None, np.random.default_rng(0)):
        found = pipeline.image_example(source[0], rng, 4, random_flip=True, resize=5)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.broadcast_to(level, (4, 4, channels)))


def test_arrays_of_five_channels(make_folder):
    array = np.random.default_rng(0).integers(256, size=(4, 8, 5)).astype(np.uint8)
    source = decoded(make_folder({"a.npy": file_of(array), "b.npy": file_of(array)}), 5)
    found = pipeline.image_example(source[0], None, 4, random_flip=False)
    np.testing.assert_array_equal(found, array[:, 2:6])


@pytest.mark.parametrize(
    ("image", "channels", "said"),
    [
        pytest.param(
            np.zeros((4, 4, 5), np.uint8),
            *(3, r"wanted uint8 \[H, W, 3\], found an array uint8 \[4, 4, 5\]"),
            id="another number",
        ),
        pytest.param(
            np.zeros((4, 4, 5), np.uint16),
            *(5, r"wanted uint8 \[H, W, 5\], found an array uint16 \[4, 4, 5\]"),
            id="16 bits",
        ),
        pytest.param(
            Image.new("RGB", (4, 4)),
            *(5, "wanted 5 channels, found an image file of 3, which can give 1, 3 or 4; .*Tensor"),
            id="a file",
        ),
    ],
)
def test_images_without_the_channels_stop_the_run(make_folder, image, channels, said):
    # However many may be damaged: all the others are like it.
    suffix = "npy" if isinstance(image, np.ndarray) else "png"
    folder = make_folder({f"{name}.{suffix}": file_of(image) for name in "ab"})
    with pytest.raises(UserError, match=rf"^image {folder}/b\.{suffix}: {said}[^\n]*$"):
        decoded(folder, channels).check(1)
