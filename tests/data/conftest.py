"""Data that the tests of this folder share."""

import io
import os
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from latent_diffusion_jax.data import digits, photos


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> pathlib.Path:
    """A TFDS data_dir with the handwritten digits in it, prepared once."""
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    digits.HandwrittenDigits(
        data_dir=str(data_dir), file_format="array_record"
    ).download_and_prepare()
    return data_dir


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory) -> pathlib.Path:
    """A TFDS data_dir with the bundled photographs in it, prepared once."""
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    photos.BundledPhotos(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture
def kill_handles():
    """Folder -> what the process has open in it is dead, as after a mount was away."""

    def kill(folder: pathlib.Path) -> int:
        links = pathlib.Path("/proc/self/fd")
        found = [path for path in links.iterdir() if path.is_symlink()]
        found = [path for path in found if os.readlink(path).startswith(str(folder))]
        dead = os.open("/dev/null", os.O_WRONLY)  # of which reading fails
        for path in found:
            os.dup2(dead, int(path.name))
        os.close(dead)
        return len(found)

    return kill


@pytest.fixture
def png():
    """(value, width, height) -> bytes of a PNG in which every pixel is `value`."""

    def encode(value: int = 0, width: int = 4, height: int = 4) -> bytes:
        buffer = io.BytesIO()
        pixels = np.full((height, width, 3), value, np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_folder(tmp_path, png):
    """{file: contents} -> a folder with these files; None stands for some image."""

    def make(files: dict[str, bytes | str | None], name: str = "images") -> pathlib.Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, contents in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(contents, str):
                contents = contents.encode("utf-8")
            path.write_bytes(png() if contents is None else contents)
        return folder

    return make
