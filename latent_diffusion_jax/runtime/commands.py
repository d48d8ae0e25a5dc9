"""What the commands share: flags with a config, clear errors, a request to stop.

The status that a command exits with:

  0    it is done
  1    an error that nobody has thought of
  2    wrong flags, config, data, weights or checkpoints: `UserError`
  74   a folder that was there cannot be read or written any more: `StorageError`
  75   not all processes came together, or one is lost: `distributed.NOT_MET`
  130  stopped by Ctrl-C, with everything saved
  143  stopped by SIGTERM, with everything saved
"""

import contextlib
import difflib
import errno
import gc
import hashlib
import importlib.util
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags

from latent_diffusion_jax.runtime import clusters, distributed, processes, stopping
from latent_diffusion_jax.runtime.compilation import use_persistent_cache
from latent_diffusion_jax.runtime.errors import StorageError, UserError, verbose
from latent_diffusion_jax.runtime.texts import printable

UNEXPECTED = 1
# Flags that would stand for the current folder, or for nothing to do.
NEVER_EMPTY = ("workdir", "out", "topology", "first_stage", "to", "json", "save")
EMPTY = "--{} is empty; is a variable of the shell not set?"
# What is the matter with what was given, and will be again.
OF_PATHS = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def run(main: Callable[[], None], *, alone: bool = False) -> None:
    """Runs a command: parses flags, then `main`. Errors end it with one line and a status.

    Args:
      main: the command, which all processes run, where they are several.
      alone: it is the work of one process; where there are several, none does it.
    """
    clusters.define_flags()
    flags.DEFINE_bool("verbose", False, "Shows where in the code an error comes from.")
    sys.unraisablehook = _hear
    gc.set_threshold(50_000, 20, 20)  # at Python's own, tracing waits for it half of the time

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")
        cluster = clusters.find(*clusters.flag_values())
        if cluster is None:
            use_persistent_cache()
            main()
            return
        if alone:
            raise UserError(
                "this command is the work of one process, and it is started as one of "
                f"{cluster.num_processes} (by flags, JAX_NUM_PROCESSES, SLURM, MPI or a TPU pod)"
            )
        distributed.connect(cluster)
        _as_one_of_several(main)

    def parse(argv: Sequence[str]) -> list[str]:
        remaining = parsed(argv)
        for name in NEVER_EMPTY:
            if name in flags.FLAGS and flags.FLAGS[name].present and not flags.FLAGS[name].value:
                raise UserError(EMPTY.format(name))
        return remaining

    def parsed(argv: Sequence[str]) -> list[str]:
        file = _config_file(argv)
        if file == "":
            raise UserError(EMPTY.format("config"))
        if file is not None and not pathlib.Path(file.partition(":")[0]).is_file():
            raise UserError(f"config file {file.partition(':')[0]} does not exist")
        try:
            return flags.FLAGS(list(argv), known_only=False)
        except flags.Error as error:
            if "\n" in str(error).strip():  # a traceback from inside the config file
                raise UserError(_config_error(argv, error)) from error
            raise UserError(str(error)) from error
        except Exception as error:  # whatever the config file raises
            raise UserError(_config_error(argv, error)) from error

    # absl's own parser would print a usage text or a traceback.
    try:
        app.run(guarded, argv=sys.argv, flags_parser=parse)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        error = _of_the_system(error)
        print(f"error: {described(error)}", file=sys.stderr)
        sys.exit(_status(error))


def _hear(unraisable: Any) -> None:
    """Prints what threads of others' raise that nobody can catch, but for what says nothing new.

    When a save has failed, TensorStore still tells its event loop of each of the other arrays.
    """
    if str(unraisable.exc_value) != "Event loop is closed" or verbose():
        sys.__unraisablehook__(unraisable)


def _status(error: Exception) -> int:
    return error.status if isinstance(error, UserError) else UNEXPECTED


class SystemsWord(StorageError):
    """What the system says of a file or folder, at a place where nobody has expected it."""


def _of_the_system(error: Exception) -> Exception:
    """A UserError for an error of the system's that is about a path; others as they are."""
    wrapped: UserError | None = None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        wrapped = SystemsWord(f"{error.filename}: {error.strerror}")
        if error.errno in OF_PATHS:
            wrapped.status = UserError.status
    elif isinstance(error, RuntimeError) and "home directory" in str(error):
        wrapped = UserError(f"a path begins with ~, and there is no such home folder: {error}")
    if wrapped is None:
        return error
    wrapped.__cause__ = error
    return wrapped


