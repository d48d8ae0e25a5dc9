"""UNets in and out of the formats of diffusers and of CompVis' code."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import (
    files,
    folders,
    mapping,
    shapes,
    unet_compvis,
    unet_diffusers,
    unet_diffusers_names,
)
from latent_diffusion_jax.weights.diffusers import current_names
from latent_diffusion_jax.weights.unet_common import Description, bindings

SUBFOLDERS = ("unet",)  # of a pipeline's folder


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A UNet from a file.

    Attributes:
      fields: keyword arguments of `UNet`.
      in_channels: of the latents, and of what is concatenated to them.
      params: its parameters, a nested dict of NumPy arrays.
      context_dim: width of the context; None without one.
      linear_projections: the file has the transformers' projections as dense layers.
    """

    fields: dict[str, Any]
    in_channels: int
    params: Any
    context_dim: int | None
    linear_projections: bool


def load(path: str | pathlib.Path, dtype: DTypeLike = np.float32) -> Loaded:
    """Reads a folder of diffusers: `UNet2DConditionModel`, `UNet2DModel`, a pipeline with one.

    Args:
      path: the folder.
      dtype: of the parameters.

    Raises:
      UserError: there is no UNet at `path`, or one that `UNet` cannot be, or its tensors are not
        all there.
    """
    folder = folders.find(pathlib.Path(path).expanduser(), SUBFOLDERS)
    config_path = str(folder / folders.CONFIG_FILE)
    description = unet_diffusers.read_config(folders.read_config(folder), config_path)
    tensors, where = folders.read_tensors(folder)
    network, wanted = _network(description, len(tensors), config_path)
    table = mapping.expand(
        unet_diffusers_names.rows(description.linear_projections), bindings(network)
    )
    params = mapping.to_ours(table, current_names(tensors), wanted, str(where), dtype)
    return _loaded(description, params)


def from_compvis(
    tensors: Mapping[str, np.ndarray],
    where: str,
    num_heads: int | None = None,
    head_dim: int | None = None,
    dtype: DTypeLike = np.float32,
) -> Loaded:
    """The UNet among the tensors of CompVis' code.

    Args:
      tensors: of a whole model, where names begin with `model.diffusion_model.`, or of a UNet.
      where: they come from, for messages.
      num_heads: of each attention. Files do not say it: without it and `head_dim`, what the
        published model with such a context has (see `unet_compvis.infer`).
      head_dim: channels of a head; one of both at most.
      dtype: of the parameters.

    Raises:
      UserError: there is no UNet, or one that `UNet` cannot be, or its tensors are not all there.
    """
    if num_heads and head_dim:
        raise UserError(
            f"num_heads={num_heads} and head_dim={head_dim} for {where}: one of them can be given"
        )
    tensors = unet_compvis.unet(tensors, where)
    description = unet_compvis.infer(tensors, num_heads, head_dim, where)
    network, wanted = _network(description, len(tensors), where)
    table = mapping.expand(unet_compvis.rows(description.linear_projections), bindings(network))
    split = unet_compvis.split_attentions(tensors, network)
    return _loaded(description, mapping.to_ours(table, split, wanted, where, dtype))


def save_diffusers(
    folder: str | pathlib.Path,
    fields: Mapping[str, Any],
    params: Any,
    *,
    sample_size: int = 64,
    linear_projections: bool = False,
) -> None:
    """Writes a folder that diffusers' `from_pretrained` loads.

    Args:
      folder: is made; files of the same names in it are replaced.
      fields: of the network, as in `Loaded`; others have their defaults.
      params: of the network.
      sample_size: height and width of latents, which the config mentions.
      linear_projections: as in `Loaded`; Stable Diffusion 2 has it so.

    Raises:
      UserError: diffusers has no such network, or the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    network, in_channels, context_dim = _described(fields, params)
    config = unet_diffusers.make_config(
        network, in_channels, context_dim, sample_size, linear_projections
    )
    table = mapping.expand(unet_diffusers_names.rows(linear_projections), bindings(network))
    files.write(folder / folders.DIFFUSERS_FILE, mapping.to_theirs(table, params), {"format": "pt"})
    folders.write_config(folder, config)


def to_compvis(
    fields: Mapping[str, Any], params: Any, *, linear_projections: bool = False
) -> dict[str, np.ndarray]:
    """Tensors of CompVis' code by name, without a prefix: the inverse of `from_compvis`.

    Args:
      fields: of the network, as in `Loaded`; others have their defaults.
      params: of the network.
      linear_projections: as in `Loaded`; Stable Diffusion 2 has it so.

    Raises:
      UserError: CompVis' code has no such network.
    """
    network, _, _ = _described(fields, params)
    groups = unet_compvis.NUM_GROUPS
    for field, only in (("num_groups", groups), ("norm_epsilon", 1e-5), ("as_in_ddpm", False)):
        if getattr(network, field) != only:
            raise UserError(
                f"CompVis' code has {field} {only}; it cannot express {getattr(network, field)}"
            )
    table = mapping.expand(unet_compvis.rows(linear_projections), bindings(network))
    return unet_compvis.join_attentions(mapping.to_theirs(table, params), network)


def _loaded(description: Description, params: Any) -> Loaded:
    return Loaded(
        description.fields,
        description.in_channels,
        params,
        description.context_dim,
        description.linear_projections,
    )


def _described(fields: Mapping[str, Any], params: Any) -> tuple[UNet, int, int | None]:
    """A network, and the widths of its input and its context as the parameters have them."""
    network = UNet(**fields)
    with as_user_error("the UNet"):
        network.heads  # noqa: B018  whether they fit
    kernels = flatten_names(params)
    contexts = {
        kernel.shape[0]
        for name, kernel in kernels.items()
        if name.endswith("/attn2/to_k/dense/kernel")
    }
    context_dim = contexts.pop() if len(contexts) == 1 else None
    return network, kernels["conv_in/kernel"].shape[2], context_dim


def _network(
    description: Description, tensors: int, where: str
) -> tuple[UNet, dict[str, tuple[int, ...]]]:
    """The network, and its parameters' shapes by slash-joined name.

    Raises:
      UserError: `UNet` cannot be it, or it is too large for a file of so many tensors.
    """
    network, width = UNet(**description.fields), description.context_dim
    levels, depths = len(network.channel_multipliers), network.transformer_depths
    attending = sum(depths[level] for level in network.attention_levels)
    blocks = network.num_res_blocks * (levels + attending) + depths[-1]  # with the middle's
    sizes = dict(in_channels=description.in_channels, context_dim=width or 0)
    shapes.check_network(description.fields | sizes, blocks, tensors, where)
    side = 2 ** (levels - 1)
    latents = jax.ShapeDtypeStruct((1, side, side, description.in_channels), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)  # of the shape that timesteps have, too
    context = None if width is None else jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    vector = labels if network.num_classes else None
    if network.vector_dim and not network.num_classes:
        vector = jax.ShapeDtypeStruct((1, network.vector_dim), jnp.float32)
    what = f"the UNet of {where}"
    return network, shapes.of(network, what, latents, labels, context, vector)
