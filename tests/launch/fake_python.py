"""A stand-in for a worker's python: records what it is asked to run, and ends as it is told.

The lines of ~/statuses are how its runs end, one after the other, the last one for ever: a status,
or `wait`, which waits for SIGTERM and ends with 143.
"""

import json
import os
import pathlib
import signal
import sys

home = pathlib.Path(os.environ["HOME"])


def record(file: str, value: object) -> None:
    with (home / file).open("a") as lines:
        lines.write(json.dumps(value) + "\n")


if sys.argv[1:3] == ["-m", "pip"]:
    record("pip.jsonl", sys.argv[3:])
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
record("runs.jsonl", {"argv": sys.argv[1:], "cwd": os.getcwd()})
statuses = (home / "statuses").read_text().split()
status = statuses[min(len((home / "runs.jsonl").read_text().splitlines()), len(statuses)) - 1]
print("ends with", status, flush=True)
if status == "wait":
    signal.sigwait([signal.SIGTERM])
    # A second one would end train at once, without its checkpoint.
    second = signal.sigtimedwait([signal.SIGTERM], 0.2)
    record("signals.jsonl", 1 if second is None else 2)
    status = 143
sys.exit(int(status))
