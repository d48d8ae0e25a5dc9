"""The mesh in context: what devices a program is for, and how it is split over them.

`jax.set_mesh` puts a mesh in context. Models never see it; what they call may ask here: forms of an
operation that differ from platform to platform, and kernels, which XLA cannot split over devices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
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
