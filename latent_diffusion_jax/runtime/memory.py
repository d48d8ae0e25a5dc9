"""How the process keeps memory that was freed."""

import ctypes
import importlib.util
import os

import jax

# Parameters of glibc's mallopt, and their values here.
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NO_MAPPINGS = -4, 0
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def without_accelerators() -> bool:
    """Whether JAX will compute on CPUs, as far as can be told before it is first used."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def keep_freed_memory() -> bool:
    """Keeps freed memory for what is allocated next, however large, where JAX computes on CPUs.

    There a compiled program allocates all its intermediate arrays as one block whenever it runs.
    By default glibc maps a large block anew each time and hands it back afterwards, and the system
    clears every page when it is first touched: a quarter of the time of a small model's train step.

    Only the heap of the main thread can grow as far as it takes, so programs are dispatched from
    there. The process keeps as much memory as it ever needed, so this is for those that do the same
    thing over and over. Call it before JAX is first used.

    Returns:
      Whether it does: not with accelerators, nor with another C library than glibc.
    """
    if not without_accelerators():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    settings = ((_MMAP_MAX, _NO_MAPPINGS), (_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(parameter, value) for parameter, value in settings)
