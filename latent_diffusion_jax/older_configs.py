"""Configs as earlier versions wrote them into workdirs and checkpoints, brought up to date.

A config says its version as `version`, which goes up when a key comes, goes or changes its meaning;
each step from one version to the next has a function here. Version 0 are those without the key.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion_jax.runtime import checkpoints
from latent_diffusion_jax.runtime.errors import UserError

VERSION = 1  # of `configs/base.py`

# Keys that were not there, with the values of what was done without them.
ADDED_TO_ALL: dict[str, Any] = {"max_skipped_steps": 0, "keep_every": 0, "grace_seconds": 0.0}
ADDED_TO_DATA: dict[str, Any] = {"retry_seconds": 0.0}
ADDED_TO_STAGES: dict[str, Any] = {
    "keep_best": "",
    "accumulation": 1,
    "precision": "high",
    "param_dtype": "float32",
    "ema_dtype": "float32",
}
ADDED_TO_OPTIMIZERS: dict[str, Any] = {"mu_dtype": "float32", "nu_dtype": "float32", "eps": 1e-8}
REMAT = {False: "none", True: "blocks"}  # it was a switch


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON values with all keys of this version that can be told; a copy.

    Raises:
      UserError: it is of a version that is not known here.
    """
    version = config.get("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise UserError(
            f"its config has the version {version!r}, and this program knows 0 to {VERSION}: a "
            "newer latent_diffusion_jax has written it, which can read it"
        )
    for step in _STEPS[version:]:
        config = step(config)
    return config | {"version": VERSION}


def of_checkpoint(directory: pathlib.Path, step: int) -> ConfigDict:
    """The config in a checkpoint, `upgraded`.

    Args:
      directory: of a stage.
      step: of the checkpoint.

    Raises:
      UserError: it is not there, damaged, or of a version that is not known here.
    """
    found = checkpoints.read_json(directory, step, "config")
    try:
        return ConfigDict(upgraded(found))
    except UserError as error:
        raise UserError(f"cannot use checkpoint {directory}/{step}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot use checkpoint {directory}/{step}: its config is that of no version ({error})"
        ) from error


def _from_0(config: dict[str, Any]) -> dict[str, Any]:
    config = ADDED_TO_ALL | config | {"data": ADDED_TO_DATA | config["data"]}
    first = config.get("first_stage")
    if first is not None:
        config["first_stage"] = _stage(first, "autoencoder")
    return _stage(config, "unet") if "unet" in config else config


def _stage(section: dict[str, Any], network: str) -> dict[str, Any]:
    """The section of a stage, with that of its network in it."""
    section = ADDED_TO_STAGES | section
    for name in ("optimizer", "discriminator_optimizer"):
        if name in section:
            section[name] = ADDED_TO_OPTIMIZERS | section[name]
    remat = section[network].get("remat", False)
    section[network] = section[network] | {"remat": REMAT.get(remat, remat)}
    return section


_STEPS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_from_0,)  # from each version
