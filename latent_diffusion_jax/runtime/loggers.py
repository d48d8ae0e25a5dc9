"""Where figures and pictures of a run go: JSONL, TensorBoard and the terminal."""

import contextlib
import json
import logging as python_logging
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping

import numpy as np
import orbax.checkpoint as orbax_checkpoint
import rich.console
import rich.progress
from absl import logging

from latent_diffusion_jax.runtime import processes
from latent_diffusion_jax.runtime.errors import StorageError, verbose
from latent_diffusion_jax.runtime.texts import escaped

# Figures that may wait for TensorBoard's thread; who adds one more waits, for ever if it has ended.
BOARD_QUEUE = 10_000

PACKAGE = str(pathlib.Path(__file__).parent.parent)


class _Formatter(python_logging.Formatter):
    """Time and message; warnings and errors say that they are."""

    def format(self, record: python_logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname.lower()}: "
        process = processes.process_index()
        who = f"process {process}: " if process else ""
        lines = [record.getMessage()]
        if not record.pathname.startswith(PACKAGE):  # ours say one thing in one line
            lines = lines[0].splitlines()
        # Names of files, and what files say, may hold what terminals take for commands.
        return f"{clock} {level}{who}" + "\n".join(map(escaped, lines))


class _CurrentStderr:
    """Whatever `sys.stderr` is at the time: a progress bar on show replaces it, to stay below."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def close(self) -> None:
        """Leaves stderr open; absl asks for it at exit."""


def set_up_logging() -> None:
    """Shows this package's log lines and other packages' warnings, without their chatter.

    Of several processes the first one speaks; of the others errors are shown, and what the first
    one cannot know, such as damaged images: records with an attribute `of_any_process`. What Orbax
    and asyncio have to say of saves that fail is shown with --verbose alone: it is raised too.
    """
    orbax = str(pathlib.Path(orbax_checkpoint.__file__).parent)
    chatter = verbose()

    def is_shown(record: python_logging.LogRecord) -> bool:
        if processes.process_index() and record.levelno < python_logging.ERROR:
            return getattr(record, "of_any_process", False)
        if record.pathname.startswith(PACKAGE):
            return True
        return record.levelno > python_logging.INFO and (
            chatter or not (record.pathname.startswith(orbax) or record.name == "asyncio")
        )

    handler = logging.get_absl_handler()
    handler.addFilter(is_shown)
    handler.setFormatter(_Formatter())
    handler.python_handler.setStream(_CurrentStderr())
    logging.set_verbosity(logging.INFO if processes.process_index() == 0 else logging.WARNING)


class RunWriter:
    """Writes a stage's scalars to `metrics.jsonl` and TensorBoard, and its images to the latter.

    On every process but the first all methods do nothing.

    Raises:
      StorageError: by any method but `close`, where files cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, start_step: int, enabled: bool):
        self._enabled, self._stage = enabled, stage
        if not enabled:
            return
        from tensorboardX import SummaryWriter  # imports PyTorch where that is installed

        self._path = workdir / "metrics.jsonl"
        with self._writing():
            _drop_rows(self._path, stage, start_step)
            self._jsonl = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(
                str(workdir / "tensorboard" / stage),
                max_queue=BOARD_QUEUE,
                purge_step=start_step + 1,
                flush_secs=10,
            )

    def scalars(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Writes e.g. `train/loss` for prefix `train`."""
        if not self._enabled:
            return
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        row = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **named}
        with self._writing():
            self._jsonl.write(json.dumps(row) + "\n")
            self._jsonl.flush()
            for name, value in named.items():
                self._check_board()
                self._board.add_scalar(name, value, step)

    def has(self, step: int, prefix: str) -> bool:
        """Whether the stage's figures of a step are written already, by this run or before it."""
        if not self._enabled:
            return False
        with self._writing():
            text = self._path.read_text("utf-8", "replace")
        rows = map(json.loads, text.splitlines())
        return any(
            row["stage"] == self._stage
            and row["step"] == step
            and any(name.startswith(f"{prefix}/") for name in row)
            for row in rows
        )

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8 [H, W, 3]."""
        if self._enabled:
            with self._writing():
                self._check_board()
                self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if not self._enabled:
            return
        with contextlib.suppress(OSError, StorageError):  # what matters has been said
            self._jsonl.close()
            self._check_board()
            self._board.close()

    def _check_board(self) -> None:
        """Its thread ends where it cannot write; all that is given to it after waits for ever."""
        if not self._board._get_file_writer().event_writer._worker.is_alive():
            raise StorageError(
                f"cannot write {self._path.parent / 'tensorboard'}: is the disk full?"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"cannot write {error.filename or self._path}: {reason}") from error


def _drop_rows(path: pathlib.Path, stage: str, start_step: int) -> None:
    """Removes what an interrupted run wrote after its last checkpoint; it will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8", "replace").split("\n"):
        try:
            row = json.loads(line)
            if row["stage"] != stage or row["step"] <= start_step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):  # cut off by a kill, or damaged
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class Progress:
    """A bar with loss, images/s and time left; plain log lines where there is no terminal."""

    def __init__(self, stage: str, start_step: int, num_steps: int, enabled: bool):
        self._stage, self._num_steps = stage, num_steps
        self._enabled = enabled
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                "{task.description}",
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                "{task.fields[figures]}",
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task(
                stage, total=num_steps, completed=start_step, figures=""
            )
            self._bar.start()

    def step(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def figures(self, step: int, loss: float, images_per_second: float, seconds: float) -> None:
        """Shows the latest figures; `seconds` is the time of one step, 0 while it is not known."""
        if self._bar:
            text = f"loss {loss:.4g}  {images_per_second:.0f} images/s"
            self._bar.update(self._task, completed=step, figures=text)
        elif self._enabled:
            left = (self._num_steps - step) * seconds
            logging.info(
                "%s: step %d/%d  loss %.4g  %.0f images/s  %.0f s left",
                *(self._stage, step, self._num_steps, loss, images_per_second, left),
            )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
