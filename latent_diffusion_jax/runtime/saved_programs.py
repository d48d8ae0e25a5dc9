"""Compiled programs in files: compiled on one machine, run on another with the devices for them.

A program is a file with a second one beside it, `.json`, that says what it was compiled from. Like
every program it can do anything, so that only one's own are to be loaded.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from latent_diffusion_jax.runtime.errors import UserError


def save(path: pathlib.Path, lowered: Any, compiled: Any) -> int:
    """Writes a program; gives its bytes.

    Args:
      path: of the file; folders are made.
      lowered: what it was compiled from.
      compiled: it.

    Raises:
      UserError: it cannot be written.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
        path.with_suffix(".json").write_text(json.dumps(_origin(lowered)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return len(payload)


def load(path: pathlib.Path, lowered: Any, devices: Sequence[jax.Device]) -> Any:
    """The program of `save`, ready to be called.

    Args:
      path: of the file.
      lowered: what would be compiled here, for the same arguments.
      devices: to run it on, as many as it was compiled for.

    Raises:
      UserError: it is not there, was compiled from something else or by another version, or is for
        other devices.
    """
    payload = check(path, _origin(lowered))
    tree = jax.tree.structure(lowered.args_info)
    try:
        return serialize_executable.deserialize_and_load(
            payload, tree, lowered.out_tree, devices[0].client, devices
        )
    except Exception as error:  # whatever a damaged one, or the devices' compiler, raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load the compiled program {path}: {reason}") from error


def check(path: pathlib.Path, wanted: dict[str, str] | None = None) -> bytes:
    """The bytes of a program, which may then be loaded.

    Args:
      path: of the file.
      wanted: what it must come from; default this version of JAX, and whatever program.

    Raises:
      UserError: it is not there, or comes from something else.
    """
    try:
        payload, origin = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the compiled program {path}: {error}") from error
    for key, value in (wanted or {"jax": jax.__version__}).items():
        found = origin.get(key) if isinstance(origin, dict) else None
        if found != value:
            other = "version of JAX"
            if key == "program":
                other = "config, mesh or number of devices, of tokens or of labels"
            raise UserError(
                f"{path} was compiled from another {other} than this run's ({key} {found}, here "
                f"{value}); compile it anew with `plan --save`, or leave --compiled away"
            )
    return payload


def _origin(lowered: Any) -> dict[str, str]:
    text = lowered.as_text().encode()
    return {"jax": jax.__version__, "program": hashlib.sha256(text).hexdigest()}
