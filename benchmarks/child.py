"""A side of a benchmark as a process that waits to be told to run, and its handle.

The child answers each line on its standard input with one line of JSON: so two sides can take turns
while each has its own memory.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def limit_threads(count: int) -> None:
    """Keeps this process on `count` of its processors; before any pool of threads is made."""
    processors = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, processors)
    os.environ["OMP_NUM_THREADS"] = str(count)


def serve(
    run: Callable[[], Any],
    wait: Callable[[Any], Any],
    repeats: int,
    facts: Callable[[], dict[str, Any]],
    channel: Any,
) -> None:
    """Runs `repeats` times for each line that comes in, and says how long one time took.

    In seconds by the clock, and in seconds of all processors: the latter say more on a machine that
    others use too.

    Args:
      run: starts the work.
      wait: takes what `run` gave and returns when it is done: after the last of the repeats, so
        that a side which prepares the next step during this one may do so, as in training.
      repeats: how often a turn runs.
      facts: what else to answer: peak memory on the accelerator, say.
      channel: file to answer on.
    """
    reply(channel, facts())
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            outputs = run()
        wait(outputs)
        seconds = (time.perf_counter() - start) / repeats
        cpu_seconds = (time.process_time() - start_cpu) / repeats
        reply(channel, {"seconds": seconds, "cpu_seconds": cpu_seconds, **facts()})


def reply(channel: Any, answer: dict[str, Any]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_rss_mib": peak, **answer}), file=channel, flush=True)


def open_channel() -> Any:
    """A file for answers; whatever libraries print goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


class Child:
    """A process that serves; ready, with all warmed up, once made.

    Raises:
      RuntimeError: it did not get that far; the message ends with its last words.
    """

    def __init__(self, script: str, arguments: list[str], log: pathlib.Path):
        here = pathlib.Path(__file__).parent
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, str(here / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.facts = self._answer()

    def run(self) -> tuple[float, float]:
        """Seconds of one run, by the clock and of all processors."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.facts = self._answer()
        return self.facts.pop("seconds"), self.facts.pop("cpu_seconds")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            words = self._log.read_text("utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(words[-1] if words else "it ended without a word")
        return json.loads(line)
