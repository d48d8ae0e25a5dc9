"""Trained first stages from wherever they lie: a workdir, a diffusers folder, a CompVis file."""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax import build, older_configs
from latent_diffusion_jax.data.pipeline import Examples
from latent_diffusion_jax.models.autoencoder import (
    ENCODER,
    AutoencoderKL,
    AutoencoderVQ,
    param_shapes,
)
from latent_diffusion_jax.runtime import checkpoints, files, processes, sharding, trees
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.training.batches import in_order
from latent_diffusion_jax.training.state import State
from latent_diffusion_jax.weights import autoencoders


class FirstStage(NamedTuple):
    """A trained autoencoder.

    Attributes:
      kind: `kl` or `vq`.
      fields: of the network.
      network: the network.
      params: its parameters on the mesh (the moving average's, where there is one).
      scale_factor: by which latents get unit variance; None where nobody has measured it.
      config: that it was trained with; None for others' files.
    """

    kind: str
    fields: dict[str, Any]
    network: AutoencoderKL | AutoencoderVQ
    params: Any
    scale_factor: float | None
    config: ConfigDict | None


def is_workdir(path: pathlib.Path) -> bool:
    """Whether it is one with a first stage, or a checkpoint of that in one."""
    return checkpoints.workdir_and_step(path, "first_stage")[1] is not None


