"""Schedulers' configs of diffusers: the noise schedule, what is predicted, how to sample."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from latent_diffusion_jax.diffusion.noise_levels import SPACINGS
from latent_diffusion_jax.diffusion.schedules import (
    MAX_TIMESTEPS,
    NoiseSchedule,
    make_schedule,
    rescaled_to_zero_terminal_snr,
)
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.weights.diffusers import VERSION, boolean, integer, number

BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "z_0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned_range": "learned",
}
# Our sampler of each class.
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "DPMSolverSinglestepScheduler": "dpm++_2s",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
# What solvers can be here; the first of each takes the place of others.
SOLVERS: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "use_lu_lambdas": (False, None),
    "skip_prk_steps": (True,),
}
ASSUMED = "_use_default_values"  # keys of which nobody has chosen the value
CLIPS_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
BETA_DEFAULTS = {
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
}
USUAL_BETAS = (0.0001, 0.02, "linear")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a `scheduler_config.json` says.

    Attributes:
      schedule: the forward process.
      prediction_type: of the network.
      settings: keyword arguments of `sampling.Settings`.
    """

    schedule: NoiseSchedule
    prediction_type: str
    settings: dict[str, Any]


def read_config(config: Mapping[str, Any], where: str) -> Loaded:
    """Schedule and settings of a `scheduler_config.json`.

    A class that has no counterpart here is replaced by DDIM, with a warning.

    Raises:
      UserError: a value is of another kind, or asks for what is not here.
    """
    with as_user_error(where):
        return _read_config(config, where)


def _read_config(config: Mapping[str, Any], where: str) -> Loaded:
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        logging.warning("%s: there is no sampler for %s here, ddim takes its place", where, name)
    sampler = CLASSES.get(name, "ddim")
    # diffusers forgets these where another class takes over a config.
    config = {key: x for key, x in config.items() if key not in config.get(ASSUMED, ())}
    for key in ("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"):
        if boolean(config, key, False, where):
            raise UserError(f"{where} has {key}, which is not supported; set it to false")
    start, end, shape = BETA_DEFAULTS.get(name, USUAL_BETAS)
    prediction = _known(config, "prediction_type", "epsilon", PREDICTION_TYPES, where)
    betas = config.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not all(type(beta) in (int, float) for beta in betas):
            raise UserError(f"{where} has trained_betas {betas!r:.60}; it must be of numbers")
        schedule = NoiseSchedule(np.cumprod(1.0 - np.asarray(betas, np.float64), axis=0))
    else:
        schedule = make_schedule(
            _known(config, "beta_schedule", shape, BETA_SCHEDULES, where),
            integer(config, "num_train_timesteps", 1000, where, 1, MAX_TIMESTEPS),
            number(config, "beta_start", start, where),
            number(config, "beta_end", end, where),
        )
    if boolean(config, "rescale_betas_zero_snr", False, where):
        schedule = rescaled_to_zero_terminal_snr(schedule)
    spacing = config.get("timestep_spacing")
    if spacing not in (None, *SPACINGS):
        raise UserError(
            f"{where} has timestep_spacing {spacing!r:.60}; known are {', '.join(SPACINGS)}"
        )
    settings: dict[str, Any] = {
        "sampler": sampler,
        "spacing": spacing or "",
        "offset": integer(config, "steps_offset", 0, where, 0, schedule.num_timesteps - 1),
        "sigmas": "karras" if boolean(config, "use_karras_sigmas", False, where) else "schedule",
    }
    for key, value in SOLVERS.items():
        if key in config and config[key] not in value:
            logging.warning(
                "%s has %s %r, which is not here; %r takes its place",
                where, key, config[key], value[0],
            )  # fmt: skip
    if sampler == "dpm++_2m" and config.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
        settings["sampler"] = "dpm++_2m_sde"
    to_one = boolean(config, "set_alpha_to_one", name != "PNDMScheduler", where)
    settings["final"] = "zero" if to_one else "first"
    if boolean(config, "clip_sample", name in CLIPS_BY_DEFAULT, where):
        settings["clip"] = number(config, "clip_sample_range", 1.0, where)
        if settings["clip"] < np.finfo(np.float32).tiny:
            raise UserError(f"{where} has clip_sample_range {settings['clip']}; it must be above 0")
        settings["epsilon_of_clipped"] = False
    if sampler == "ddpm":
        settings["variance"] = _known(config, "variance_type", "fixed_small", VARIANCES, where)
    return Loaded(schedule, prediction, settings)


def make_config(
    schedule: NoiseSchedule, prediction_type: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A `scheduler_config.json` with the betas themselves; `settings` are those of `Loaded`."""
    names = {ours: name for name, ours in CLASSES.items()} | {
        "dpm++_2m_sde": "DPMSolverMultistepScheduler"
    }
    types = {ours: name for name, ours in PREDICTION_TYPES.items()}
    clip = settings.get("clip", 0.0)
    config: dict[str, Any] = {
        "_class_name": names[settings["sampler"]],
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.num_timesteps,
        "trained_betas": [float(beta) for beta in schedule.betas],
        "prediction_type": types[prediction_type],
        "clip_sample": bool(clip),
        "clip_sample_range": clip or 1.0,
        "set_alpha_to_one": settings["final"] == "zero",
        "steps_offset": settings["offset"],
        "use_karras_sigmas": settings["sigmas"] == "karras",
        "skip_prk_steps": True,
    }
    if settings["spacing"]:
        config["timestep_spacing"] = settings["spacing"]
    if settings["sampler"] == "dpm++_2m_sde":
        config["algorithm_type"] = "sde-dpmsolver++"
    return config


def _known(
    config: Mapping[str, Any], key: str, default: str, known: Mapping[str, str], where: str
) -> str:
    value = config.get(key, default)
    if value not in known:
        raise UserError(f"{where} has {key} {value!r}; known are {', '.join(known)}")
    return known[value]
