"""A folder is one run's at a time, until its process has ended, however that is."""

import fcntl
import socket
import subprocess
import sys
import time

import pytest

from latent_diffusion_jax.runtime import locks
from latent_diffusion_jax.runtime.errors import StorageError

HOLDS = """
import pathlib, sys, time
from latent_diffusion_jax.runtime import locks
with locks.alone_in(pathlib.Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that hold the folder for some seconds; ends them."""
    processes = []

    def start(seconds):
        command = [sys.executable, "-c", HOLDS, str(tmp_path), str(seconds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "has it\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_until_the_first_one_is_gone(start, tmp_path, monkeypatch):
    first = start(600)
    monkeypatch.setattr(locks, "SECONDS", 0.5)
    with (
        pytest.raises(StorageError, match=f"another run is at work in {tmp_path}"),
        locks.alone_in(tmp_path),
    ):
        pass
    first.kill()  # which takes the lock along
    first.wait()
    with locks.alone_in(tmp_path):
        pass
    with locks.alone_in(tmp_path):
        pass


def test_a_run_that_ends_is_waited_for(start, tmp_path):
    start(1)
    began = time.monotonic()
    with locks.alone_in(tmp_path):
        assert time.monotonic() - began < 60


def test_file_systems_without_locks_and_folders_that_cannot_be_written(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locks.alone_in(tmp_path):
        pass
    with (
        pytest.raises(StorageError, match=r"cannot write to .*none: No such"),
        locks.alone_in(tmp_path / "none"),
    ):
        pass


def test_a_claim_says_when_the_folder_is_another(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locks.claimed(folder) as check:
        check()
        (folder / locks.FILE).write_text("another 1 2\n")  # where there are no locks
        with pytest.raises(StorageError, match="not that of this run any more"):
            check()
        folder.rename(tmp_path / "away")
        with pytest.raises(StorageError, match="removed, moved or taken"):
            check()
    (tmp_path / "away").rename(folder)
    with locks.claimed(folder) as check:
        check()
    assert not folder.exists(), "nothing came of it"


def test_a_lock_that_somebody_deletes_is_taken_anew(tmp_path):
    with locks.claimed(tmp_path) as check:
        (tmp_path / locks.RUN).touch()
        (tmp_path / locks.FILE).unlink()
        check()
        check()
        with (tmp_path / locks.FILE).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_claim_leaves_what_is_anothers(start, tmp_path, monkeypatch):
    start(600)
    monkeypatch.setattr(locks, "SECONDS", 0.5)
    process = f"process \\d+ on {socket.gethostname()}"
    with (
        pytest.raises(StorageError, match=rf"another run is at work in .* \({process}\)"),
        locks.claimed(tmp_path),
    ):
        pass
    assert (tmp_path / locks.FILE).exists()


def test_a_lock_whose_file_was_deleted_is_none(tmp_path, monkeypatch):
    """What a run leaves behind that removes its folder while another waits for it."""
    flock, calls = fcntl.flock, []

    def deleted_meanwhile(file, how):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / locks.FILE).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    with locks.claimed(tmp_path) as check:
        check()
    assert len(calls) == 2
