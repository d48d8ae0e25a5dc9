"""Whole models in one file of CompVis' code: which of its tensors are meant, and what they do not
say."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.diffusion.schedules import NoiseSchedule, make_schedule
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.weights import files

UNET = "model.diffusion_model."
AVERAGE = "model_ema."
NOTES = "latent_diffusion_jax"  # key of the metadata
SCALE_FACTORS = {"kl": 0.18215, "vq": 1.0}  # of latents, where a file does not say


def with_average(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the UNet's moving average, where there is one, in the place of its weights.

    Averages are stored under the weights' names without dots.
    """
    chosen = {name: x for name, x in tensors.items() if not name.startswith(AVERAGE)}
    for name in chosen:
        if name.startswith(UNET):
            average = AVERAGE + name.removeprefix("model.").replace(".", "")
            if average in tensors:
                chosen[name] = tensors[average]
    return chosen


def without_average(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as they were trained."""
    return {name: x for name, x in tensors.items() if not name.startswith(AVERAGE)}


def noise_schedule(tensors: Mapping[str, np.ndarray], where: str) -> NoiseSchedule:
    """The schedule that the file `where` holds, or Stable Diffusion's.

    Raises:
      UserError: what it holds is none.
    """
    stored = tensors.get("betas")
    if stored is not None and stored.ndim == 1:
        with as_user_error(f"betas in {where}"):
            return NoiseSchedule(np.cumprod(1.0 - np.asarray(stored, np.float64)))
    return make_schedule("scaled_linear", 1000, 0.00085, 0.012)


@dataclasses.dataclass(frozen=True)
class Notes:
    """What tensors do not say. Files that were written here have it as JSON in their metadata.

    Attributes:
      prediction_type: what the UNet predicts.
      num_heads, head_dim: of the UNet's attentions, one of them.
      text_heads: of the text encoder.
      image_size: pixels a side that the model was trained on.
      null_label: that stands for no class.
      label_names: names of the classes.
      settings: keyword arguments of `sampling.Settings`.
      tokenizer: contents of its files by name.
    """

    prediction_type: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    text_heads: int | None = None
    image_size: int | None = None
    null_label: int | None = None
    label_names: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """For `files.write`."""
        return {"format": "pt", NOTES: json.dumps(dataclasses.asdict(self))}


def read_notes(path: pathlib.Path) -> Notes:
    """The notes in a file; empty ones where it was written elsewhere.

    Raises:
      UserError: they are damaged, or of another version.
    """
    text = files.read_metadata(path).get(NOTES)
    if text is None:
        return Notes()
    try:
        notes = Notes(**json.loads(text))
        sound = all(_is(value, name) for name, value in dataclasses.asdict(notes).items())
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"the metadata {NOTES!r} of {path} is damaged, or of another version")
    return notes


def _is(value: Any, name: str) -> bool:
    """Whether a note's value is of the kind that it should be."""
    if name == "settings":
        return isinstance(value, dict)
    if name == "label_names":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if name == "tokenizer":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    kind = str if name == "prediction_type" else int
    return value is None or type(value) is kind
