#!/usr/bin/env python3
"""Runs a command in several processes on this machine, each with virtual CPU devices of its own.

  python launch/local.py --processes=2 --devices=4 -- --config=configs/txt2img.py:smoke \
      --workdir=runs/two

does with 2 processes of 4 devices what two hosts of 4 chips would do. --command=encode runs another
command than train. All of process 0 is shown, of the others what they write to stderr. Ctrl-C and
SIGTERM go to all; when one ends with an error, the others are stopped. The status is 0 where all
end with 0, else that of the first one to fail.
"""

import argparse
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = ("train", "encode", "evaluate")
# For the others to end after one has, which they do within 45 s and say why; then SIGTERM, then
# SIGKILL.
GRACE_SECONDS = 60.0
KILL_SECONDS = 10.0
PORTS = range(20000, 32768)
# What gloo says of each connection. Its threads mix their lines, which they write piece by piece.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : |\d|\n)+"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and what is after `--`."""
    own, theirs = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, theirs = arguments[:at], arguments[at + 1 :]
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="local.py [--processes=N] [--devices=M] [--command=NAME] -- FLAGS",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--processes", type=positive, default=2, help="default 2")
    parser.add_argument("--devices", type=positive, default=1, help="of each process; default 1")
    parser.add_argument("--command", choices=COMMANDS, default="train", help="default train")
    options = parser.parse_args(own)
    if not theirs:
        parser.error("nothing to run: give the command's flags after --")
    return options, theirs


def free_port() -> int:
    """A port that nobody listens at, below those that systems hand out to outgoing connections.

    It is taken only seconds later, when the first process has started.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as server:
            try:
                server.bind(("", port))
            except OSError:
                continue
            return port
    raise SystemExit(f"error: no port of {PORTS.start} to {PORTS.stop - 1} is free")


def start(options: argparse.Namespace, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The processes, which find each other at a free port."""
    module = f"latent_diffusion_jax.{options.command}"
    found = os.environ.get("PYTHONPATH")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(options.processes),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([found] if found else [])]),
        "PYTHONUNBUFFERED": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # signals come from here alone, each once
        )
        for i in range(options.processes)
    ]


class Output:
    """Shows lines of the processes with their index; an error that all find is shown once."""

    def __init__(self) -> None:
        self._lock, self._errors = threading.Lock(), set[str]()

    def copy(self, process: int, source: IO[str], target: IO[str], shown: bool) -> None:
        noise = False  # the line before was
        for line in source:
            noise = GLOO.fullmatch(line) is not None and ("ranks" in line or noise)
            if noise or not shown:
                continue
            with self._lock:
                if line.startswith("error: "):
                    if line in self._errors:
                        continue
                    self._errors.add(line)
                target.write(f"[{process}] {line}")
                target.flush()

    def follow(self, processes: list[subprocess.Popen[str]]) -> list[threading.Thread]:
        threads = []
        for i, process in enumerate(processes):
            assert process.stdout is not None and process.stderr is not None
            for source, target, shown in (
                (process.stdout, sys.stdout, i == 0),
                (process.stderr, sys.stderr, True),
            ):
                threads.append(
                    threading.Thread(target=self.copy, args=(i, source, target, shown), daemon=True)
                )
        for thread in threads:
            thread.start()
        return threads


def send(processes: list[subprocess.Popen[str]], number: int) -> None:
    """A signal to all that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def wait(processes: list[subprocess.Popen[str]], received: list[int]) -> int | None:
    """Waits for all and passes on what signals come in; index of the first that failed, or None."""
    failed, deadlines = None, []
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        while received:
            send(processes, received.pop(0))
        statuses = [process.poll() for process in processes]
        if failed is None:
            failed = next((i for i, status in enumerate(statuses) if status), None)
            if failed is not None:
                now = time.monotonic()
                deadlines = [
                    (now + GRACE_SECONDS, signal.SIGTERM),
                    (now + GRACE_SECONDS + KILL_SECONDS, signal.SIGKILL),
                ]
        if deadlines and time.monotonic() > deadlines[0][0]:
            send(processes, deadlines.pop(0)[1])
    if failed is None:
        failed = next((i for i, process in enumerate(processes) if process.returncode), None)
    return failed


def main() -> int:
    options, arguments = parse(sys.argv[1:])
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    processes = start(options, arguments)
    threads = Output().follow(processes)
    failed = wait(processes, received)
    for thread in threads:
        thread.join(timeout=KILL_SECONDS)  # a child of theirs may hold their output open
    if failed is None:
        return 0
    status = processes[failed].returncode
    how = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    print(f"process {failed} of {len(processes)} ended with {how}", file=sys.stderr)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
