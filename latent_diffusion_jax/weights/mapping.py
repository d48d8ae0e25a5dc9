"""Tables between our parameters and the tensors of other programs, used in both directions.

A table is data: rows of (our name, their name, kind), such as
("encoder/down_{level}_downsample", "encoder.down.{level}.downsample.conv", "conv"). `expand` writes
out the placeholders. Which of the rows a network has is decided by its own parameters, so a table
may well list more.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import files
from latent_diffusion_jax.weights.messages import shown

SHOWN = 20  # tensors that an error names of each sort
CHECKED = 1 << 18  # numbers at once, which stay in a processor's cache
ALIGNMENT = 64  # bytes; where an array begins that JAX takes on CPUs as it is, without a copy


class Leaf(NamedTuple):
    """Where one of our parameters is in the other format, and in which layout."""

    name: str
    layout: str


Row = tuple[str, str, "str | Sequence[Row]"]  # a kind, or the rows of a block
Table = Mapping[str, Leaf]  # by our name

# Parameters of a kind of layer: (our name, their name, layout).
KINDS = {
    "conv": (("kernel", "weight", "conv"), ("bias", "bias", "same")),
    "dense": (("dense/kernel", "weight", "dense"), ("dense/bias", "bias", "same")),
    # A dense layer on pixels is a 1x1 convolution; formats differ in which of both they store.
    "dense_as_conv": (("dense/kernel", "weight", "dense_as_conv"), ("dense/bias", "bias", "same")),
    "conv_as_dense": (("kernel", "weight", "conv_as_dense"), ("bias", "bias", "same")),
    "norm": (("scale", "weight", "same"), ("bias", "bias", "same")),
    "same": (("", "", "same"),),
    "per_channel": (("", "", "per_channel"),),
}


def _theirs_same(x: np.ndarray) -> np.ndarray:
    return x


def _theirs_conv(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)  # HWIO -> OIHW


def _theirs_dense(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[-2:]).T  # [in, out] or [1, 1, in, out] -> [out, in]


def _theirs_dense_as_conv(x: np.ndarray) -> np.ndarray:
    return x.T[:, :, None, None]  # [in, out] -> [out, in, 1, 1]


def _theirs_per_channel(x: np.ndarray) -> np.ndarray:
    return x[None, :, None, None]  # [C] -> a 1x1 convolution to one channel


TO_THEIRS = {
    "same": _theirs_same,
    "conv": _theirs_conv,
    "dense": _theirs_dense,
    "dense_as_conv": _theirs_dense_as_conv,
    "conv_as_dense": _theirs_dense,
    "per_channel": _theirs_per_channel,
}


def _to_ours(x: np.ndarray, layout: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """The inverse of `TO_THEIRS`; `shape` is ours. Always a copy, aligned for JAX."""
    if layout == "conv":
        x = x.transpose(2, 3, 1, 0)
    elif layout in ("dense", "dense_as_conv", "conv_as_dense"):
        x = x.reshape(x.shape[:2]).T
    dtype = np.dtype(dtype)
    buffer = np.empty(x.size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[start : start + x.size * dtype.itemsize].view(dtype).reshape(x.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # `all_finite` tells
        copy[...] = x
    return copy.reshape(shape)


def all_finite(x: np.ndarray) -> bool:
    """Whether all numbers are finite; takes no memory to speak of, and no more time than a copy."""
    numbers = x.reshape(-1)
    return all(
        np.isfinite(numbers[start : start + CHECKED]).all()
        for start in range(0, numbers.size, CHECKED)
    )


def expand(rows: Iterable[Row], bindings: Sequence[Mapping[str, int]] = ({},)) -> Table:
    """Rows written out for each of the placeholders' bindings, by our parameters' names."""
    table: dict[str, Leaf] = {}

    def add(ours: str, theirs: str, kind: str | Sequence[Row]) -> None:
        if not isinstance(kind, str):
            for inner, outer, inner_kind in kind:
                add(f"{ours}/{inner}", f"{theirs}.{outer}", inner_kind)
            return
        for leaf, tensor, layout in KINDS[kind]:
            for binding in bindings:
                name = "/".join(filter(None, (ours, leaf))).format(**binding)
                table[name] = Leaf(
                    ".".join(filter(None, (theirs, tensor))).format(**binding), layout
                )

    for row in rows:
        add(*row)
    return table


def to_ours(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    wanted_shapes: Mapping[str, tuple[int, ...]],
    where: str,
    dtype: DTypeLike = np.float32,
) -> Any:
    """Our nested dict of parameters, from the other format's tensors.

    A dense layer is taken both as a matrix and as a 1x1 convolution. Tensors are looked at one
    after another, once all are known to fit; of a file, no more than one is in memory beside ours.

    Args:
      table: for these parameters.
      tensors: by the other format's names.
      wanted_shapes: shapes of our parameters by slash-joined name.
      where: the tensors come from, for the message.
      dtype: of our parameters.

    Raises:
      UserError: tensors are missing, too many, misshapen, or not finite and of floating point; all
        are named.
    """
    missing, misshapen = [], []
    known = set()
    for name, shape in wanted_shapes.items():
        theirs, layout = table[name]
        known.add(theirs)
        expected = TO_THEIRS[layout](np.broadcast_to(np.float32(0), shape)).shape
        if theirs not in tensors:
            missing.append(f"{shown(theirs)} {expected}")
            continue
        tensor = tensors[theirs]
        shapes = {expected}
        if "dense" in layout:
            shapes |= {expected[:2], (*expected[:2], 1, 1)}
        if tensor.shape not in shapes:
            misshapen.append(f"{shown(theirs)} {tensor.shape}, expected {expected}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            misshapen.append(f"{shown(theirs)} of {tensor.dtype}, expected floating point")
    extra = [
        f"{shown(name)} {tensor.shape}" for name, tensor in tensors.items() if name not in known
    ]
    problems = [
        f"{len(found)} {sort}: {_listed(found)}"
        for sort, found in (("missing", missing), ("misshapen", misshapen), ("extra", extra))
        if found
    ]
    if problems:
        raise UserError(f"the tensors of {where} do not fit the network; {'; '.join(problems)}")
    params, broken = {}, []
    for name, shape in wanted_shapes.items():
        theirs, layout = table[name]
        params[name] = _to_ours(tensors[theirs], layout, shape, dtype)
        if not all_finite(params[name]):
            broken.append(shown(theirs))
        files.release(tensors[theirs])
    if broken:
        raise UserError(
            f"{where} has tensors with NaN, infinity or what {np.dtype(dtype)} cannot hold: it is "
            f"damaged, or its training diverged; {len(broken)} of them: {_listed(broken)}"
        )
    return _nested(params)


def to_theirs(table: Table, params: Any) -> dict[str, np.ndarray]:
    """The other format's tensors by name, float32, from our nested dict of parameters."""
    return {
        table[name].name: np.asarray(
            TO_THEIRS[table[name].layout](np.asarray(leaf, np.float32)), order="C"
        )
        for name, leaf in flatten_names(params).items()
    }


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
