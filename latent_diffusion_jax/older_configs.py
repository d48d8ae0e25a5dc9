"""Configs as earlier versions wrote them into workdirs and checkpoints, brought up to date."""

from typing import Any

# Keys that were not there, with the values of what was done without them.
ADDED: dict[str, Any] = {
    "accumulation": 1,
    "precision": "high",
    "param_dtype": "float32",
    "ema_dtype": "float32",
}
ADDED_TO_OPTIMIZERS: dict[str, Any] = {"mu_dtype": "float32", "nu_dtype": "float32", "eps": 1e-8}
REMAT = {False: "none", True: "blocks"}  # it was a switch


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON values with all keys of this version that can be told; a copy."""
    config = dict(config)
    first = config.get("first_stage")
    if first is not None:
        config["first_stage"] = _stage(first, "autoencoder")
    return _stage(config, "unet") if "unet" in config else config


def _stage(section: dict[str, Any], network: str) -> dict[str, Any]:
    """The section of a stage, with that of its network in it."""
    section = ADDED | section
    for name in ("optimizer", "discriminator_optimizer"):
        if name in section:
            section[name] = ADDED_TO_OPTIMIZERS | section[name]
    remat = section[network].get("remat", False)
    section[network] = section[network] | {"remat": REMAT.get(remat, remat)}
    return section
