"""Checkpoints: Orbax, asynchronous, with the run's config, data position and tokenizer inside.

A checkpoint of a stage is `<workdir>/<stage>/<step>/` with the items `state`, `data` (position of
the data iterator), `config`, `info` and, where the stage has them, `tokenizer/tokenizer.json` and
`labels`, the names of the data's classes. `digests` holds one of each array and of each other item,
which are compared when they are read.
"""

import contextlib
import errno
import functools
import json
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers, multihost

from latent_diffusion_jax.runtime import digests, processes
from latent_diffusion_jax.runtime.errors import StorageError, UserError
from latent_diffusion_jax.runtime.retention import Deleter, Kept
from latent_diffusion_jax.runtime.trees import flatten_names, path_name

NAMED = 50  # arrays that an error names; more are counted
DIGESTS = "digests"
JSON_ITEMS = ("data", "config", "info", "tokenizer", "labels", DIGESTS)

# Orbax has all devices with a copy of an array write a part of it each, and cuts the parts out one
# by one: for thousands of small arrays that takes seconds in which training stands still.
WHOLE_BYTES = 2**20  # what a device writes at least


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=WHOLE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


@contextlib.contextmanager
def open_manager(
    directory: pathlib.Path, *, kept: Kept | None = None, create: bool = False
) -> Iterator[Any]:
    """A CheckpointManager for one stage.

    Args:
      directory: the stage's folder.
      kept: which checkpoints stay; default the last one.
      create: whether it is there to write: makes the folder and clears away interrupted saves.

    Raises:
      StorageError: the folder cannot be made, or what was last to be written could not be.
    """
    handlers: dict[str, Any] = {name: ocp.JsonCheckpointHandler() for name in JSON_ITEMS}
    handlers["tokenizer"] = ocp.JsonCheckpointHandler(filename="tokenizer.json")
    handlers["state"] = _state_handler()
    options = ocp.CheckpointManagerOptions(
        create=create,
        preservation_policy=kept or Kept(),
        # The caller decides when to save, every time.
        save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
        cleanup_tmp_directories=create,
        # Otherwise a folder that cannot be made is an error only after ten minutes of waiting.
        async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False,
            # A slow disk, or a clock that is put forward, is no reason to end a run.
            timeout_secs=processes.WAIT_SECONDS,
            barrier_sync_fn=functools.partial(_meet_unless_failed, threading.current_thread()),
        ),
    )
    directory = directory.absolute()
    try:
        manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    except OSError as error:
        raise StorageError(f"cannot open {directory}: {error.strerror or error}") from error
    if create:
        manager._checkpoint_deleter = deleter = Deleter(directory)
        deleter.clear()
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # what it has to say of a save is said already
            manager.close()
        raise
    with saving(manager) if create else contextlib.nullcontext():
        manager.close()


def _meet_unless_failed(caller: threading.Thread, *, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not on the way out of an error, which ends them all.

    When a save is over, well or not, Orbax waits for all of them to say so. Those that have written
    their part wait elsewhere for one that has failed, and its error would never be heard of.

    Args:
      caller: thread that starts saves, which may be in the middle of an error of its own.
      key, timeout_ms: of the barrier, from Orbax.
    """
    error = sys.exception()
    if error is not None and threading.current_thread() is not caller:
        raise error
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def latest_step(directory: pathlib.Path) -> int | None:
    """Step of the last complete checkpoint in a stage's folder, None where there is none."""
    if not directory.is_dir():
        return None
    with open_manager(directory) as manager:
        return manager.latest_step()


def workdir_and_step(path: pathlib.Path, stage: str) -> tuple[pathlib.Path, int | None]:
    """The workdir and the step that a path stands for.

    Args:
      path: a workdir, or one checkpoint in it, `<workdir>/<stage>/<step>`. A workdir with such a
        name is a workdir.
      stage: whose checkpoint it would be.

    Returns:
      (workdir, step), of a workdir that of the last checkpoint; (path, None) of any other path.

    Raises:
      UserError: there is no such checkpoint, and the workdir has others.
    """
    last = latest_step(path / stage)
    if last is not None or not (path.parent.name == stage and path.name.isdecimal()):
        return path, last
    if path.exists() and not (path / "state").is_dir():
        return path, None
    steps = []
    if path.parent.is_dir():
        with open_manager(path.parent) as manager:
            steps = [s for s in manager.all_steps() if (path.parent / str(s) / "state").is_dir()]
    if steps and int(path.name) not in steps:
        shown = ", ".join(map(str, sorted(steps)))
        raise UserError(f"there is no checkpoint {path}; {path.parent} has those of steps {shown}")
    return (path.parent.parent, int(path.name)) if steps else (path, None)


def save(manager: Any, step: int, state: Any, items: dict[str, Any]) -> None:
    """Starts an asynchronous save of a state and of JSON items; a step already saved is kept.

    Raises:
      StorageError: it cannot be written, or the save before could not be.
    """
    items = {name: value for name, value in items.items() if value is not None}
    items[DIGESTS] = {
        "state": digests.of_arrays(state),
        "items": {name: digests.of_json(value) for name, value in items.items()},
    }
    args = {name: ocp.args.JsonSave(value) for name, value in items.items()}
    with saving(manager):
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), **args))


def is_whole(manager: Any) -> bool:
    """Whether the last asynchronous save is done; False while it goes on.

    Raises:
      StorageError: it has failed.
    """
    # Not the manager's `check_for_errors`: that takes the error away from the thread that writes,
    # which then takes the save for a good one and deletes those before.
    # Nor its own word for whether it is done, on which all processes agree: one may have failed.
    if manager._finalize_thread.map(lambda thread: thread is not None and thread.is_alive()):
        return False
    with saving(manager):
        manager.wait_until_finished()
    return True


