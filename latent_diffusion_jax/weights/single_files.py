"""Whole models in one file of CompVis' code: which of its tensors are meant."""

from collections.abc import Mapping

import numpy as np

from latent_diffusion_jax.diffusion.schedules import NoiseSchedule, make_schedule

UNET = "model.diffusion_model."
AVERAGE = "model_ema."
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


def noise_schedule(tensors: Mapping[str, np.ndarray]) -> NoiseSchedule:
    """The schedule that the file holds, or Stable Diffusion's."""
    stored = tensors.get("betas")
    if stored is not None and stored.ndim == 1:
        return NoiseSchedule(np.cumprod(1.0 - np.asarray(stored, np.float64)))
    return make_schedule("scaled_linear", 1000, 0.00085, 0.012)
