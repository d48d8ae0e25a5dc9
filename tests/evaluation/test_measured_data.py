"""Which data an autoencoder is measured on."""

import io

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.evaluation.measured_data import DEFAULTS, data_to_measure, open_images
from latent_diffusion_jax.runtime.errors import UserError

OWN = dict(
    name="photos",
    data_dir="/tfds",
    image_key="photo",
    test_split="held_out",
    holdout_share=0.1,
    image_size=32,
    resize=48,
    max_damaged_share=0.3,
    random_flip=True,  # and what else a section has
)


def test_own_data_is_read_as_in_training():
    expected = {key: OWN[key] for key in DEFAULTS}
    for given in ({}, {"name": None, "image_size": None}, {"name": "photos"}, {"image_size": 32}):
        assert data_to_measure(OWN, given, "here") == expected


def test_a_size_of_its_own_is_not_cropped_from_the_configs():
    data = data_to_measure(OWN, {"image_size": 64}, "here")
    assert data["image_size"] == 64 and data["resize"] == 0


def test_what_is_given_wins():
    given = dict(data_dir="/other", image_key="picture", test_split="train")
    assert data_to_measure(OWN, given, "here").items() >= given.items()
    assert data_to_measure(OWN, given | {"name": "elsewhere"}, "here").items() >= given.items()


def test_other_data_is_used_whole():
    data = data_to_measure(OWN, {"name": "elsewhere"}, "here")
    kept = dict(data_dir="/tfds", image_size=32, max_damaged_share=0.3)
    assert data == DEFAULTS | kept | {"name": "elsewhere"}
    assert data["holdout_share"] == 1.0


def test_foreign_checkpoints_have_defaults():
    data = data_to_measure(None, {"name": "elsewhere", "image_size": 64}, "here")
    assert data == DEFAULTS | {"name": "elsewhere", "image_size": 64}


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (None, {}, r"what here is .* give --data_name=FOLDER .* and --image_size=PIXELS$"),
        (None, {"name": "x"}, r"give --image_size=PIXELS$"),
        (None, {"image_size": 8}, r"give --data_name=FOLDER \(or a TFDS dataset\)$"),
        (OWN | {"name": ""}, {}, r"give --data_name=FOLDER \(or a TFDS dataset\)$"),
    ],
)
def test_missing_data_is_asked_for(own, given, message):
    with pytest.raises(UserError, match=message):
        data_to_measure(own, given, "here")


def test_a_folder_needs_no_captions_and_gives_the_channels(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(buffer, "PNG")
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(buffer.getvalue())
    data = data_to_measure(None, {"name": str(tmp_path), "image_size": 4}, "here")
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        source = open_images(data, channels)
        assert len(source) == 5 and source[0]["image"].mode == mode
    with pytest.raises(UserError, match="train"):
        open_images(data | {"test_split": "train"}, 3)
