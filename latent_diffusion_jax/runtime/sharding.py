"""Meshes and shardings: parallelism as data, kept out of the models.

A mesh has the axes data, fsdp and tensor. Batches are split over data and fsdp; parameters, their
moving average and the optimizer's moments follow ordered rules on their names.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (pattern searched in a leaf's name, dimension that the tensor axis splits), first match wins.
# Negative dimensions count from the end. Projections into heads split their outputs, projections
# out of them their inputs, so that attention needs one reduction. A GEGLU multiplies two halves of
# its projection, whose weights lie on different devices then (see `context_mesh.pair_halves`).
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


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; neighbours in it are neighbours on the links of TPUs.

    Args:
      sizes: devices of a slice along each of `AXES`, and slices along each, as `dcn_data` and so
        on: what is not there is 1, but for `dcn_data`, which is then all slices. One of each kind
        may be -1 and takes what is left. Devices that are not TPUs in slices are one slice.
      devices: default all.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or of slices.
    """
    if devices is None:  # process by process, where no links say otherwise
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if _is_tpu(device) else 0
        slices.setdefault(index or 0, []).append(device)
    over = {f"dcn_{axis}": sizes.get(f"dcn_{axis}", -1 if axis == "data" else 1) for axis in AXES}
    over_shape = _resolved(over, len(slices), "slices")
    what = "devices" if len(slices) == 1 else "devices of a slice"
    shape = _resolved({axis: sizes[axis] for axis in AXES}, len(devices) // len(slices), what)
    arranged = np.array([_arranged(slices[i], shape) for i in sorted(slices)])
    arranged = arranged.reshape(*over_shape, *shape).transpose(0, 3, 1, 4, 2, 5)
    sides = [a * b for a, b in zip(over_shape, shape, strict=True)]
    return Mesh(arranged.reshape(sides), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _resolved(sizes: Mapping[str, int], count: int, what: str) -> list[int]:
    """Sizes that multiply to `count`, -1 replaced."""
    shape = list(sizes.values())
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh sizes must be positive, at most one -1: {given}")
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        if count % known:
            raise UserError(f"{count} {what} cannot be split into a mesh of {given}")
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        raise UserError(
            f"mesh {given} needs {math.prod(shape)} {what}, {count} are there "
            "(-1 for one axis takes what is left)"
        )
    return shape


def _arranged(devices: list[jax.Device], shape: list[int]) -> np.ndarray:
    """The devices of one slice in the shape of a mesh."""
    if not _is_tpu(devices[0]):
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _is_tpu(device: Any) -> bool:
    return getattr(device, "platform", "") == "tpu"


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
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


def over(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function, called with the mesh in context, which kernels inside it ask for."""

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return call


def own_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a global batch that this process' devices work on, ascending.

    On TPUs they need not follow each other, and where the tensor axis leaves a process, others
    have the same ones.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in filter(None, places) for row in range(batch_size)[part]})


def put_batch(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """This process' rows, those of `own_rows` -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(put, batch)


def gathered(params: Any, dtype: Any) -> Any:
    """Parameters as a network uses them: whole on each device, but for what the tensor axis splits.

    Without this XLA may move activations to where parts of the weights are. Inside a program over
    the mesh in context (`jax.set_mesh`), and nothing where the fsdp axis splits nothing. What is
    gathered is first rounded to the dtype that the network computes in: that halves the bytes.

    Args:
      params: of one network.
      dtype: that it computes in.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def whole(path: Any, leaf: jax.Array) -> jax.Array:
        spec = leaf_spec("/" + path_name(path), leaf.shape, mesh)
        if "fsdp" not in spec:
            return leaf
        return _whole(leaf, dtype, spec)

    return jax.tree_util.tree_map_with_path(whole, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(leaf: jax.Array, dtype: Any, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf.astype(dtype), _without_fsdp(spec))


def _whole_forward(leaf: jax.Array, dtype: Any, spec: P) -> tuple[jax.Array, jax.Array]:
    return _whole(leaf, dtype, spec), leaf[:0]  # which tells the dtype


def _whole_backward(dtype: Any, spec: P, empty: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Sums over the devices and splits at once: each of them gets its part alone."""
    del dtype
    gradient = jax.lax.with_sharding_constraint(gradient, _without_fsdp(spec))
    return (jax.lax.with_sharding_constraint(gradient, spec).astype(empty.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


def _without_fsdp(spec: P) -> P:
    return P(*(axis if axis == "tensor" else None for axis in spec))