def complete_step(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Step of the complete first stage of a workdir, or of one checkpoint in it.

    Raises:
      UserError: there is none.
    """
    home, step = checkpoints.workdir_and_step(workdir, "first_stage")
    named = workdir != home  # one checkpoint, that somebody has chosen
    if step is None or (step < config.first_stage.num_steps and not named):
        directory = home / "first_stage" if workdir == home else workdir
        raise UserError(f"{directory} holds no complete first stage; train it first (stages)")
    return step


def open_first_stage(path: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> FirstStage:
    """Opens a first stage.

    Args:
      path: a workdir of `train` (its last checkpoint of the first stage), one checkpoint in it
        (`<workdir>/first_stage/<step>`), a diffusers folder of an AutoencoderKL or VQModel or of a
        pipeline that has one, or a file of CompVis' layout (.safetensors or .ckpt).
      mesh: where parameters go; None for one device.

    Raises:
      UserError: nothing is there, or it is damaged or of another layout.
    """
    path = pathlib.Path(path).expanduser()
    if mesh is None:
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.local_devices()[:1])
    workdir, step = checkpoints.workdir_and_step(path.absolute(), "first_stage")
    if not path.exists():
        raise UserError(f"first stage {path} does not exist")
    if step is not None:
        return _open_workdir(workdir, step, mesh)
    with files.unusable(path):
        loaded = autoencoders.load(path)
    network = build.AUTOENCODERS[loaded.kind](**loaded.fields)
    params = processes.put(loaded.params, sharding.state_sharding(loaded.params, mesh))
    scale = loaded.scaling_factor
    return FirstStage(loaded.kind, loaded.fields, network, params, scale, None)


def _open_workdir(workdir: pathlib.Path, step: int, mesh: jax.sharding.Mesh) -> FirstStage:
    directory = workdir / "first_stage"
    config = older_configs.of_checkpoint(directory, step)
    network = build.autoencoder(config)
    part = "ema" if config.first_stage.ema_decay else "params"
    shapes = {part: {"autoencoder": param_shapes(network)}}
    wanted = checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))
    found = checkpoints.restore_part(directory, step, wanted)
    scale = checkpoints.read_json(directory, step, "info").get("scale_factor")
    return FirstStage(
        kind=config.first_stage.kind,
        fields=build.network_fields(config.first_stage.autoencoder),
        network=network,
        params=found[part]["autoencoder"],
        scale_factor=scale,
        config=config,
    )


def load_frozen(
    config: ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """The frozen parameters `autoencoder` and `scale_factor` that a second stage works with.

    Raises:
      UserError: the workdir's first stage is not there, not complete or damaged.
    """
    complete_step(config, workdir)
    found = open_first_stage(workdir, mesh)
    if found.scale_factor is None:
        raise UserError(f"the last checkpoint in {workdir / 'first_stage'} has no scale_factor")
    scale = np.float32(found.scale_factor)
    return {
        "autoencoder": found.params,
        "scale_factor": processes.put(scale, sharding.replicated(mesh)),
    }


def measure_scale(
    config: ConfigDict,
    source: Examples,
    mesh: jax.sharding.Mesh,
    network: Any,
    params: Any,
    should_stop: Callable[[], bool] = lambda: False,
) -> float:
    """1 / standard deviation of the latents over training images (LDM, appendix G).

    Args:
      config: of the run.
      source: the training images, which may be encoded already: then it gives moments.
      mesh: where the parameters are.
      network: the autoencoder.
      params: its parameters.
      should_stop: asked before every batch.

    Raises:
      Stopped: a process was asked to stop.
    """
    section, prepare = config.first_stage, build.example_maker(config)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def moments(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Mean and mean square of each image's latents, [B]."""
        if "moments" in batch:
            z = network.posterior.from_moments(batch["moments"]).mean
        else:
            whole = {"params": sharding.gathered(params, network.dtype)}
            z = network.apply(whole, to_float(batch["image"]), method="encode").mean
        return z.mean((1, 2, 3)), (z**2).mean((1, 2, 3))

    totals, count = np.zeros(2), 0
    for batch, valid in in_order(
        source, prepare, mesh, section.batch_size, section.scale_examples, should_stop
    ):
        found = sharding.over(mesh, moments)(params, batch)
        totals += [np.asarray(x, np.float64)[:valid].sum() for x in found]
        count += valid
    mean, mean_square = totals / count
    std = math.sqrt(mean_square - mean**2)
    logging.info("first_stage: latents' std %.4g, so scale factor %.4g", std, 1 / std)
    return 1 / std


def adopt(config: ConfigDict, workdir: pathlib.Path, params: Any, scale_factor: float) -> None:
    """Writes a first stage from elsewhere into a workdir, complete, so that it holds all it needs.

    Args:
      config: of the workdir's run.
      workdir: the folder.
      params: of the autoencoder, on a mesh.
      scale_factor: of its latents.
    """
    as_json = json.loads(config.to_json())
    as_json["first_stage"]["ema_decay"] = 0.0  # these are the weights to work with
    items = {"config": as_json, "info": {"scale_factor": scale_factor}}
    everywhere = sharding.replicated(jax.tree.leaves(params)[0].sharding.mesh)
    step = processes.put(np.int32(0), everywhere)
    state = State(step, {"autoencoder": params}, None, None)
    with checkpoints.open_manager(workdir / "first_stage", create=True) as manager:
        checkpoints.save(manager, config.first_stage.num_steps, state, items)
        with checkpoints.saving(manager):
            manager.wait_until_finished()


def encoder_fingerprint(params: Any) -> str:
    """`fingerprint` of the parameters that make an autoencoder's latents; decoders may differ."""
    return fingerprint({part: params[part] for part in ENCODER})


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of trees of parameters, by name."""
    digest = hashlib.sha256()
    for part, tree in parts.items():
        for name, leaf in sorted(trees.flatten_names(tree).items()):
            array = processes.fetch(leaf)
            array = np.ascontiguousarray(array, np.dtype(np.float32).newbyteorder("<"))
            digest.update(f"{part}/{name} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def check_encoded_by(params: Any, index: Mapping[str, Any], where: str) -> None:
    """Raises UserError where another autoencoder wrote latents.

    Args:
      params: of the autoencoder.
      index: contents of `latents.json`.
      where: the latents are.
    """
    theirs, ours = index["autoencoder"]["fingerprint"], encoder_fingerprint(params)
    if theirs != ours:
        raise UserError(
            f"the latents in {where} are of another autoencoder (that of "
            f"{index['autoencoder']['source']}; fingerprint {theirs[:12]}) than this run's first "
            f"stage ({ours[:12]}); encode with this one, or start from that (first_stage.init_from)"
        )


COMPUTATION = ("dtype", "remat")  # fields that do not change what a network is


def check_same_network(config: ConfigDict, found: FirstStage, path: pathlib.Path) -> None:
    """Raises UserError, naming the keys, where a first stage is not the one of the config."""
    ours = build.network_fields(config.first_stage.autoencoder)
    theirs = found.fields
    different = [] if found.kind == config.first_stage.kind else ["kind"]
    different += [
        f"autoencoder.{key}={value} (there {theirs[key]})"
        for key, value in ours.items()
        if key not in COMPUTATION and key in theirs and _plain(value) != _plain(theirs[key])
    ]
    if different:
        raise UserError(
            f"the autoencoder in {path} ({found.kind}) is not that of the config: first_stage."
            f"{', first_stage.'.join(different)}"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
