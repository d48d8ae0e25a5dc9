"""Commands: one clear line for what a user got wrong, and a way to stop."""

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from ml_collections import ConfigDict

from latent_diffusion_jax.runtime import commands, errors, stopping

ROOT = pathlib.Path(__file__).parents[2]

# A command that does nothing, and loads quickly.
COMMAND = """
import sys
from absl import flags
from ml_collections import config_flags
from latent_diffusion_jax.runtime import commands
from latent_diffusion_jax.runtime.errors import StorageError, UserError

config_flags.DEFINE_config_file("config", None, "")
flags.DEFINE_string("workdir", None, "")
flags.mark_flags_as_required(["config", "workdir"])

def main():
    if flags.FLAGS.workdir == "bad":
        raise UserError("this workdir is bad")
    if flags.FLAGS.workdir == "gone":
        raise StorageError("this disk is gone")
    if flags.FLAGS.workdir.startswith(("~", "long", "lost")):
        import pathlib
        path = pathlib.Path(flags.FLAGS.workdir).expanduser()
        (pathlib.Path("a" * 300) if path.name == "long" else path / "a").stat()
    if flags.FLAGS.workdir == "bug":
        raise ValueError("this is a bug")
    print(flags.FLAGS.config.batch_size, flags.FLAGS.config.optimizer.learning_rate)

commands.run(main)
"""

SMOKE = "--config=configs/txt2img.py:smoke"
WORKDIR = "--workdir=not/made"


def start(*arguments: str) -> subprocess.Popen:
    """Starts Python in the repository's root."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of the command above."""
    process = start("-c", COMMAND, *arguments)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def assert_one_line(outcome, *said):
    status, output, errors = outcome
    assert status == 2, errors
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n")
    for part in said:
        assert part in errors


# What a user can get wrong on the command line.


def test_unknown_key_of_the_real_command():
    process = start(
        *("-m", "latent_diffusion_jax.train"), SMOKE, "--config.optimizer.learningrate=1", WORKDIR
    )
    output, errors = process.communicate(timeout=120)
    outcome = process.returncode, output, errors
    assert_one_line(outcome, "'optimizer.learningrate'", "'optimizer.learning_rate'")
    assert not (ROOT / "not").exists()


def test_a_command_that_goes_well():
    status, output, errors = run_command(
        SMOKE, "--config.batch_size=12", "--config.optimizer.learning_rate=0.5", WORKDIR
    )
    assert (status, output, errors) == (0, "12 0.5\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(
            [SMOKE, "--config.optimizer.learningrate=1", WORKDIR],
            ["'optimizer.learningrate'", "'optimizer.learning_rate'"],
            id="unknown key",
        ),
        pytest.param(
            ["--config=configs/txt2img.py:nope", WORKDIR],
            ["configs/txt2img.py", "'nope'", "digits, smoke, paper"],
            id="unknown variant",
        ),
        pytest.param(
            ["--config=configs/nope.py", WORKDIR], ["configs/nope.py"], id="missing config file"
        ),
        pytest.param(
            [SMOKE, "--config.batch_size=many", WORKDIR],
            ["config.batch_size", "'many'"],
            id="wrong type",
        ),
        pytest.param([SMOKE], ["--workdir"], id="missing workdir"),
        pytest.param([WORKDIR], ["--config"], id="no config"),
        pytest.param([SMOKE, "--wrkdir=x"], ["'wrkdir'", "workdir"], id="unknown flag"),
        pytest.param([SMOKE, WORKDIR, "extra"], ["'extra'"], id="unexpected argument"),
        pytest.param([SMOKE, "--config.unet=3", WORKDIR], ["config.unet"], id="a section"),
        pytest.param(
            [SMOKE, "--noconfig.data.random_flips", WORKDIR],
            ["'data.random_flips'", "'data.random_flip'"],
            id="unknown switch",
        ),
        pytest.param(
            ["--config", "configs/txt2img.py:smoke", "--config.batchsize=1", WORKDIR],
            ["'batchsize'", "'batch_size'"],
            id="config after a space",
        ),
        pytest.param(
            [SMOKE, "--config.batchsize", "1", WORKDIR],
            ["'batchsize'", "'batch_size'"],
            id="override after a space",
        ),
        pytest.param(
            ["--config.batch_size=3", SMOKE, WORKDIR], ["--config"], id="override before config"
        ),
        pytest.param([SMOKE, "--workdir=bad"], ["this workdir is bad"], id="a UserError"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said):
    assert_one_line(run_command(*arguments), *said)


def test_a_bug_is_one_line_and_its_traceback_is_kept():
    status, _, errors = run_command(SMOKE, "--workdir=bug")
    assert status == 1
    assert errors.startswith("error: unexpected ValueError: this is a bug (its traceback is in ")
    assert errors.count("\n") == 1
    kept = pathlib.Path(re.search(r"traceback is in (\S+\.txt),", errors)[1])
    assert kept.read_text().startswith("Traceback") and "in main" in kept.read_text()
    kept.unlink()


@pytest.mark.parametrize(("workdir", "expected"), [("bug", 1), ("bad", 2), ("gone", 74)])
def test_verbose_shows_the_traceback(workdir, expected):
    status, _, errors = run_command(SMOKE, f"--workdir={workdir}", "--verbose")
    assert status == expected
    first, rest = errors.split("\n", 1)
    assert first.startswith("error: ") and rest.startswith("Traceback")