def described(error: Exception) -> str:
    """What to say of an error: one line, and behind --verbose the traceback.

    Without --verbose, that of an error which nobody has thought of goes to a file: it may not come
    again. All processes that meet the same error say the same.
    """
    trace = "".join(traceback.format_exception(error)).strip()
    if isinstance(error, UserError):
        text = printable(str(error))
    else:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        text = printable(f"unexpected {type(error).__name__}: {reason}")
    if verbose():
        return f"{text}\n{trace}"
    if not isinstance(error, UserError) or isinstance(error, SystemsWord):
        name = f"latent_diffusion_jax_{hashlib.sha256(trace.encode()).hexdigest()[:8]}.txt"
        path = pathlib.Path(tempfile.gettempdir(), name)
        with contextlib.suppress(OSError):
            path.write_text(trace + "\n", "utf-8")
            text += f" (its traceback is in {path}, or shown by --verbose)"
    return text


def _as_one_of_several(main: Callable[[], None]) -> None:
    """Runs `main`; where it fails, all processes end, and without waiting for each other."""
    try:
        distributed.meet()
        main()
    except KeyboardInterrupt:
        distributed.fail("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        found = _of_the_system(error)
        origin = error.__cause__ if isinstance(found, UserError) else error
        distributed.fail_unless_one_is_lost(origin, described(found), _status(found))
    except SystemExit:
        distributed.finish()
        raise
    distributed.finish()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"unet.channels": 64, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(theirs: Any, ours: Any, free: tuple[str, ...]) -> str:
    """The keys in which two nested dicts of JSON values differ, with both values; "" for none.

    Keys that begin with one of `free` may differ. At most three are named, then counted.
    """
    left, right = flatten(theirs), flatten(ours)
    different = [
        f"{key} (there {left.get(key)!r}, now {right.get(key)!r})"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not key.startswith(free)
    ]
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(different[:3]) + more


def _config_file(argv: Sequence[str]) -> str | None:
    """The value of --config, given as --config=FILE or --config FILE."""
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        name, separator, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if separator else following
    return None


def _config_error(argv: Sequence[str], error: Exception) -> str:
    """Why the config flags could not be parsed; names the nearest key for an unknown one."""
    file = _config_file(argv)
    if file is None:
        return f"give --config=FILE before its overrides ({error})"
    path, _, variant = file.partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        known = flatten(module.get_config(*([variant] if variant else [])))
    except Exception as file_error:
        return f"config {file}: {type(file_error).__name__}: {file_error}"
    for arg in argv:
        match = re.match(r"--(?:no)?config\.([^=]+)", arg)
        if match and match[1] not in known:
            close = difflib.get_close_matches(match[1], known, n=1, cutoff=0.0)
            return f"unknown config key {match[1]!r}; the nearest known one is {close[0]!r}"
    return f"config {file}: {error}"


class StopRequest:
    """Becomes true on Ctrl-C or SIGTERM; a second one ends the program at once.

    Attributes:
      exit_status: 128 + the signal's number, as shells have it; 0 before any.
    """

    def __init__(self, grace_seconds: float = 0.0) -> None:
        """The program is ended that many seconds after a signal; 0: only by itself."""
        self.exit_status = 0
        self._grace_seconds = grace_seconds
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()
        self._told: socket.socket | None = None

    def __enter__(self) -> "StopRequest":
        if self._grace_seconds:
            # Python runs handlers when the main thread is out of foreign code, which may compile
            # for minutes; into this socket each signal's number is written at once.
            signals, self._told = socket.socketpair()
            self._told.setblocking(False)
            self._fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._count, args=[signals], name="grace", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()
        self._left.set()
        if self._told is not None:
            signal.set_wakeup_fd(self._fd)
            self._told.close()  # which ends the thread
        stopping.ask(False)

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.exit_status != 0

    def _on_signal(self, number: int, _: object) -> None:
        self.exit_status = 128 + number
        stopping.ask()
        self._put_back()
        if processes.process_index() == 0:
            name = signal.Signals(number).name
            text = f"\n{name}: finishing this step, then saving; once more to quit"
            # Whoever reads it may have got the signal too and be gone (`2>&1 | tee log`); and the
            # signal may have come in the middle of another line.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                print(text, file=sys.stderr)

    def _count(self, signals: socket.socket) -> None:
        """Ends the program some time after the first signal that asks for a stop."""
        with signals:
            while number := signals.recv(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM):
                    if not self._left.wait(self._grace_seconds):
                        self._give_up()
                    return

    def _give_up(self) -> None:
        message = (
            f"not saved within the {self._grace_seconds:g} s of grace_seconds; the same command "
            "goes on from the last whole checkpoint"
        )
        if processes.num_processes() > 1:
            distributed.fail(message, StorageError.status)
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(StorageError.status)
