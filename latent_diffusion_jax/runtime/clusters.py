"""The processes that a command is one of, as flags, variables or a cluster's manager say.

Variables are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Managers are Cloud TPU,
SLURM and MPI. A lone machine has none of them.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
from absl import flags
from jax._src.clusters import ClusterEnv

from latent_diffusion_jax.runtime.errors import UserError

FLAG_NAMES = ("coordinator_address", "num_processes", "process_id")
# What JAX finds by itself; on Kubernetes it would also find jobs that are of one process each.
CLUSTERS = ("ompi", "slurm", "gketpu", "gcetpu")


class Cluster(NamedTuple):
    """Where the processes of this program are.

    Attributes:
      num_processes: how many.
      address: HOST:PORT of the first one; None where JAX finds all of it by itself.
      process_id: of this one; None too.
      method: by which JAX finds it, where it has to be told.
    """

    num_processes: int
    address: str | None = None
    process_id: int | None = None
    method: str | None = None


def define_flags() -> None:
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT at which the first of several processes can be "
        "reached; default $JAX_COORDINATOR_ADDRESS.",
    )  # fmt: skip
    flags.DEFINE_integer("num_processes", None, "How many; default $JAX_NUM_PROCESSES.")
    flags.DEFINE_integer("process_id", None, "Which this one is; default $JAX_PROCESS_ID.")


def flag_values() -> tuple[str | None, int | None, int | None]:
    """The flags, or the environment's variables in their place.

    Raises:
      UserError: a variable is no number.
    """
    values: list[Any] = []
    for name in FLAG_NAMES:
        value, variable = flags.FLAGS[name].value, f"JAX_{name.upper()}"
        if value is None and (text := os.environ.get(variable)):
            if name != "coordinator_address" and not text.isdecimal():
                raise UserError(f"{variable}={text!r} is no number")
            value = text if name == "coordinator_address" else int(text)
        values.append(value)
    return values[0], values[1], values[2]


def find(address: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    """The processes that this one belongs to; None where it is alone.

    Args:
      address: HOST:PORT of the first one.
      num_processes: how many there are.
      process_id: of this one. All three are given, or none, and then they are looked for.

    Raises:
      UserError: they do not go together, or there are others that cannot be found.
    """
    given = dict(zip(FLAG_NAMES, (address, num_processes, process_id), strict=True))
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _detect()
    if missing:
        raise UserError(
            "several processes need all of --coordinator_address=HOST:PORT, --num_processes=N and "
            f"--process_id=I (or JAX_COORDINATOR_ADDRESS and so on); --{missing[0]} is missing"
        )
    assert address is not None and num_processes is not None and process_id is not None
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id={process_id} is not one of the {num_processes} processes, "
            f"0 to {num_processes - 1}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"coordinator_address={address!r} is not HOST:PORT")
    return Cluster(num_processes, address, process_id) if num_processes > 1 else None


def _detect() -> Cluster | None:
    """The processes that a cluster's manager has started, by what it says in the environment."""
    kinds = [env for env in ClusterEnv._cluster_types if env.name in CLUSTERS]
    if found := next((env for env in kinds if _is_present(env)), None):
        count = _count(found)
        return Cluster(count) if count > 1 else None
    started = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)
    if started == 1:
        return None
    if importlib.util.find_spec("mpi4py") is not None:
        return Cluster(started, method="mpi4py")
    raise UserError(
        f"MPI has started {started} processes, but this version of it does not say where the "
        "first one is: install mpi4py, or give --coordinator_address, --num_processes and "
        "--process_id"
    )


def _is_present(env: Any) -> bool:
    if env.name.endswith("tpu") and "tpu" not in (jax.config.values["jax_platforms"] or "tpu"):
        return False
    # The shell of an allocation is one task, however many the allocation is for.
    if env.name == "slurm" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return False
    try:
        return env.is_env_present()
    except OSError:  # chips that are not in Google's cloud: there is nobody to ask
        return False


def _count(env: Any) -> int:
    """How many processes a cluster's manager has started."""
    try:
        return env.get_process_count()
    except OSError as error:  # as above
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
        if hosts == 1:
            return 1
        raise UserError(
            f"TPU_WORKER_HOSTNAMES names {hosts} hosts, and nobody says of how many slices; set "
            "MEGASCALE_NUM_SLICES (1, mostly)"
        ) from error
