"""Every test runs on 8 virtual CPU devices and offline."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile much and compute little: compiling without optimisation takes a third of the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for `configs` and `tests`

from tests.tpu import tpu_topology  # noqa: E402, F401  # a fixture


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Compiles each program once for all tests and the processes that they start."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers' common one
    folder = str(base / "compile_cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder for TFDS; the digits are prepared there on first use."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def smoke_config(data_dir):
    """The smallest config, on one device's worth of mesh or eight."""
    from configs import txt2img

    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    return config


@pytest.fixture(scope="session")
def trained_workdir(tmp_path_factory, data_dir):
    """A workdir in which both stages of the smoke config are complete."""
    from configs import txt2img
    from latent_diffusion_jax.train import train

    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    workdir = tmp_path_factory.mktemp("trained")
    assert train(config, workdir)
    return workdir
