"""runtime.memory: freed memory is used again, and other C libraries are left as they are."""

import ctypes
import importlib.util
import mmap
import platform
import subprocess
import sys

import pytest

from latent_diffusion_jax.runtime import memory

# Pages that are touched for the first time while a program runs again and again.
COUNT = """
import resource, sys
import jax
from latent_diffusion_jax.runtime.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

@jax.jit
def run(x):
    for _ in range(3):
        x = jax.lax.optimization_barrier(jax.numpy.sin(x))
    return x.sum()

x = jax.numpy.ones(2**24)
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again():
    def touched(choice: str) -> int:
        command = [sys.executable, "-c", COUNT, choice]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 4 * 2**26 // mmap.PAGESIZE  # of one intermediate array in each of the runs
    assert touched("keep") < 0.1 * pages < touched("default")


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [("cpu", True, True), ("", False, True), ("", True, False), ("tpu,cpu", False, False)],
)
def test_accelerators_are_looked_for(monkeypatch, platforms, installed, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    assert memory.without_accelerators() == expected


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
