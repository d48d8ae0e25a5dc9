"""Digests of arrays and of JSON values, by which damage on a disk is seen when they are read.

That of an array is the sum of its numbers' bits, taken as unsigned integers, each times an odd
number that goes by its place, modulo 2^32: whatever happens to one number changes it. It does not
depend on how the array is split over devices.
"""

import hashlib
import json
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    new = {_kind(leaf): leaf for leaf in others.values() if _kind(leaf) not in _programs}
    with futures.ThreadPoolExecutor() as pool:
        _programs.update(zip(new, pool.map(_compile, new.values()), strict=True))
    started = {name: _programs[_kind(leaf)](leaf) for name, leaf in others.items()}
    found |= {name: int(value) for name, value in jax.device_get(started).items()}
    return {name: found[name] for name in leaves}


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
    like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return jax.jit(_on_devices).lower(like).compile()


def _on_devices(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.uint32(0)
    for axis, length in enumerate(x.shape):
        own = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        places = places * jnp.uint32(length % 2**32) + own
    return jnp.sum(words * (places * jnp.uint32(STRIDE) + jnp.uint32(1)), dtype=jnp.uint32)
