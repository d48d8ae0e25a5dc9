"""Classes as conditions, the host half. The network half is `models/class_embedding.py`, or the
UNet's own embedding of labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_diffusion_jax.conditioning.base import Conditioning
from latent_diffusion_jax.runtime.errors import UserError


def label_conditioning(num_labels: int, previews: Sequence[int]) -> Conditioning:
    """Inputs `label` []: a record's.

    Args:
      num_labels: of the data; the next one stands for "no label".
      previews: labels to draw at previews.
    """

    def prepare(record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        del rng
        if record["label"] is None or record["label"] < 0:  # as TFDS says that there is none
            raise UserError(f"image {record['name']} has no label, conditioning='class' needs one")
        return {"label": np.array(record["label"], np.int32)}

    null = {"label": np.array(num_labels, np.int32)}
    return Conditioning(prepare, null, {"label": np.array(previews, np.int32)})


def guided_labels(
    labels: Sequence[int | str], names: Sequence[str], num_labels: int, null_label: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """What a program that samples takes of labels.

    Args:
      labels: of N images, by number or name.
      names: of the labels; none where nobody has kept them.
      num_labels: of the model, without the one for "no label".
      null_label: that guidance leads away from; None without guidance.

    Returns:
      `label` [N] of the images; the same for guidance, or None.

    Raises:
      UserError: the model has no such label.
    """
    found = np.array([_number(label, names, num_labels) for label in labels], np.int32)
    null = None if null_label is None else {"label": np.full_like(found, null_label)}
    return {"label": found}, null


def _number(label: int | str, names: Sequence[str], num_labels: int) -> int:
    if label in names:
        return list(names).index(str(label))
    if isinstance(label, str) and not label.isdecimal():
        known = f"known: {', '.join(names)}" if names else "this model knows them by number alone"
        raise UserError(f"unknown label {label!r}; {known}")
    if not 0 <= int(label) < num_labels:
        raise UserError(f"label {label} must be in 0..{num_labels - 1}")
    return int(label)
