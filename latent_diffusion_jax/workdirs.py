"""What a workdir holds already, and whether a run may go on from there."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from latent_diffusion_jax import older_configs
from latent_diffusion_jax.runtime import checkpoints, processes
from latent_diffusion_jax.runtime.commands import differences, flatten
from latent_diffusion_jax.runtime.errors import StorageError, UserError

# Keys that may change between calls in one workdir: they do not change what is learned, but for
# num_steps, which makes a run longer (the learning rate then follows the new length).
FREE_KEYS: tuple[str, ...] = (
    "stages",
    "mesh.",
    "accumulation",  # of the second stage: the first one's discriminator sees micro-batches
    "unet.remat",
    "first_stage.autoencoder.remat",
    "log_every",
    "eval_every",
    "eval_examples",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "first_stage.keep_best",
    "grace_seconds",
    "max_skipped_steps",
    "profile.",
    "sample.",
    "num_steps",
    "data.num_threads",
    "data.retry_seconds",
    "data.name",  # the data know what they are, wherever they lie
    "data.data_dir",
    "data.check_images",
    "data.max_damaged_share",
    "data.latents",
    "clip.",  # its copy in the workdir is used
    "init_from",  # it has started
)

# Where files lie that are known by their contents, or have been read for good. That there are any
# does not change.
PLACES = ("first_stage.loss.lpips_weights", "first_stage.init_from")


def _different(theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...]) -> str:
    """`differences`, but for `PLACES`."""
    left, right = (flatten(config) for config in (theirs, ours))
    for flat in (left, right):
        flat |= {key: "given" for key in PLACES if flat.get(key)}
    return differences(left, right, free)


def check_config(config: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises UserError where a workdir holds a run with another config (JSON values).

    That is in its config.json, and in its checkpoints where that is not there.
    """
    path = workdir / "config.json"
    if not path.exists():
        _compare_with_checkpoints(config, workdir)
        return
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        theirs = older_configs.upgraded(json.loads(text))
        different = _different(theirs, config, FREE_KEYS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error}; without it, the checkpoints' own are looked at"
        ) from error
    if different:
        raise UserError(_is_of_another(workdir, different))


def _compare_with_checkpoints(config: dict[str, Any], workdir: pathlib.Path) -> None:
    for stage in ("diffusion", "first_stage"):
        step = checkpoints.latest_step(workdir / stage)
        if step is None:
            continue
        theirs: dict[str, Any] = json.loads(
            older_configs.of_checkpoint(workdir / stage, step).to_json()
        )
        ours, free = config, FREE_KEYS
        if stage == "first_stage":  # which may have been adopted, or copied from another run
            theirs, ours = {stage: theirs[stage]}, {stage: config.get(stage) or {}}
            free = (*FREE_KEYS, "first_stage.ema_decay")
        if different := _different(theirs, ours, free):
            raise UserError(_is_of_another(workdir / stage / str(step), different))


def _is_of_another(what: pathlib.Path, different: str) -> str:
    return (
        f"{what} is of another config's run; they differ in {different}. Take another --workdir, "
        "or the config of that run"
    )


def check_first_stage(config: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises UserError where a second stage has begun, and what it was trained on is gone.

    It would be made anew, which takes long, to find in the end that it is another one.
    """
    begun = checkpoints.latest_step(workdir / "diffusion")
    section = config.get("first_stage")
    if begun is None or not section or section["init_from"]:
        return
    if checkpoints.latest_step(workdir / "first_stage") is None:
        raise UserError(
            f"{workdir / 'diffusion'} has a checkpoint of step {begun}, and the first stage that "
            f"it was trained on, {workdir / 'first_stage'}, is gone: put it back, or begin anew in "
            "another --workdir"
        )


def stages_to_do(config: ConfigDict, workdir: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """Steps of the stages' last checkpoints, 0 where there is none; the stages not complete yet.

    Raises:
      UserError: the workdir is of another config's run, or a complete stage is not whole.
    """
    check_config(json.loads(config.to_json()), workdir)
    sections = {"first_stage": config.get("first_stage"), "diffusion": config}
    last = {name: checkpoints.latest_step(workdir / name) or 0 for name in config.stages}
    processes.agreed({f"the last checkpoint of {name}": step for name, step in last.items()})
    unfinished = [name for name in config.stages if last[name] < sections[name].num_steps]
    for name in config.stages:
        if name not in unfinished:
            checkpoints.check_whole(workdir / name, last[name])
    return last, unfinished
