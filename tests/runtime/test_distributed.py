"""Several processes: that none waits for one that has failed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from latent_diffusion_jax.runtime import checkpoints, distributed, processes
from tests import launcher

ROOT = pathlib.Path(__file__).parents[2]

# Alone.


def test_alone_nothing_is_shared():
    processes.wait_for_all("x")
    with processes.first_one_first("x"):
        pass
    assert processes.highest(7) == 7 and processes.highest(True) is True
    assert (processes.process_index(), processes.num_processes()) == (0, 1)
    tree = {"a": np.arange(8.0, dtype=np.float32), "b": jax.numpy.ones((8, 2), jax.numpy.bfloat16)}
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    for shardings in (split, {"a": split, "b": split}):
        found = processes.put(tree, shardings)
        assert all(leaf.sharding == split for leaf in found.values())
        for name, leaf in tree.items():
            np.testing.assert_array_equal(processes.fetch(found[name]), np.asarray(leaf))
            assert found[name].dtype == leaf.dtype


# Together: a program for each process, run by the commands' `run`.

PROGRAM = """
import os, signal, sys, time
import jax
import numpy as np
from latent_diffusion_jax.runtime import commands, distributed, processes
from latent_diffusion_jax.runtime.errors import UserError

me = int(os.environ["JAX_PROCESS_ID"])
{before}

def main():
    processes.wait_for_all("start")
    {main}