def test_a_folder_that_is_gone_has_a_status_of_its_own():
    status, output, errors = run_command(SMOKE, "--workdir=gone")
    assert (status, output, errors) == (74, "", "error: this disk is gone\n")


# Configs.


def test_flatten():
    config = ConfigDict({"a": 1, "b": {"c": (1, 2), "d": {"e": "x"}}})
    expected = {"a": 1, "b.c": (1, 2), "b.d.e": "x"}
    assert commands.flatten(config) == expected
    assert commands.flatten(config.to_dict()) == expected
    assert commands.flatten({}) == {}


# Stopping.


@pytest.fixture
def handlers():
    """Puts back the handlers of both signals, and counts calls of the ones set here."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    calls = []
    for number in before:
        signal.signal(number, lambda number, frame: calls.append(number))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two instructions of the main thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop(handlers, capsys, number):
    with commands.StopRequest() as should_stop:
        assert not should_stop()
        send(number)
        assert should_stop() is True
        assert should_stop.exit_status == 128 + number
    assert handlers == []
    shown = capsys.readouterr().err
    assert number.name in shown and "once more" in shown


class Gone(io.StringIO):
    """A stream that nobody reads any more, or whose own writing the signal has interrupted."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("reentrant call"), ValueError()])
def test_a_signal_is_taken_though_nothing_can_be_said(handlers, monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Gone(error))
    with commands.StopRequest(grace_seconds=600.0) as should_stop:
        send(signal.SIGINT)
        assert should_stop() and stopping.asked()
        send(signal.SIGINT)
        assert handlers == [signal.SIGINT]
    assert not stopping.asked()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_is_not_caught(handlers, number):
    with commands.StopRequest() as should_stop:
        send(number)
        send(number)
        assert handlers == [number]
        assert should_stop()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([SMOKE, "--workdir="], 2, "--workdir is empty; is a variable of the shell not set?"),
        (["--config=", WORKDIR], 2, "--config is empty; is a variable"),
        ([SMOKE, "--workdir=~nosuchuser/runs"], 2, "a path begins with ~, and there is no such"),
        ([SMOKE, "--workdir=long"], 2, "File name too long"),
        ([SMOKE, "--workdir=lost"], 74, "lost/a: No such file or directory"),
    ],
)
def test_paths_that_cannot_be_are_one_line(arguments, status, said):
    found, _, errors = run_command(*arguments)
    assert found == status and said in errors
    assert "unexpected" not in errors and len(errors.splitlines()) == 1


GRACE = """
import os, signal, sys, time
from latent_diffusion_jax.runtime.commands import StopRequest
with StopRequest(grace_seconds=2.0) as should_stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))  # it saves
print("saved")
time.sleep(2.5)  # the grace ends with the block
sys.exit(should_stop.exit_status)
"""


@pytest.mark.parametrize(("seconds", "status"), [("0", 143), ("60", 74)])
def test_a_save_takes_no_longer_than_the_grace(seconds, status):
    process = start("-c", GRACE, seconds)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert (output == "saved\n") == (status == 143)
    assert ("not saved within the 2 s" in errors) == (status == 74)


COMPILING = """
import hashlib, os, signal, threading
from latent_diffusion_jax.runtime.commands import StopRequest
with StopRequest(grace_seconds=1.0):
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # half an hour without the interpreter
"""


def test_the_grace_counts_while_the_main_thread_is_in_foreign_code():
    process = start("-c", COMPILING)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 74 and "not saved within the 1 s" in errors


def test_the_grace_ends_though_nobody_reads_what_is_said():
    process = start("-c", GRACE, "60")
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=60) == 74


def test_handlers_are_put_back_without_any_signal(handlers):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with commands.StopRequest(grace_seconds=600.0) as should_stop:
        during = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        assert not set(during) & set(before)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    end = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not should_stop() and should_stop.exit_status == 0


def test_handlers_are_put_back_after_an_error(handlers):
    with pytest.raises(RuntimeError), commands.StopRequest():
        raise RuntimeError
    send(signal.SIGTERM)
    assert handlers == [signal.SIGTERM]


def test_differences_name_keys_and_both_values():
    theirs, ours = {"a": {"b": 1, "c": 2}, "free": 1}, {"a": {"b": 1, "c": 3}, "free": 2, "new": 4}
    found = commands.differences(theirs, ours, ("free",))
    assert found == "a.c (there 2, now 3), new (there None, now 4)"
    assert commands.differences(theirs, {"a": {"b": 1, "c": 2}}, ("free",)) == ""
    many = commands.differences({}, {f"k{i}": i for i in range(1, 6)}, ("none",))
    assert (
        many == "k1 (there None, now 1), k2 (there None, now 2), k3 (there None, now 3) and 2 more"
    )


@pytest.mark.parametrize("flags", [(), ("--verbose",)])
def test_what_is_said_of_arrays_after_a_save_has_failed(flags, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    monkeypatch.setattr(sys, "__unraisablehook__", heard.append)
    closed, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "another")
    )
    for unraisable in (closed, other):
        commands._hear(unraisable)
    assert heard == ([closed, other] if flags else [other])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], False),
        (["--verbose"], True),
        (["--verbose=true"], True),
        (["--verbose=false"], False),
        (["--noverbose"], False),
        (["--verbose", "--noverbose"], False),
        (["--config.verbose=1"], False),
    ],
)
def test_verbose_in_all_its_spellings(given, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", *given])
    assert errors.verbose() == expected
