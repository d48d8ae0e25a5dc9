"""How the processes that a command is one of are found."""

import os

import jax
import pytest

from latent_diffusion_jax.runtime import clusters
from latent_diffusion_jax.runtime.clusters import Cluster
from latent_diffusion_jax.runtime.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after those of clusters are gone."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)

    def change(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


def test_all_three_flags_say_where_the_processes_are():
    found = clusters.find("10.0.0.1:1234", 2, 1)
    assert found == Cluster(2, "10.0.0.1:1234", 1)
    assert clusters.find("[::1]:1234", 2, 0) == Cluster(2, "[::1]:1234", 0)


def test_one_process_is_alone():
    assert clusters.find("10.0.0.1:1234", 1, 0) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, 2, 0), "--coordinator_address is missing"),
        (("host:1", None, 0), "--num_processes is missing"),
        (("host:1", 2, None), "--process_id is missing"),
        ((None, None, 0), "--coordinator_address is missing"),
        (("host:1", 2, 2), r"process_id=2 is not one of the 2 processes, 0 to 1"),
        (("host:1", 2, -1), "process_id=-1"),
        (("host:1", 0, 0), "num_processes=0 must be at least 1"),
        (("host", 2, 0), "'host' is not HOST:PORT"),
        ((":1", 2, 0), "':1' is not HOST:PORT"),
        (("host:port", 2, 0), "not HOST:PORT"),
        (("host:70000", 2, 0), "not HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together(given, said):
    with pytest.raises(UserError, match=said):
        clusters.find(*given)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="nothing"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1"}, id="one task of SLURM"),
        pytest.param(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, id="the shell of an allocation"),
        pytest.param({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}, id="a batch script"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, id="one process of Open MPI"),
        pytest.param({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, id="no TPU"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, id="a pod"),
    ],
)
def test_a_lone_machine_is_alone(environment, variables):
    environment(variables)
    assert clusters.find(None, None, None) is None


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        pytest.param(SLURM, 2, id="SLURM"),
        pytest.param(OPEN_MPI, 4, id="Open MPI"),
    ],
)
def test_clusters_are_found(environment, variables, count):
    environment(variables)
    assert clusters.find(None, None, None) == Cluster(count)


def test_a_pod_of_tpus_is_found_unless_it_is_not_used(environment, monkeypatch):
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}
    environment(hosts | {"TPU_SKIP_MDS_QUERY": "1"})  # as on GKE
    from jax._src.clusters import cloud_tpu_cluster

    def unreachable(key):
        raise ConnectionError

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    assert clusters.find(None, None, None) is None  # JAX_PLATFORMS=cpu
    jax.devices()  # whatever is said from here on, this process keeps its backend
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        with pytest.raises(UserError, match=r"4 hosts.*MEGASCALE_NUM_SLICES"):
            clusters.find(None, None, None)
        environment({"MEGASCALE_NUM_SLICES": "2"})
        assert clusters.find(None, None, None) == Cluster(8)
        environment({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": ""})
        assert clusters.find(None, None, None) is None  # a single host
        monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
        assert clusters.find(None, None, None) is None  # not in Google's cloud
    finally:
        jax.config.update("jax_platforms", platforms)


def test_mpi_that_does_not_say_where_is_no_reason_to_do_all_twice(environment, monkeypatch):
    environment({"PMI_SIZE": "3", "PMI_RANK": "0"})
    found = {"mpi4py": object()}
    monkeypatch.setattr(clusters.importlib.util, "find_spec", found.get)
    assert clusters.find(None, None, None) == Cluster(3, method="mpi4py")
    found.clear()
    with pytest.raises(UserError, match=r"MPI has started 3 processes.*mpi4py"):
        clusters.find(None, None, None)
