"""What a run starts from where its config names weights: `first_stage.init_from`, `init_from`."""

import pathlib
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax import first_stages, loading
from latent_diffusion_jax.first_stages import FirstStage
from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.runtime import checkpoints, trees
from latent_diffusion_jax.runtime.errors import UserError


def autoencoder(
    config: ConfigDict, workdir: pathlib.Path, unfinished: list[str], mesh: jax.sharding.Mesh
) -> FirstStage | None:
    """The autoencoder of `first_stage.init_from` where this call needs it.

    Raises:
      UserError: it is another network than the config's, or there is none where one is needed.
    """
    if "first_stage" not in config:
        return None
    started = checkpoints.latest_step(workdir / "first_stage") is not None
    if started or not config.first_stage.init_from:
        if "first_stage" not in unfinished:
            first_stages.complete_step(config, workdir)
        return None
    path = pathlib.Path(config.first_stage.init_from).expanduser()
    found = first_stages.open_first_stage(path, mesh)
    first_stages.check_same_network(config, found, path)
    logging.info("first_stage: starts from %s", path)
    return found


def model(config: ConfigDict, workdir: pathlib.Path) -> Model | None:
    """The model of `init_from` where this call needs it.

    Raises:
      UserError: there is none.
    """
    if not config.init_from or checkpoints.latest_step(workdir / "diffusion") is not None:
        return None
    path = pathlib.Path(config.init_from).expanduser()
    if path.is_file():
        raise UserError(
            f"init_from={config.init_from!r} is a single file; give a workdir or a folder of "
            "diffusers (python -m latent_diffusion_jax.convert --part=model makes one of it)"
        )
    logging.info("diffusion: starts from %s", path)
    return loading.load_model(path)


def trained_params(shapes: Any, found: Model, origin: str) -> dict[str, Any]:
    """Parameters that the second stage starts from; what it does not train is let go of.

    Args:
      shapes: of the parameters that the second stage trains.
      found: to start from.
      origin: where that is from.

    Raises:
      UserError: it is another network than the config's.
    """
    params = {name: found.params.get(name, {}) for name in shapes}
    ours, theirs = trees.flatten_names(shapes), trees.flatten_names(params)
    different = [
        f"{name} {list(ours[name].shape) if name in ours else 'missing in the config'} (there "
        f"{list(theirs[name].shape) if name in theirs else 'missing'})"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if different:
        raise UserError(
            f"the model of init_from={origin!r} is not that of the config: they differ in "
            f"{len(different)} parameters, such as {'; '.join(different[:3])}"
        )
    return params
