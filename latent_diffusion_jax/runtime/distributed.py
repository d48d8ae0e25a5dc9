"""Several processes as one program: how they connect, and end together.

Every process runs the same command. They connect before anything else is done with JAX. One that
fails tells the others, which then stop too, instead of waiting for it.
"""

import contextlib
import ctypes
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.runtime.clusters import Cluster
from latent_diffusion_jax.runtime.processes import (
    connection,
    num_processes,
    process_index,
    wait_for_all,
)
from latent_diffusion_jax.runtime.texts import first_line

CONNECT_SECONDS = 300.0  # that processes wait for each other at the start
HEARTBEAT_SECONDS = 60  # without a sign of life after which JAX ends all processes
SILENT_SECONDS = 30.0  # after which the first process does, and says who is silent
ALIVE_SECONDS = 3.0  # between signs of life
WATCH_SECONDS = 0.5  # between looks whether another process has failed
NOT_MET = 75  # status where processes did not meet, or one is lost (EX_TEMPFAIL): try again
LEAVE_SECONDS = 10.0  # that one which has failed waits for the others to notice

# What is said where devices lose those of another process, or processes each other: by whatever
# takes part in it, as errors of many types; and else by JAX, of the way to them.
LOST = re.compile(r"\bgloo\b|\bnccl|\bmegascale|CoordinationService", re.IGNORECASE)
LOST_IF_JAX = re.compile(r"connection|socket|peer|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)

# Keys: the number of a process.
FAILED = "latent_diffusion_jax/failed/"  # values: what it says
ALIVE = "latent_diffusion_jax/alive/"  # values: how often it has said so


def connect(cluster: Cluster) -> None:
    """Connects the processes; the first thing to be done with JAX. Then watches for failures.

    Ends the program with an error: with status `NOT_MET` where they do not all come together in
    time, with 2 where the first process cannot listen at its address.
    """
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    where = f" at {cluster.address}" if cluster.address else ""

    def give_up(why: str, status: int) -> NoReturn:
        _say(why)
        os._exit(status)  # JAX would abort with a dump of its stack, or crash on its way out

    if cluster.address and cluster.process_id == 0:
        try:
            _check_port(cluster.address)
        except OSError as error:
            give_up(f"cannot connect the processes{where}: {error.strerror}", 2)
    late = (
        f"the {cluster.num_processes} processes have not come together{where} within "
        f"{CONNECT_SECONDS:g} s: are all of them running, each with its own --process_id, and can "
        "they reach the first one there?"
    )
    timer = threading.Timer(CONNECT_SECONDS, give_up, [late, NOT_MET])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.num_processes if cluster.address else None,
            cluster.process_id,
            cluster_detection_method="deactivate" if cluster.address else cluster.method,
            initialization_timeout=int(CONNECT_SECONDS) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (OSError, RuntimeError, ValueError) as error:
        give_up(f"cannot connect the processes{where}: {first_line(error)}", 2)
    finally:
        timer.cancel()
    if re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        # JAX gives each task of SLURM one GPU, also where a task has a host to itself.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    _say_when_cut_off(jax_distributed.global_state.coordinator_address)
    _watchers.append(threading.Thread(target=_watch, name="watch", daemon=True))
    _watchers[-1].start()


def _say_when_cut_off(address: str | None) -> None:
    """Lets this process say why it ends when another one is gone, of which JAX makes an abort.

    That is the first one, or for the first one any that was started anew before it was missed.
    """
    host, _, port = (address or "").rpartition(":")

    def lost() -> str:
        if process_index() == 0:
            now, most = time.monotonic(), ALIVE_SECONDS + 4 * WATCH_SECONDS
            silent = [key for key, (_, when) in list(_heard.items()) if now - when > most]
            if not silent:
                return ""
            names = ", ".join(key.removeprefix(ALIVE) for key in silent)
            return f"process {names} of {num_processes()} seems to be lost, or was started anew"
        try:
            socket.create_connection((host, int(port)), 2.0).close()
        except (OSError, ValueError):
            return (
                f"process {process_index()} of {num_processes()} has lost process 0 at {address}, "
                "which was killed, or its host or the way to it is gone"
            )
        return ""

    def say(number: int) -> None:
        if said := lost():
            _say(f"{said}; the same command on all hosts goes on from the last checkpoint")
            os._exit(NOT_MET)
        libc.signal(number, 0)  # something else is wrong

    # Python's own handlers run when the signal is over, which here is too late.
    libc, kind = ctypes.CDLL(None), ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    _handlers.append(kind(say))
    libc.signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))


_handlers: list[Any] = []  # kept alive


def _check_port(address: str) -> None:
    """Raises OSError where others listen at the port, of which JAX now and then crashes."""
    port = address.rpartition(":")[2]
    if port.isdecimal():
        socket.create_server(("", int(port))).close()