commands.run(main)
"""
# Waits for the other process, which does not come.
WAIT = "processes.wait_for_all('end')"


def start(main: str, before: str = "", processes=(0, 1), **variables: str):
    """The processes with these numbers, of two."""
    address = f"127.0.0.1:{launcher.load().free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(main=main, before=before)],
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            }
            | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in processes
    ]


def ends(processes, timeout=120.0):
    """(status, lines of errors) of each."""
    outcomes = []
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        outcomes.append((process.returncode, errors.splitlines()))
    return outcomes


def run(main: str, before: str = "", **variables: str):
    return ends(start(main, before, **variables))


def test_processes_share_values():
    main = """
    assert (jax.process_count(), jax.device_count(), processes.process_index()) == (2, 4, me)
    assert processes.highest(me * 3) == 3
    mesh = jax.make_mesh((4,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    values = np.arange(8.0, dtype=np.float32)
    array = processes.put({"a": values}, split)["a"]
    assert not array.is_fully_addressable
    np.testing.assert_array_equal(array.addressable_shards[0].data, values[4 * me : 4 * me + 2])
    np.testing.assert_array_equal(processes.fetch(array), values)
    np.testing.assert_array_equal(processes.fetch(array.sum()), 28)
    with processes.first_one_first("x"):
        print("in", me, file=sys.stderr)
"""
    assert run(main) == [(0, ["in 0"]), (0, ["in 1"])]


def test_processes_that_see_other_files_say_so():
    main = """
    processes.agreed({"the last checkpoint of a": 7, "of b": 3})
    try:
        processes.agreed({"the last checkpoint of a": 7, "the last checkpoint of b": 3 + me})
    except processes.StorageError as error:
        print(error, file=sys.stderr)
"""
    for status, (said,) in run(main):
        assert status == 0
        assert "the last checkpoint of b is 3 in process 0, 4 in process 1; the workdir" in said


def test_a_workdir_that_the_processes_do_not_share_is_found_at_the_start(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
    main = f"""
    import pathlib
    from latent_diffusion_jax.runtime import locks
    locks.SEEN_SECONDS = 2.0
    root = pathlib.Path({str(tmp_path)!r})
    with locks.claimed(root) as check:
        check()
    with locks.claimed(root / str(me)):
        pass
"""
    (status, said), (other_status, said_by_other) = run(main)
    assert (status, other_status) == (74, 74)
    assert said == ["error: process 1 of 2 has failed"]
    (line,) = said_by_other
    assert line.startswith("error: process 1 of 2: ") and "must be one that all processes" in line


def test_no_thread_talks_to_the_others_while_python_ends():
    """It would be ended in the middle, and take the process with it."""
    before = """
import atexit, threading
names = lambda: sorted(thread.name for thread in threading.enumerate())
atexit.register(lambda: print("watch" in names(), file=sys.stderr))
"""
    main = "print('watch' in names(), file=sys.stderr)"
    assert run(main, before) == [(0, ["True", "False"])] * 2


def test_all_stop_after_the_same_step():
    main = """
    for step in range(4, 100):
        processes.wait_for_all("step")
        wanted = step >= (8 if me else 12)
        if processes.agree_to_stop("x", wanted, step):
            break
    print(step, processes.agree_to_stop("y", False, 99), file=sys.stderr)
"""
    assert run(main) == [(0, ["10 False"])] * 2


@pytest.mark.parametrize("told", ["True", "me == 0", "me == 1"])
def test_no_process_outlives_the_grace_of_those_that_a_signal_reached(told):
    main = f"""
    with commands.StopRequest(grace_seconds=2.0):
        if {told}:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)  # it saves
"""
    start = time.monotonic()
    (status, said), (other_status, said_by_other) = run(main)
    assert (status, other_status) == (74, 74)
    (line,) = [line for line in said + said_by_other if "not saved within the 2 s" in line]
    assert line.startswith("error: process 1 of 2: not" if told == "me == 1" else "error: not")
    assert time.monotonic() - start < 60


def test_an_error_of_one_process_ends_the_others():
    outcomes = run(f"if me == 1: raise UserError('only here')\n    {WAIT}")
    assert outcomes == [
        (2, ["error: process 1 of 2 has failed"]),
        (2, ["error: process 1 of 2: only here"]),
    ]


def test_an_error_of_the_first_process_ends_the_others():
    outcomes = run(f"if me == 0: raise UserError('only here')\n    {WAIT}")
    assert outcomes == [(2, ["error: only here"]), (2, [])]


def test_an_error_of_one_ends_those_that_are_done():
    outcomes = run("if me == 0:\n        time.sleep(2)\n        raise UserError('late')")
    assert outcomes == [(2, ["error: late"]), (2, [])]


def test_an_error_of_all_is_said_once():
    (status, errors), (other_status, other_errors) = run("raise UserError('everywhere')")
    assert status == other_status == 2
    assert errors == ["error: everywhere"] and other_errors == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_ends_all_with_its_reason(failing, tmp_path):
    main = f"""
    import pathlib, resource
    from latent_diffusion_jax.runtime import checkpoints
    mesh = jax.make_mesh((4,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    state = processes.put(dict(a=np.random.default_rng(0).normal(size=2**20)), split)
    with checkpoints.open_manager(pathlib.Path({str(tmp_path)!r}), create=True) as manager:
        for step in range(1, 4):
            if step == 2 and me == {failing}:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))
            checkpoints.save(manager, step, state, {{}})
            end = time.monotonic() + 60
            while not checkpoints.is_whole(manager):
                assert time.monotonic() < end, "nobody hears of it"
                time.sleep(0.05)
"""
    begin = time.monotonic()
    outcomes = run(main)
    assert time.monotonic() - begin < 60
    assert [status for status, _ in outcomes] == [74, 74]
    said = [line for _, lines in outcomes for line in lines if "cannot save" in line]
    assert any("File too large; the last whole one is that of step 1" in line for line in said)
    assert checkpoints.latest_step(tmp_path) == 1


def test_a_bug_is_said_by_the_one_that_meets_it():
    (status, errors), (other_status, other_errors) = run(
        f"if me == 1: raise KeyError('a bug')\n    {WAIT}"
    )
    assert status == other_status == 1
    assert errors == ["error: process 1 of 2 has failed"]
    (said,) = other_errors
    assert said.startswith("error: process 1 of 2: unexpected KeyError: 'a bug' (its traceback is")


def test_statuses_are_kept():
    assert run("sys.exit(7)") == [(7, []), (7, [])]


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_one_that_says_nothing_any_more_is_named(name):
    dies = f"if me == 1: os.kill(os.getpid(), signal.{name})"
    short = "distributed.SILENT_SECONDS, distributed.ALIVE_SECONDS = 2.0, 0.5"
    first, second = start(f"{dies}\n    {WAIT}", short)
    begin = time.time()
    assert first.wait(timeout=60) == distributed.NOT_MET
    assert time.time() - begin < 45
    second.send_signal(signal.SIGKILL)
    (_, errors), _ = ends([first, second])
    (said,) = [line for line in errors if line.startswith("error: ")]
    assert said.startswith("error: process 1 of 2 has said nothing for 2 s: it was killed or hangs")


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("kind", ["ValueError", "jax.errors.JaxRuntimeError"])
def test_one_whose_devices_are_lost_first_is_named_too(kind, saves):
    """An error of devices' connections, which come to know of it before anybody is missed."""
    main = f"""
    if me == 1: os.kill(os.getpid(), signal.SIGKILL)
    lost = {kind}("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    if {saves}: raise UserError("cannot save a checkpoint") from lost
    raise lost
    {WAIT}"""
    first, second = start(main, "distributed.SILENT_SECONDS, distributed.ALIVE_SECONDS = 2.0, 0.5")
    assert first.wait(timeout=60) == distributed.NOT_MET
    (_, errors), _ = ends([first, second])
    (said,) = [line for line in errors if line.startswith("error: ")]
    assert said.startswith("error: process 1 of 2 has said nothing for 2 s: it was killed or hangs")


@pytest.mark.parametrize(("why", "status"), [("Gloo all-reduce failed", 75), ("a bug", 1)])
def test_an_error_of_jax_is_said_where_nobody_is_lost(why, status):
    main = f"if me == 1: raise jax.errors.JaxRuntimeError('UNKNOWN: {why}')\n    {WAIT}"
    short = "distributed.SILENT_SECONDS, distributed.ALIVE_SECONDS = 2.0, 0.5"
    outcomes = ends(start(main, short))
    assert [found for found, _ in outcomes] == [status, status]
    said = [line for _, lines in outcomes for line in lines if why in line]
    assert said[0].startswith(f"error: process 1 of 2: unexpected JaxRuntimeError: UNKNOWN: {why}")


def test_one_that_is_back_before_it_is_missed_is_named_too():
    """JAX aborts the first process, whose connection to the one before is still there."""
    dies = "if me == 1: time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)"
    address = f"127.0.0.1:{launcher.load().free_port()}"
    patient = "distributed.SILENT_SECONDS = 300"
    first, second = start(f"{dies}\n    {WAIT}", patient, JAX_COORDINATOR_ADDRESS=address)
    second.wait(timeout=60)
    time.sleep(8)
    (again,) = start(WAIT, processes=[1], JAX_COORDINATOR_ADDRESS=address)
    assert first.wait(timeout=50) == distributed.NOT_MET  # JAX would miss it after a minute
    again.kill()
    (_, errors), _, _ = ends([first, second, again])
    (said,) = [line for line in errors if line.startswith("error: ")]
    assert said.startswith("error: process 1 of 2 seems to be lost, or was started anew; the")


def test_one_that_hangs_is_left_by_jax_too():
    """Where the first process itself does not look."""
    hangs = "if me == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    first, second = start(f"{hangs}\n    {WAIT}", "distributed.HEARTBEAT_SECONDS = 3")
    begin = time.time()
    assert first.wait(timeout=60) != 0
    assert time.time() - begin < 45
    second.send_signal(signal.SIGKILL)
    ends([first, second])


def test_without_the_first_one_the_others_say_so():
    dies = "if me == 0: time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)"
    first, second = start(f"{dies}\n    {WAIT}")
    begin = time.time()
    assert second.wait(timeout=60) == distributed.NOT_MET
    assert time.time() - begin < 45
    _, (_, errors) = ends([first, second])
    said = [line for line in errors if line.startswith("error: process 1 of 2 has lost process 0")]
    assert len(said) == 1, errors


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_the_others_do_not_join_says_so(process):
    (only,) = start("", "distributed.CONNECT_SECONDS = 2.0", processes=[process])
    ((status, errors),) = ends([only])
    assert status == distributed.NOT_MET
    (line,) = [line for line in errors if line.startswith("error: ")]
    assert "the 2 processes have not come together at 127.0.0.1:" in line
    assert not any("Check failure" in line for line in errors)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        (only,) = start("", processes=[0], JAX_COORDINATOR_ADDRESS=taken)
        ((status, errors),) = ends([only])
    assert status == 2
    assert errors[-1].startswith(f"error: cannot connect the processes at {taken}: ")


def test_a_variable_that_is_no_number_is_named():
    ((status, errors),) = ends(start("", processes=[0], JAX_NUM_PROCESSES="two"))
    assert (status, errors) == (2, ["error: JAX_NUM_PROCESSES='two' is no number"])


def test_commands_for_one_process_refuse_to_be_several():
    program = "from latent_diffusion_jax.runtime import commands\n"
    program += "commands.run(lambda: print('done'), alone=True)"
    done = subprocess.run(
        [sys.executable, "-c", program, "--num_processes=2", "--process_id=0",
         "--coordinator_address=127.0.0.1:1"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: this command is the work of one process")
    assert done.stderr.count("\n") == 1
