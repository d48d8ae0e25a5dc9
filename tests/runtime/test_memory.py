"""runtime.memory: freed memory is used again, and other C libraries are left as they are."""

import ctypes
import importlib.util
import mmap
import os
import platform
import subprocess
import sys

import pytest

from latent_diffusion_jax.runtime import memory

# Whether memory is kept, and the fewest pages that one of several runs of a program touches for the
# first time.
COUNT = """
import resource, sys
import jax
from latent_diffusion_jax.runtime.memory import keep_freed_memory

kept = sys.argv[1] == "keep" and keep_freed_memory()

def touched():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

@jax.jit
def run(x):
    for _ in range(3):
        x = jax.lax.optimization_barrier(jax.numpy.sin(x))
    return x.sum()

x = jax.numpy.ones(2**24)
counts = []
for _ in range(8):
    before = touched()
    run(x).block_until_ready()
    counts.append(touched() - before)
print(int(kept), min(counts))
"""


def test_freed_memory_is_used_again():
    def run(choice: str) -> tuple[bool, int]:
        command = [sys.executable, "-c", COUNT, choice]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        kept, pages = map(int, done.stdout.split())
        return bool(kept), pages

    array = 2**26 // mmap.PAGESIZE  # pages of one intermediate array
    (kept, pages), (_, by_default) = run("keep"), run("default")
    assert kept == (platform.libc_ver()[0] == "glibc")
    assert not kept or pages < 0.1 * array < by_default


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [("cpu", True, True), ("", False, True), ("", True, False), ("tpu,cpu", False, False)],
)
def test_accelerators_are_looked_for(monkeypatch, platforms, installed, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    assert memory.without_accelerators() == expected


def test_accelerators_need_no_kept_memory(monkeypatch):
    monkeypatch.setattr(memory, "without_accelerators", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was opened"))
    assert not memory.keep_freed_memory()


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory, "without_accelerators", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
