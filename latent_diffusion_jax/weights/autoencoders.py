"""First stages in and out of the formats of diffusers and of CompVis' code."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import compvis, diffusers, files, folders, mapping, shapes

NETWORKS = {"kl": AutoencoderKL, "vq": AutoencoderVQ}
SUBFOLDERS = ("vae", "vqvae")  # of a pipeline's folder


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A first stage from a file.

    Attributes:
      kind: "kl" or "vq".
      fields: keyword arguments of `AutoencoderKL` or `AutoencoderVQ`.
      params: their parameters, a nested dict of NumPy arrays.
      scaling_factor: what latents are multiplied by for diffusion; None where the file is silent.
    """

    kind: str
    fields: dict[str, Any]
    params: Any
    scaling_factor: float | None


def load(
    path: str | pathlib.Path, num_groups: int | None = None, dtype: DTypeLike = np.float32
) -> Loaded:
    """Reads a first stage.

    Args:
      path: a folder of diffusers (`AutoencoderKL`, `VQModel`, or a pipeline with one of them), or
        a file of CompVis' code (`.safetensors` or `.ckpt`; a first stage or a whole model).
      num_groups: of group normalisation, which CompVis' files do not say; None means 32.
      dtype: of the parameters.

    Raises:
      UserError: there is no first stage at `path`, or one that `AutoencoderKL` and
        `AutoencoderVQ` cannot be, or its tensors are not all there.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _load_diffusers(path, num_groups, dtype)
    return from_compvis(files.read(path, skip=compvis.SKIPPED), str(path), num_groups, dtype)


def save_diffusers(
    folder: str | pathlib.Path,
    kind: str,
    fields: Mapping[str, Any],
    params: Any,
    scaling_factor: float | None,
    image_size: int = 256,
) -> None:
    """Writes a folder that diffusers' `from_pretrained` loads.

    Args:
      folder: is made; files of the same names in it are replaced.
      kind: "kl" for an `AutoencoderKL`, "vq" for a `VQModel`.
      fields: of the network, as in `Loaded`.
      params: of the network.
      scaling_factor: as in `Loaded`; None is written as 1.
      image_size: in pixels, which the config mentions.

    Raises:
      UserError: diffusers has no such network, or the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    config = diffusers.make_config(kind, fields, scaling_factor, image_size)
    table = mapping.expand(diffusers.TABLE, _bindings(fields))
    files.write(folder / folders.DIFFUSERS_FILE, mapping.to_theirs(table, params), {"format": "pt"})
    folders.write_config(folder, config)


def save_compvis(
    path: str | pathlib.Path,
    kind: str,
    fields: Mapping[str, Any],
    params: Any,
    prefix: bool = False,
    scaling_factor: float | None = None,
) -> None:
    """Writes a safetensors file with the names of CompVis' code.

    Args:
      path: of the file, `.safetensors`.
      kind: "kl" or "vq".
      fields: of the network, as in `Loaded`.
      params: of the network.
      prefix: names begin with `first_stage_model.`, as in the checkpoint of a whole model.
      scaling_factor: as in `Loaded`; written with the prefix only, as `scale_factor`.

    Raises:
      UserError: CompVis' code has no such network, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"CompVis weights are written as .safetensors, not to {path}")
    tensors = to_compvis(kind, fields, params)
    if prefix:
        tensors = {compvis.PREFIX + name: tensor for name, tensor in tensors.items()}
        if scaling_factor is not None:
            tensors["scale_factor"] = np.array(scaling_factor, np.float32)
    files.write(path, tensors, {"format": "pt"})


def to_compvis(kind: str, fields: Mapping[str, Any], params: Any) -> dict[str, np.ndarray]:
    """Tensors of CompVis' code by name, without a prefix; arguments as in `Loaded`.

    Raises:
      UserError: CompVis' code has no such network.
    """
    if fields.get("levels"):
        raise UserError(
            "CompVis' code has a codebook; it cannot express finite scalar quantisation"
        )
    if fields["num_groups"] != compvis.NUM_GROUPS:
        raise UserError(
            f"CompVis' code normalises in {compvis.NUM_GROUPS} groups; it cannot express "
            f"num_groups {fields['num_groups']}"
        )
    return mapping.to_theirs(mapping.expand(compvis.TABLE, _bindings(fields)), params)


def _load_diffusers(folder: pathlib.Path, num_groups: int | None, dtype: DTypeLike) -> Loaded:
    folder = folders.find(folder, SUBFOLDERS)
    config_path = folder / folders.CONFIG_FILE
    kind, fields, factor = diffusers.read_config(folders.read_config(folder), str(config_path))
    if num_groups not in (None, fields["num_groups"]):
        raise UserError(
            f"{config_path} has norm_num_groups {fields['num_groups']}, not {num_groups}"
        )
    tensors, path = folders.read_tensors(folder)
    named = diffusers.current_names(tensors)
    params = _to_ours(diffusers.TABLE, named, kind, fields, str(path), dtype)
    return Loaded(kind, fields, params, factor)


def from_compvis(
    tensors: Mapping[str, np.ndarray],
    where: str,
    num_groups: int | None = None,
    dtype: DTypeLike = np.float32,
) -> Loaded:
    """The first stage among the tensors of CompVis' code; `num_groups` and `dtype` as for `load`.

    Raises:
      UserError: there is none, or one that ours cannot be, or its tensors are not all there.
    """
    network = compvis.first_stage(tensors, where)
    kind, fields = compvis.infer(network, num_groups, where)
    params = _to_ours(compvis.TABLE, network, kind, fields, where, dtype)
    factor = tensors.get("scale_factor")
    if factor is None:
        return Loaded(kind, fields, params, None)
    if factor.size != 1 or jnp.issubdtype(factor.dtype, jnp.complexfloating):
        raise UserError(
            f"{where} has a scale_factor of shape {factor.shape} and {factor.dtype}; it must be "
            f"one real number"
        )
    return Loaded(kind, fields, params, diffusers.checked_scale(float(factor.item()), where))


def _to_ours(
    rows: tuple[mapping.Row, ...],
    tensors: Mapping[str, np.ndarray],
    kind: str,
    fields: Mapping[str, Any],
    where: str,
    dtype: DTypeLike,
) -> Any:
    wanted = _shapes(kind, fields, len(tensors), where)
    table = mapping.expand(rows, _bindings(fields))
    return mapping.to_ours(table, tensors, wanted, where, dtype)


def _bindings(fields: Mapping[str, Any]) -> list[dict[str, int]]:
    """Values of the placeholders in the formats' tables."""
    levels = len(fields["channel_multipliers"])
    return [
        {"level": level, "up": levels - 1 - level, "block": block}
        for level in range(levels)
        for block in range(fields["num_res_blocks"] + 1)
    ]


def _shapes(
    kind: str, fields: Mapping[str, Any], tensors: int, where: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters by slash-joined name, if its file may have so many."""
    channels, groups = fields["channels"], fields["num_groups"]
    blocks = len(fields["channel_multipliers"]) * fields["num_res_blocks"]
    shapes.check_network(fields, blocks, tensors, where)
    for width in {channels, *(channels * m for m in fields["channel_multipliers"])}:
        if groups < 1 or width % groups:
            raise UserError(
                f"{where} has layers of {width} channels, which {groups} groups do not divide; "
                f"give the num_groups that it was trained with"
            )
    network = NETWORKS[kind](**fields)
    factor = network.downsampling_factor
    images = jax.ShapeDtypeStruct((1, factor, factor, fields["image_channels"]), jnp.float32)
    return shapes.of(network, f"the first stage of {where}", images)
