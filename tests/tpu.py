"""TPUs that programs are compiled for on a machine without them, by libtpu's compiler."""

import functools
import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies

from latent_diffusion_jax.planning.topologies import ENVIRONMENT


@functools.cache
def tpu_devices(name: str) -> list[jax.Device]:
    """The devices of "v5e:2x2", "v5p:2x2x1", "v6e:1x1", ...; skips where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed")
    os.environ.update(ENVIRONMENT)
    jax.jit(lambda: 0)()  # XLA has read its flags by now; libtpu would read them too and end
    os.environ["XLA_FLAGS"] = ""  # the process over one that it does not know
    return topologies.get_topology_desc(name, platform="tpu").devices


@pytest.fixture
def tpu_topology():
    """A function from a topology's name to its devices."""
    return tpu_devices
