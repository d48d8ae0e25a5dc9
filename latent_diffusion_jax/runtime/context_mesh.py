"""The mesh in context: what devices a program is for, and how it is split over them.

`jax.set_mesh` puts a mesh in context. Models are given none; they and what they call may ask here:
for the form of an operation, which differs from platform to platform, for a kernel's part, which
XLA cannot split over devices, and for the order of weights, whose halves go together.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime.sharding import AXES

BATCH_AXES, HEADS_AXES = AXES[:2], AXES[2:]


def platform() -> str | None:
    """Of the mesh in context: "cpu", "tpu" or "cuda"; None without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    return "cuda" if device.platform == "gpu" else device.platform


def by_platform(*arguments: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent` that traces one form alone where the mesh says which.

    Every form is differentiated otherwise: for Stable Diffusion that takes longer than all else.
    """
    known = platform()
    if known is None:
        return jax.lax.platform_dependent(*arguments, default=default, **forms)
    return forms.get(known, default)(*arguments)


def _sizes() -> dict[str, int]:
    """Sizes of the axes in context that XLA splits arrays over: none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.auto_axes}


def _dividing(names: tuple[str, ...], length: int) -> tuple[str, ...]:
    """Those axes that are in context; () where they do not divide the length together."""
    sizes = _sizes()
    names = tuple(name for name in names if name in sizes)
    return () if length % math.prod(sizes[name] for name in names) else names


def rows_of_device(batch: int) -> int:
    """How many rows of a batch each device has."""
    sizes = _sizes()
    return batch // math.prod(sizes[name] for name in _dividing(BATCH_AXES, batch))


def split_over_mesh(
    attention: Callable[..., jax.Array], batch: int, heads: int
) -> Callable[..., jax.Array]:
    """A function of arrays [B, N, heads, d], called by each device with its part of them.

    The batch is split over data and fsdp, the heads over tensor. What does not divide is not split:
    those devices all do the same. Without a mesh in context it is the function itself.
    """
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return attention
    spec = P(_dividing(BATCH_AXES, batch) or None, None, _dividing(HEADS_AXES, heads) or None)
    return jax.shard_map(
        attention,
        in_specs=spec,
        out_specs=spec,
        axis_names=set(sizes),
        check_vma=False,  # Pallas' kernels do not say over which axes their results differ
    )


def gated_parts(width: int) -> int:
    """Into how many parts the tensor axis splits each half of a gated layer's outputs.

    Args:
      width: of a half.

    Returns:
      1 without a mesh in context, and where the parts would not be alike.
    """
    (axis,) = HEADS_AXES
    parts = _sizes().get(axis, 1)
    return parts if parts % 2 == 0 and width % parts == 0 else 1


def pair_halves(x: jax.Array) -> jax.Array:
    """The values of two halves in the order in which devices need them to multiply the halves.

    Split over the tensor axis, the first half of a gated layer's weights is on other devices than
    the second. What comes from here is split as before, and each device has the parts of both that
    belong together.

    Args:
      x: [.., 2 * width], `gated_parts(width)` = n > 1.

    Returns:
      [.., 2 * width]: part 0 of the first half, part 0 of the second, part 1 of the first, and so
      on to part n - 1.
    """
    (axis,) = HEADS_AXES
    parts = _sizes()[axis]
    lower, upper = range(parts // 2), range(parts // 2, parts)
    # Device i has parts 2i and 2i + 1 of all 2n, and needs i and n + i. In each round all devices
    # send and receive one: those of even number first what is of the first half. Of two devices
    # each keeps the first.
    first_round = [(i, 2 * i) for i in lower] + [(i, 2 * i + 1 - parts) for i in upper]
    second_round = [(i, 2 * i + 1) for i in lower] + [(i, 2 * i - parts) for i in upper]

    def exchanged(own: jax.Array, index: jax.Array) -> jax.Array:
        in_order = index < parts // 2
        even, odd = jnp.split(own, 2, axis=-1)
        one = jnp.where(in_order, even, odd)
        if parts > 2:
            one = jax.lax.ppermute(one, axis, first_round)
        two = jax.lax.ppermute(jnp.where(in_order, odd, even), axis, second_round)
        is_even = index % 2 == 0
        return jnp.concatenate(
            [jnp.where(is_even, one, two), jnp.where(is_even, two, one)], axis=-1
        )

    spec = P(*(None,) * (x.ndim - 1), axis)
    exchange = jax.shard_map(exchanged, in_specs=(spec, P(axis)), out_specs=spec, axis_names={axis})
    # Devices cannot ask for their own place where XLA splits the other axes.
    return exchange(x, jnp.arange(parts))
