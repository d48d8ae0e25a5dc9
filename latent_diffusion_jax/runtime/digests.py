"""Digests of arrays and of JSON values, by which damage on a disk is seen when they are read.

That of an array is the sum of its numbers' bits, taken as unsigned integers, each times an odd
number that goes by its place, modulo 2^32: whatever happens to one number changes it. It does not
depend on how the array is split over devices.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from latent_diffusion_jax.runtime import processes
from latent_diffusion_jax.runtime.trees import flatten_names

STRIDE = 0x9E3779B2  # even: one more than a multiple of it is odd
CHUNK = 2**20  # numbers that the host looks at together
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes

_programs: dict[Any, Any] = {}  # for shapes, dtypes and shardings


def of_arrays(tree: Any) -> dict[str, int]:
    """The digest of each array, by its name; all processes with a part of them call it."""
    leaves = flatten_names(tree)
    found = {name: _on_host(leaf) for name, leaf in leaves.items() if _is_at_hand(leaf)}
    others = {name: leaf for name, leaf in leaves.items() if name not in found}
    if others:
        found |= _of_parts(others)
    return {name: found[name] for name in leaves}


def _of_parts(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Those of arrays on devices: each device adds up its own part, the hosts add up the sums.

    Devices do not talk to each other: those of CPUs get stuck when hundreds of programs do at once.
    """
    new = {_kind(leaf): leaf for leaf in leaves.values() if _kind(leaf) not in _programs}
    with futures.ThreadPoolExecutor() as pool:
        _programs.update(zip(new, pool.map(_compile, new.values()), strict=True))
    sums = {}
    for name, leaf in leaves.items():
        replicas = {shard.device: shard.replica_id for shard in leaf.addressable_shards}
        parts = _programs[_kind(leaf)](leaf).addressable_shards
        sums[name] = [part.data for part in parts if replicas[part.device] == 0]
    own = {
        name: sum(int(part[0]) for part in parts) for name, parts in jax.device_get(sums).items()
    }
    gathered = processes.gather(np.array([own[name] % 2**32 for name in leaves], np.uint32))
    totals = np.asarray(np.sum(gathered, axis=0, dtype=np.uint64))
    return {name: int(total) % 2**32 for name, total in zip(leaves, totals, strict=True)}


def of_json(value: Any) -> str:
    """The digest of a value that is the same when it comes back from JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_at_hand(leaf: Any) -> bool:
    """Whether the host has it in memory, where nothing needs to be compiled."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())


def _on_host(leaf: Any) -> int:
    values = np.ascontiguousarray(leaf).reshape(-1)
    words = values.view(_UNSIGNED[values.dtype.itemsize])
    total = 0
    for first in range(0, len(words), CHUNK):
        part = words[first : first + CHUNK].astype(np.uint32)
        places = np.arange(first, first + len(part)).astype(np.uint32)
        total += int((part * (places * np.uint32(STRIDE) + np.uint32(1))).sum(dtype=np.uint64))
    return total % 2**32


def _kind(leaf: jax.Array) -> Any:
    return leaf.shape, leaf.dtype, leaf.sharding


def _compile(leaf: jax.Array) -> Any:
    """A program: the array -> the sum of each device's part."""
    sharding, lengths = leaf.sharding, leaf.shape

    def own(x: jax.Array) -> jax.Array:
        starts = [jnp.uint32(0)] * x.ndim
        if isinstance(sharding, NamedSharding):
            for axis, names in enumerate(sharding.spec):
                if names:
                    place = jax.lax.axis_index(names).astype(jnp.uint32)
                    starts[axis] = place * jnp.uint32(x.shape[axis])
        return _on_device(x, starts, lengths)[None]

    function = own
    if isinstance(sharding, NamedSharding):
        function = jax.shard_map(
            own,
            mesh=sharding.mesh,
            in_specs=sharding.spec,
            out_specs=PartitionSpec(sharding.mesh.axis_names),
            check_vma=False,
        )
    like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.jit(function).lower(like).compile()


def _on_device(x: jax.Array, starts: Sequence[jax.Array], lengths: Sequence[int]) -> jax.Array:
    """The sum of a part of an array with these lengths, which begins at these places."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.uint32(0)
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = start + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        places = places * jnp.uint32(length % 2**32) + own
    return jnp.sum(words * (places * jnp.uint32(STRIDE) + jnp.uint32(1)), dtype=jnp.uint32)
