"""The launcher of several processes on one machine, with small programs in the commands' place."""

import os
import signal
import threading
import time

import pytest

from tests.launcher import load


@pytest.fixture
def launcher(monkeypatch):
    """launch/local.py as a module that is quick to lose its patience."""
    module = load()
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(module, "KILL_SECONDS", 0.5)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launch(launcher, monkeypatch, tmp_path, capfd):
    """(program, flags) -> (status, output, errors) with the program as what train does."""
    package = tmp_path / "latent_diffusion_jax"  # the folder of the call comes first
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)

    def run(program: str, *flags: str, command: str = "train") -> tuple[int, str, str]:
        head = "import os, signal, sys, time\nme = int(os.environ['JAX_PROCESS_ID'])\n"
        (package / f"{command}.py").write_text(head + program)
        monkeypatch.setattr("sys.argv", ["local.py", *flags, "--", "--workdir=x"])
        status = launcher.main()
        return status, *capfd.readouterr()

    return run


def test_processes_are_told_who_they_are(launch):
    program = """
names = ("NUM_PROCESSES", "NUM_CPU_DEVICES", "COORDINATOR_ADDRESS", "PLATFORMS")
print(me, *(os.environ["JAX_" + name] for name in names), sys.argv[1:], file=sys.stderr)
"""
    status, output, errors = launch(program, "--processes=3", "--devices=4")
    assert status == 0 and output == ""
    lines = sorted(errors.splitlines())
    assert [line.split()[:4] for line in lines] == [[f"[{i}]", str(i), "3", "4"] for i in range(3)]
    (address,) = {line.split()[4] for line in lines}
    assert address.startswith("127.0.0.1:") and 0 < int(address.split(":")[1]) < 2**16
    assert all(line.endswith("cpu ['--workdir=x']") for line in lines)


def test_the_first_process_is_shown_whole_and_of_others_errors(launch):
    program = "print('output of', me)\nprint('errors of', me, file=sys.stderr)"
    status, output, errors = launch(program, "--command=encode", command="encode")
    assert (status, output) == (0, "[0] output of 0\n")
    assert sorted(errors.splitlines()) == ["[0] errors of 0", "[1] errors of 1"]


def test_what_gloo_says_is_not_shown(launch):
    """Its threads write pieces of lines among each other."""
    head, tail = (
        "[Gloo] Rank 0 is connected to 3 peer ranks. ",
        "Expected number of connected peer ",
    )
    program = f"""
print({head + tail!r} "ranks is : 3")
print({head!r} "[Gloo] Rank " {tail!r} "ranks is : 31", "3", "", "7 images", "7", sep="\\n")
"""
    assert launch(program) == (0, "[0] 7 images\n[0] 7\n", "")


def test_an_error_that_all_find_is_shown_once(launch):
    status, _, errors = launch("print('error: no such key', file=sys.stderr); sys.exit(2)")
    assert status == 2
    assert errors.count("error: no such key") == 1


def test_when_one_dies_the_others_are_stopped(launch):
    program = """
if me == 1:
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
end = time.time() + 60
while time.time() < end:
    time.sleep(0.05)
"""
    start = time.time()
    status, output, errors = launch(program)
    assert time.time() - start < 20
    assert status == 3 and output == "[0] asked to stop\n"
    assert errors == "process 1 of 2 ended with status 3\n"


def test_one_that_is_killed_is_a_failure(launch):
    status, _, errors = launch("if me == 1: os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 128 + signal.SIGKILL
    assert errors == "process 1 of 2 ended with signal SIGKILL\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_to_all(launch, tmp_path, number):
    program = """
def stop(number, _):
    print("got", signal.Signals(number).name, file=sys.stderr, flush=True)
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
open(f"ready{me}", "w").close()
time.sleep(60)
"""

    def send():
        while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    status, _, errors = launch(program)
    thread.join()
    assert status == 128 + number
    assert [errors.count(f"[{i}] got {number.name}") for i in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes=0", "--", "--workdir=x"], "'0' is not a positive number"),
        (["--devices=two", "--", "--workdir=x"], "'two' is not a positive number"),
        (["--command=sample", "--", "--workdir=x"], "choose from"),
        (["--wrong", "--", "--workdir=x"], "--wrong"),
        (["--workdir=x"], "--workdir=x"),
        ([], "after --"),
    ],
)
def test_wrong_usage_is_one_line(launcher, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["local.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        launcher.main()
    output, errors = capsys.readouterr()
    assert raised.value.code == 2 and output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors
