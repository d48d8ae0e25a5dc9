"""runtime.memory: freed memory is used again, and other C libraries are left as they are."""

import ctypes
import importlib.util
import mmap
import platform
import subprocess
import sys

import pytest

from latent_diffusion_jax.runtime import memory

# Pages that a thread touches for the first time, in blocks that are allocated one after the other.
COUNT = """
import resource, sys, threading
from latent_diffusion_jax.runtime.memory import keep_freed_memory

def allocate():
    for _ in range(4):
        b"x" * 2**26

if sys.argv[1] == "keep":
    assert keep_freed_memory()
counts = []
for _ in range(2):
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[1] - counts[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again():
    def touched(choice: str) -> int:
        command = [sys.executable, "-c", COUNT, choice]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 4 * 2**26 // mmap.PAGESIZE
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