def meet(mesh: Mesh | None = None) -> None:
    """Lets the processes' CPU devices make their connections for all axes of a mesh now.

    In the middle of work they give up where one comes 30 s later, having to compile what another
    has from the cache.

    Args:
      mesh: default one axis for all devices.
    """
    if num_processes() == 1 or jax.default_backend() != "cpu":
        return
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), ("all",), devices=jax.devices())
    wait_for_all("meet")
    multihost_utils.sync_global_devices("met")
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, count):
            _sum_over(mesh, group)(np.float32(1.0)).block_until_ready()


def _sum_over(mesh: Mesh, axes: tuple[str, ...]) -> Any:
    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, axes)

    return jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P(), out_specs=P()))


# Ending together.

_leaving = threading.Lock()  # held by the thread that ends this process, to its end
_watchers: list[threading.Thread] = []
_done = threading.Event()
_heard: dict[str, tuple[str, float]] = {}  # of the others, last signs of life and when they came


def finish() -> None:
    """Waits until all processes have come here, so that none takes the others' connection away."""
    if num_processes() > 1:
        wait_for_all("done")
        _leaving.acquire()
        # Python ends threads that are in foreign code on its way out, which aborts the process.
        _done.set()
        for thread in _watchers:
            thread.join(LEAVE_SECONDS)


def fail(message: str, status: int) -> NoReturn:
    """Ends this process, one of several, and with it the others, within seconds.

    What all processes find, the first one says; what one finds, that one says.

    Args:
      message: why.
      status: to exit with.
    """
    _leaving.acquire()  # if the others are why it fails, `_watch` ends it
    client, process = connection(), process_index()
    if process == 0:
        _say(message)
    # The first process is where all others get their messages from; without it they abort.
    with contextlib.suppress(RuntimeError):
        client.key_value_set(f"{FAILED}{process}", json.dumps([message, status]))
    _leave_together()
    if process != 0:
        with contextlib.suppress(RuntimeError):
            if json.loads(client.key_value_try_get(f"{FAILED}0"))[0] == message:
                os._exit(status)
        _say(f"process {process} of {num_processes()}: {message}")
    _exit(status)


def fail_unless_one_is_lost(error: BaseException | None, message: str, status: int) -> NoReturn:
    """`fail` for an error that may be there as another process is gone.

    Devices may notice before `_watch` does, which is then given the time to say who it is.

    Args:
      error: that it began with; None: one of ours.
      message: where no process is gone.
      status: then; `NOT_MET` where the connection between devices is lost nevertheless.
    """
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if LOST.search(str(error)) or (of_jax and LOST_IF_JAX.search(str(error))):
        time.sleep(SILENT_SECONDS + 3 * ALIVE_SECONDS)
        status = NOT_MET
    fail(message, status)


def _watch() -> None:
    """Ends this process when another one has failed, or says nothing any more."""
    client, me = connection(), process_index()
    others = range(1, num_processes())
    _heard.update({f"{ALIVE}{i}": ("", time.monotonic()) for i in others})
    next_sign, failures = 0.0, 0
    for count in itertools.count():
        if _done.wait(WATCH_SECONDS):
            return
        try:
            if time.monotonic() >= next_sign:
                next_sign = time.monotonic() + ALIVE_SECONDS
                client.key_value_set(f"{ALIVE}{me}", str(count), allow_overwrite=True)
            if me == 0:
                _listen(dict(client.key_value_dir_get(ALIVE)))
            failed = client.key_value_dir_get(FAILED)
            failures = 0
        except RuntimeError:  # if the connection is gone for good, JAX makes an end of it
            failures += 1
            if failures > SILENT_SECONDS / WATCH_SECONDS:
                return
            continue
        if not failed:
            continue
        if not _leaving.acquire(blocking=False):  # this process is ending already
            return
        status = 1
        for key, value in failed:
            _, status = json.loads(value)
            if process_index() == 0:
                _say(f"process {key.removeprefix(FAILED)} of {num_processes()} has failed")
        _leave_together()
        _exit(status)


def _listen(signs: dict[str, str]) -> None:
    """Ends all processes where one has been silent for too long, by their signs of life."""
    now = time.monotonic()
    for key, (last, _) in list(_heard.items()):
        if signs.get(key, last) != last:
            _heard[key] = signs[key], now
    silent = [key for key, (_, when) in _heard.items() if now - when > SILENT_SECONDS]
    if silent:
        names = ", ".join(key.removeprefix(ALIVE) for key in silent)
        fail(
            f"process {names} of {num_processes()} has said nothing for {SILENT_SECONDS:g} s: it "
            "was killed or hangs, or its host is gone; the same command on all hosts goes on from "
            "the last checkpoint",
            NOT_MET,
        )


def _leave_together() -> None:
    with contextlib.suppress(RuntimeError):  # too late, or gone
        connection().wait_at_barrier("latent_diffusion_jax/leaving", int(LEAVE_SECONDS * 1000))


def _exit(status: int) -> NoReturn:
    """Ends this process although its devices may wait for others', as ordinary exits would."""
    if process_index() == 0:
        time.sleep(2 * WATCH_SECONDS)  # whoever is still connected would abort
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
        print(f"error: {message}", file=sys.stderr, flush=True)
