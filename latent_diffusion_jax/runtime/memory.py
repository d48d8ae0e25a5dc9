"""How the process keeps memory that was freed."""

import ctypes
import importlib.util
import os

# Parameters of glibc's mallopt, and their values here.
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NO_MAPPINGS = -4, 0
_ARENA_MAX, _ONE_ARENA = -8, 1
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def without_accelerators() -> bool:
    """Whether JAX will compute on CPUs, as far as can be told before it is first used."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def keep_freed_memory() -> bool:
    """Keeps freed memory for what is allocated next, however large; False where that cannot be.

    On CPUs a compiled program allocates all its intermediate arrays as one block whenever it runs.
    By default glibc maps a large block anew each time and hands it back afterwards, and the system
    clears every page when it is first touched: a quarter of the time of a small model's train step.

    The process keeps as much memory as it ever needed, so this is for programs that do the same
    thing over and over. It holds for threads that have not allocated anything yet: call it before
    JAX is first used. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Threads share one arena, which can grow beyond the 64 MiB of the others.
    settings = ((_ARENA_MAX, _ONE_ARENA), (_MMAP_MAX, _NO_MAPPINGS), (_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(parameter, value) for parameter, value in settings)