@contextlib.contextmanager
def saving(manager: Any) -> Iterator[None]:
    """What goes wrong with a save inside becomes a StorageError; nothing that looks whole is left.

    What was written of it is deleted, as far as that is possible.
    """
    try:
        yield
    except Exception as error:  # of many kinds
        for partial in manager.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        whole = [int(path.name) for path in manager.directory.glob("*") if path.name.isdecimal()]
        last = "; there is none yet"
        if whole:
            last = f"; the last whole one is that of step {max(whole)}"
        if not manager.directory.is_dir():
            last = "; the folder is gone"
        raise StorageError(
            f"cannot save a checkpoint in {manager.directory}: {_reason(error)}{last}"
        ) from error


def _reason(error: BaseException) -> str:
    """What is the matter, in one line; what the system says, where it is that."""
    text = " ".join(str(error).split())
    system = re.search(r"(?:^|: )([^:]+) \[os_error_code=", text)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return system[1] if system else text[:600] or type(error).__name__


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
            return _checked(manager, step, _read(manager, step, shapes))
    except Exception as error:  # Orbax raises many kinds
        raise _unread(manager, step, error) from error
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


def _checked(manager: Any, step: int, state: Any) -> Any:
    """A state that was read, or a part of it.

    Raises:
      ValueError: it has other numbers than were saved.
    """
    saved = _digests(manager, step).get("state", {})
    found = digests.of_arrays(state)
    other = [name for name in found if name in saved and found[name] != saved[name]]
    if other:
        more = f" and {len(other) - NAMED} more" if len(other) > NAMED else ""
        raise ValueError(
            f"it is damaged: other numbers than were saved in {', '.join(other[:NAMED])}{more}"
        )
    return state


def _digests(manager: Any, step: int) -> Any:
    """Those of a checkpoint; {} of one of a version that made none.

    Raises:
      ValueError: it should have them.
    """
    folder = manager.directory / str(step)
    if not (folder / DIGESTS).exists():
        config = folder / "config" / "metadata"
        if config.exists() and json.loads(config.read_text("utf-8")).get("version", 0) >= 1:
            raise ValueError(f"it is damaged: its {DIGESTS} are not there")
        return {}
    args = ocp.args.Composite(**{DIGESTS: ocp.args.JsonRestore()})
    return manager.restore(step, args=args)[DIGESTS]


def restore_part(directory: pathlib.Path, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Some top-level entries of a checkpoint's state, such as {"ema": ...}, and nothing else.

    Dtypes become those that are asked for. Errors are those of `restore_state`, but for arrays that
    nobody asks for.
    """
    with open_manager(directory) as manager:
        try:
            found = _problems(manager, step, shapes, whole=False)
            if not found:
                saved = flatten_names(manager.item_metadata(step)["state"].tree)
                stored = jax.tree_util.tree_map_with_path(
                    lambda path, x: x.update(dtype=saved[path_name(path)].dtype), shapes
                )
                part = _checked(manager, step, _read(manager, step, stored, partial_restore=True))
                return jax.tree.map(lambda x, like: x.astype(like.dtype), part, shapes)
        except Exception as error:
            raise _unread(manager, step, error) from error
        raise UserError(_misfit(manager, step, found))


def read_json(directory: pathlib.Path, step: int, item: str) -> Any:
    """One of a checkpoint's JSON items.

    Raises:
      UserError: the checkpoint has no such item, or it is damaged.
    """
    with open_manager(directory) as manager:
        try:
            args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
            value = manager.restore(step, args=args)[item]
            saved = _digests(manager, step).get("items", {}).get(item)
            if saved not in (None, digests.of_json(value)):
                raise ValueError(f"its item {item} is damaged: not what was saved")
            return value
        except Exception as error:
            raise _unread(manager, step, error) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file so that it is either whole or not there.

    Raises:
      StorageError: it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def abstract(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings into what `restore_state` takes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def check_whole(directory: pathlib.Path, step: int) -> None:
    """Raises UserError where a checkpoint is not all there; its numbers are not looked at."""
    read_json(directory, step, "config")
    with open_manager(directory) as manager:
        try:
            if not flatten_names(manager.item_metadata(step)["state"].tree):
                raise ValueError("it has no arrays")
        except Exception as error:
            raise _unread(manager, step, error) from error


# What systems say of disks and connections that may be there again later, and of this process.
PASSING = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES,
    errno.EPERM,
)  # fmt: skip


def _unread(manager: Any, step: int, error: Exception) -> Exception:
    """What to raise where a checkpoint could not be read for some reason."""
    number = re.search(r"os_error_code='?(\d+)", str(error))
    code = int(number[1]) if number else getattr(error, "errno", None)
    if code in PASSING:
        return StorageError(
            f"cannot read checkpoint {manager.directory}/{step}: {_reason(error)}; it need not be "
            "damaged, try again"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(
            f"there is not enough memory for checkpoint {manager.directory}/{step}: "
            f"{_reason(error)}"
        )
    return UserError(_damaged(manager, step, error))


def _damaged(manager: Any, step: int, error: Exception) -> str:
    reason = _reason(error)
    folder = manager.directory
    earlier = [s for s in manager.all_steps() if s < step and (folder / str(s) / "state").is_dir()]
    offer = ""
    if earlier:
        offer = (
            f". The one before, of step {max(earlier)}, is still there: without the folder "
            f"{manager.directory}/{step} the same command goes on from it"
        )
    return f"cannot restore checkpoint {manager.directory}/{step}: {reason}{offer}"
