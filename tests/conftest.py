"""Every test runs on 8 virtual CPU devices and offline."""

import fcntl
import gc
import os
import pathlib
import resource
import shutil
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile much and compute little: compiling without optimisation takes a third of the time,
# and of that the older way of emitting fusions half.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

gc.set_threshold(50_000, 20, 20)  # as commands have it
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for `configs` and `tests`

from tests.tpu import tpu_topology  # noqa: E402, F401  # a fixture

# Those that take longest are begun with, so that no worker is left with one at the end.
LONGEST = (
    "test_distributed.py", "test_train.py", "test_programs.py", "test_diffusion_stage.py",
    "test_costs.py", "test_configs.py", "test_pipelines.py", "test_sample.py", "test_saving.py",
    "test_conditionings.py", "test_encode.py", "test_evaluate_first_stage.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def common_dir(tmp_path_factory):
    """A folder that all workers of the session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compile_cache(common_dir):
    """Compiles each program once for all tests and the processes that they start."""
    folder = str(common_dir / "compile_cache")
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
def trained_workdir(tmp_path_factory, common_dir, data_dir):
    """A workdir in which both stages of the smoke config are complete; a copy for each worker."""
    from configs import txt2img
    from latent_diffusion_jax.train import train

    common = common_dir / "trained"
    with (common_dir / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker trains
        if not common.exists():
            config = txt2img.get_config("smoke")
            config.data.data_dir = data_dir
            unfinished = tmp_path_factory.mktemp("trained")
            assert train(config, unfinished)
            shutil.copytree(unfinished, common)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(common, workdir)
    return workdir


@pytest.fixture
def small_files():
    """A function that lets no file of this process grow beyond some bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
