"""Folders of diffusers' and transformers' models: a config.json and files of tensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.files import check_ordinary
from latent_diffusion_jax.weights import files, shapes
from latent_diffusion_jax.weights.messages import shown

CONFIG_FILE = "config.json"
MAX_ENTRY = 5_000  # characters of an entry of a config.json that is a text or a list
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # the one that is written
DIFFUSERS_FILES = (
    DIFFUSERS_FILE,
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)


def find(folder: pathlib.Path, subfolders: tuple[str, ...]) -> pathlib.Path:
    """The folder of a model: this one, or one of its subfolders where it is a pipeline's.

    Raises:
      UserError: there is no config.json in any.
    """
    for place in (folder, *(folder / name for name in subfolders)):
        if (place / CONFIG_FILE).is_file():
            return place
    raise UserError(
        f"{folder} is no diffusers folder: there is no {CONFIG_FILE} in it, nor in "
        f"{' or '.join(name + '/' for name in subfolders)}"
    )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """What a folder's config.json says.

    Raises:
      UserError: it is missing or damaged, or an entry is far too long to be shown in a message.
    """
    config = read_json(folder / CONFIG_FILE)
    for key, value in config.items():
        if isinstance(value, str | list) and len(json.dumps(value)) > MAX_ENTRY:
            raise UserError(
                f"{folder / CONFIG_FILE} has over {MAX_ENTRY} characters for {shown(key)}"
            )
    return config


def write_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes a folder's config.json, see `write_json`."""
    write_json(folder / CONFIG_FILE, config)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a file of one JSON object, all of it or nothing; makes the folder that it is in.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_tensors(
    folder: pathlib.Path, names: tuple[str, ...] = DIFFUSERS_FILES
) -> tuple[dict[str, np.ndarray], pathlib.Path]:
    """Tensors of a model's folder by name, and the file that they or their places are from.

    Args:
      folder: of the model.
      names: of files, of which the first is taken that is there, or whose index is; large models
        are in several files, `a-00001-of-00002.bin` of `a.bin`, and an index says in which.

    Raises:
      UserError: there are none, or a file is missing or damaged.
    """
    for name in names:
        if (path := folder / name).is_file():
            return files.read(path), path
        for index in (f"{name}.index.json", f"{name.replace('.fp16', '')}.index.fp16.json"):
            if (path := folder / index).is_file():
                return _read_parts(path), path
    raise UserError(f"{folder} has neither {names[0]} nor {names[1]}")


def positive_integer(config: Mapping[str, Any], key: str, where: str) -> int:
    """A config's entry that must be a positive integer; else a UserError that names it."""
    return positive_integers({key: [config[key]]}, key, where)[0]


def positive_integers(config: Mapping[str, Any], key: str, where: str) -> list[int]:
    """A config's entry that must be a list of positive integers, at least one; see `shapes`."""
    values = config[key]
    if (
        not isinstance(values, list | tuple)
        or not values
        or not all(type(value) is int and value > 0 for value in values)
    ):
        raise UserError(f"{where} has {key} {shown(values)}; it must be of positive integers")
    shapes.check_size(key, values, where)
    return list(values)


def _read_parts(index: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of the files that an index names; they lie beside it."""
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(
        isinstance(name, str) and name and pathlib.PurePath(name).name == name for name in names
    ):
        raise UserError(f"{index} has no weight_map from tensors to files beside it")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(names)):
        tensors |= files.read(index.parent / name)
    return tensors


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What a file of one JSON object says.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        check_ordinary(path)
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
