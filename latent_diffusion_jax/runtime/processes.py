"""Several processes: which one this is, and values that they share.

All of them call the functions that wait or compare, in the same order; alone, those do nothing.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from latent_diffusion_jax.runtime.errors import StorageError

WAIT_SECONDS = 30 * 24 * 3600  # that one which is done waits for the others, if they live
STEPS_TO_STOP = 3  # that one which wants to stop may have to make before all of several do


def process_index() -> int:
    """`jax.process_index()`, without starting JAX's backend; 0 before `connect`."""
    return jax_distributed.global_state.process_id


def num_processes() -> int:
    return jax_distributed.global_state.num_processes


def connection() -> Any:
    """JAX's connection to the first process, for messages; None before processes connect."""
    return jax_distributed.global_state.client


_meetings = itertools.count()


def wait_for_all(name: str) -> None:
    """Waits until all processes have come here, however long that takes; devices do not."""
    if num_processes() > 1:
        where = f"latent_diffusion_jax/{name}/{next(_meetings)}"
        connection().wait_at_barrier(where, int(WAIT_SECONDS * 1000))


@contextlib.contextmanager
def first_one_first(name: str) -> Iterator[None]:
    """The others go through the block after the first process, and find what it has written."""
    if process_index() != 0:
        wait_for_all(name)
    yield
    if process_index() == 0:
        wait_for_all(name)


_told = itertools.count()


def from_the_first(name: str, value: str) -> str:
    """What the first process has as `value`, however long it takes to come here with it."""
    if num_processes() == 1:
        return value
    key = f"latent_diffusion_jax/told/{name}/{next(_told)}"
    if process_index() == 0:
        connection().key_value_set(key, value)
        return value
    return str(connection().blocking_key_value_get(key, int(WAIT_SECONDS * 1000)))


def gather(values: np.ndarray) -> np.ndarray:
    """The values of all processes, one row for each."""
    if num_processes() == 1:
        return values[None]
    wait_for_all("compare")  # devices would not wait for long
    return np.asarray(multihost_utils.process_allgather(values))


def agreed(values: Mapping[str, int]) -> None:
    """Checks that all processes have found the same.

    Args:
      values: by what they are, such as steps of checkpoints.

    Raises:
      StorageError: they have not: they see different files, or one sees them late.
    """
    found = gather(np.array(list(values.values()), np.int64))
    for name, of_all in zip(values, found.T, strict=True):
        if len(set(of_all.tolist())) > 1:
            raise StorageError(
                f"the processes do not see the same files: {name} is "
                f"{', '.join(f'{value} in process {i}' for i, value in enumerate(of_all))}; the "
                "workdir must be one folder that all of them see; try again, if that is so"
            )


def highest(value: int) -> int:
    """The highest of the processes' values."""
    return value if num_processes() == 1 else int(np.max(gather(np.array(value))))


def agree_to_stop(what: str, wanted: bool, step: int) -> bool:
    """Whether all processes stop `what` after this step; nobody waits for an answer.

    A process that wants to names the step after the next one. All see it in time: they ask after
    each step, and have the results of the step before then, which need all processes. One of them
    may be a step ahead of another, and name its own first.

    Args:
      what: is stopped, once.
      wanted: by this process.
      step: that was started last.
    """
    client, folder = connection(), f"latent_diffusion_jax/stop/{what}/"
    if wanted:
        with contextlib.suppress(RuntimeError):  # somebody has named one
            client.key_value_set(f"{folder}step", str(step + 2))
    return any(step >= int(value) for _, value in client.key_value_dir_get(folder))


def fetch(array: Any) -> np.ndarray:
    """A whole array on the host, also where its parts are on devices of several processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of values that all processes have to devices of all processes.

    JAX's own gathers the values of all processes first, to see that they are the same.

    Args:
      tree: of arrays.
      shardings: one for all of them, or a tree of the same structure.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put_one(x: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable or (
            isinstance(x, jax.Array) and not x.is_fully_addressable
        ):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put_one, tree, shardings)
