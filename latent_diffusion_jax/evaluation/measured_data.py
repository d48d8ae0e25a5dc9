"""Which images an autoencoder is measured on: its config's, or others."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion_jax.data.pipeline import DecodedSource
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime.errors import UserError

DEFAULTS = {  # a config's `data` section for data that no config speaks of
    "name": "",
    "data_dir": "",
    "image_key": "image",
    "test_split": "test",
    "holdout_share": 1.0,  # of a folder without a test subfolder: all of it
    "image_size": 0,
    "resize": 0,
    "max_damaged_share": 0.01,
}
OF_ANY_DATA = ("data_dir", "image_size", "max_damaged_share")  # kept when the data is changed


def data_to_measure(
    own: Mapping[str, Any] | None, given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The keys of `DEFAULTS`: what is given, else the config's for its own data, else defaults.

    Args:
      own: the `data` section that an autoencoder was trained with; None for foreign checkpoints.
      given: some of the keys; None is not given.
      where: the autoencoder is, for the message.

    Raises:
      UserError: nothing says which data, or of which size.
    """
    given = {key: value for key, value in given.items() if value is not None}
    data = dict(DEFAULTS)
    if own is not None:
        same = given.get("name", own["name"]) == own["name"]
        data |= {key: own[key] for key in (DEFAULTS if same else OF_ANY_DATA)}
        if given.get("image_size", own["image_size"]) != own["image_size"]:
            data["resize"] = 0  # it goes with the config's size
    data |= given
    flags = {"name": "--data_name=FOLDER (or a TFDS dataset)", "image_size": "--image_size=PIXELS"}
    missing = [flag for key, flag in flags.items() if not data[key]]
    if missing:
        raise UserError(
            f"nothing says what {where} is to be measured on; give {' and '.join(missing)}"
        )
    return data


def open_images(data: Mapping[str, Any], channels: int) -> DecodedSource:
    """The images of the split `test_split`, with so many channels; captions are not looked at.

    Raises:
      UserError: they are not there.
    """
    records = open_source(
        data["name"],
        data["test_split"],
        data_dir=data["data_dir"] or None,
        image_key=data["image_key"],
        caption_key="",
        holdout_share=data["holdout_share"],
    )
    if not len(records):
        raise UserError(f"split {data['test_split']!r} of data {data['name']!r} is empty")
    return DecodedSource(records, data["max_damaged_share"], channels)
