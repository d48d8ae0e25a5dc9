"""Checkpoints: Orbax, asynchronous, with the run's config, data position and tokenizer inside.

A checkpoint of a stage is `<workdir>/<stage>/<step>/` with the items `state`, `data` (position of
the data iterator), `config`, `info` and, where the stage has them, `tokenizer/tokenizer.json` and
`labels`, the names of the data's classes.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names

NAMED = 50  # arrays that an error names; more are counted
JSON_ITEMS = ("data", "config", "info", "tokenizer", "labels")


# Orbax has all devices with a copy of an array write a part of it each, and cuts the parts out one
# by one: for thousands of small arrays that takes seconds in which training stands still.
WHOLE_BYTES = 2**20  # what a device writes at least


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WHOLE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def open_manager(directory: pathlib.Path, *, keep: int = 1, create: bool = False) -> Any:
    """A CheckpointManager for one stage.

    Args:
      directory: the stage's folder.
      keep: how many of the last checkpoints stay.
      create: whether it is there to write: makes the folder and clears away interrupted saves.
    """
    handlers: dict[str, Any] = {name: ocp.JsonCheckpointHandler() for name in JSON_ITEMS}
    handlers["tokenizer"] = ocp.JsonCheckpointHandler(filename="tokenizer.json")
    handlers["state"] = _state_handler()
    options = ocp.CheckpointManagerOptions(
        create=create,
        preservation_policy=checkpoint_managers.LatestN(keep),
        # The caller decides when to save, every time.
        save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
        cleanup_tmp_directories=create,
    )
    return ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)


def latest_step(directory: pathlib.Path) -> int | None:
    """Step of the last complete checkpoint in a stage's folder, None where there is none."""
    if not directory.is_dir():
        return None
    with open_manager(directory) as manager:
        return manager.latest_step()


def save(manager: Any, step: int, state: Any, items: dict[str, Any]) -> None:
    """Starts an asynchronous save of a state and of JSON items; a step already saved is kept."""
    args = {name: ocp.args.JsonSave(value) for name, value in items.items() if value is not None}
    manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), **args))


def restore_state(manager: Any, step: int, shapes: Any) -> Any:
    """The whole state of a checkpoint.

    Args:
      manager: from `open_manager`.
      step: which checkpoint.
      shapes: tree of ShapeDtypeStruct with shardings, what the state has to look like.

    Raises:
      UserError: it looks otherwise: every array that is missing, not asked for or of another shape
        or dtype is named; or it is damaged, and the one before is named where there is one.
    """
    try:
        found = _problems(manager, step, shapes, whole=True)
        if not found:
            return _read(manager, step, shapes)
    except Exception as error:  # Orbax raises many kinds
        raise UserError(_damaged(manager, step, error)) from error
    raise UserError(_misfit(manager, step, found))


def _problems(manager: Any, step: int, shapes: Any, *, whole: bool) -> list[str]:
    """How a checkpoint's arrays differ from those that are asked for.

    Those of a whole state are all asked for, and in their dtypes.
    """
    saved, wanted = flatten_names(manager.item_metadata(step)["state"].tree), flatten_names(shapes)

    def described(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name if whole else ''}{list(leaf.shape)}"

    found = [f"no {name}" for name in wanted if name not in saved]
    if whole:
        found += [f"{name}, which nothing asks for" for name in saved if name not in wanted]
    return found + [
        f"{name} {described(saved[name])} in place of {described(leaf)}"
        for name, leaf in wanted.items()
        if name in saved and described(saved[name]) != described(leaf)
    ]


def _misfit(manager: Any, step: int, problems: list[str]) -> str:
    more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return (
        f"cannot restore checkpoint {manager.directory}/{step}: it is not that of this config; it "
        f"has {', '.join(problems[:NAMED])}{more}"
    )


def _read(manager: Any, step: int, shapes: Any, **options: bool) -> Any:
    placed = ocp.checkpoint_utils.construct_restore_args(shapes)
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=placed, **options)
    return manager.restore(step, args=ocp.args.Composite(state=args)).state


def restore_part(directory: pathlib.Path, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Some top-level entries of a checkpoint's state, such as {"ema": ...}, and nothing else.

    Dtypes become those that are asked for. Errors are those of `restore_state`, but for arrays that
    nobody asks for.
    """
    with open_manager(directory) as manager:
        try:
            found = _problems(manager, step, shapes, whole=False)
            if not found:
                return _read(manager, step, shapes, partial_restore=True)
        except Exception as error:
            raise UserError(_damaged(manager, step, error)) from error
        raise UserError(_misfit(manager, step, found))


def read_json(directory: pathlib.Path, step: int, item: str) -> Any:
    """One of a checkpoint's JSON items.

    Raises:
      UserError: the checkpoint has no such item, or it is damaged.
    """
    with open_manager(directory) as manager:
        try:
            args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
            return manager.restore(step, args=args)[item]
        except Exception as error:
            raise UserError(_damaged(manager, step, error)) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file so that it is either whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def abstract(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings into what `restore_state` takes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _damaged(manager: Any, step: int, error: Exception) -> str:
    reason = " ".join(str(error).split())[:600]
    earlier = [other for other in manager.all_steps() if other < step]
    offer = ""
    if earlier:
        offer = (
            f". The one before, of step {max(earlier)}, is still there: without the folder "
            f"{manager.directory}/{step} the same command goes on from it"
        )
    return f"cannot restore checkpoint {manager.directory}/{step}: {reason}{offer}"
