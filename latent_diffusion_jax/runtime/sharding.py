"""Meshes and shardings: parallelism as data, kept out of the models.

A mesh has the axes data, fsdp and tensor. Batches are split over data and fsdp; parameters, their
moving average and the optimizer's moments follow ordered rules on their names.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (pattern searched in a leaf's name, dimension that the tensor axis splits), first match wins.
# Negative dimensions count from the end. Projections into heads split their outputs, projections
# out of them their inputs, so that a block needs one reduction.
TENSOR_RULES = (
    (r"/to_[qkv]/dense/kernel$", -1),
    (r"/to_out/dense/kernel$", -2),
    (r"/ff/proj_in/dense/(kernel|bias)$", -1),
    (r"/ff/proj_out/dense/kernel$", -2),
    (r"/layer_\d+_ff_in/dense/(kernel|bias)$", -1),
    (r"/layer_\d+_ff_out/dense/kernel$", -2),
)

# Smaller leaves are replicated: gathering them costs more than they save.
MIN_FSDP_SIZE = 2**14


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      sizes: devices along each of `AXES`; one may be -1 and takes what is left.
      devices: default all.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh sizes must be positive, at most one -1: {given}")
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        if len(devices) % known:
            raise UserError(f"{len(devices)} devices cannot be split into a mesh of {given}")
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {given} needs {math.prod(shape)} devices, {len(devices)} are there "
            "(-1 for one axis takes what is left)"
        )
    if jax.process_count() > 1 and jax.local_device_count() % shape[-1]:
        raise UserError(
            f"mesh tensor={shape[-1]} must divide the {jax.local_device_count()} devices of a "
            "process: its devices share rows of a batch, which one process reads"
        )
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where a leaf with this name and shape is split; what does not divide is replicated."""
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1:
        for pattern, dim in TENSOR_RULES:
            if re.search(pattern, name):
                if len(shape) >= -dim and shape[dim] % tensor == 0:
                    axes[dim] = "tensor"
                break
    if fsdp > 1 and math.prod(shape) >= MIN_FSDP_SIZE:
        free = [i for i in range(len(shape)) if axes[i] is None and shape[i] % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*axes)


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec("/" + path_name(path), leaf.shape, mesh)),
        shapes,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises UserError, naming the config key, where the mesh does not divide the batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(n) for n in (lower, upper) if n > 0) or str(parts)
        raise UserError(
            f"{key}={batch_size} is not divisible by the mesh's data * fsdp = {parts}; "
            f"{near} would be"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process' rows -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
