"""Writers: rows in metrics.jsonl, tags in TensorBoard's files, and what a restart drops."""

import io
import json
import logging as python_logging
import pathlib
import struct
import sys
import threading
import time

import numpy as np
import pytest
from absl import flags, logging
from tensorboardX.proto.event_pb2 import Event, SessionLog

import latent_diffusion_jax
from latent_diffusion_jax.runtime import loggers
from latent_diffusion_jax.runtime.errors import StorageError


def rows(workdir: pathlib.Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(workdir: pathlib.Path, stage: str) -> list[int]:
    return [row["step"] for row in rows(workdir) if row["stage"] == stage]


def write(workdir, stage, start_step, steps, enabled=True, **values):
    writer = loggers.RunWriter(workdir, stage, start_step, enabled)
    for step in steps:
        writer.scalars(step, values or {"loss": 1.0 / step}, "train")
    writer.close()


def events(workdir: pathlib.Path, stage: str) -> list[Event]:
    """Events of all TensorBoard files of a stage, oldest file first."""
    found = []
    for path in sorted((workdir / "tensorboard" / stage).iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def tags(workdir, stage):
    return {value.tag for event in events(workdir, stage) for value in event.summary.value}


# metrics.jsonl.


def test_rows(tmp_path):
    before = time.time()
    writer = loggers.RunWriter(tmp_path, "diffusion", 0, True)
    writer.scalars(3, {"loss": np.float32(0.5), "grad_norm": 2}, "train")
    writer.scalars(3, {"loss": 0.25}, "test")
    first, second = rows(tmp_path)  # there before the writer is closed
    writer.close()
    assert before - 0.01 <= first.pop("time") <= second.pop("time") <= time.time() + 0.01
    where = {"stage": "diffusion", "step": 3}
    assert first == where | {"train/loss": 0.5, "train/grad_norm": 2.0}
    assert second == where | {"test/loss": 0.25}


def test_restart_drops_rows_beyond_the_checkpoint(tmp_path):
    write(tmp_path, "first_stage", 0, [1, 2, 3, 4], loss=1.0)
    write(tmp_path, "diffusion", 0, [1, 2, 3, 4, 5], loss=1.0)
    write(tmp_path, "diffusion", 3, [4, 5, 6], loss=2.0)
    assert steps(tmp_path, "first_stage") == [1, 2, 3, 4]
    assert steps(tmp_path, "diffusion") == [1, 2, 3, 4, 5, 6]
    losses = [row["train/loss"] for row in rows(tmp_path) if row["stage"] == "diffusion"]
    assert losses == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_restart_from_the_beginning(tmp_path):
    write(tmp_path, "first_stage", 0, [1, 2])
    write(tmp_path, "diffusion", 0, [1, 2])
    write(tmp_path, "diffusion", 0, [1])
    assert steps(tmp_path, "first_stage") == [1, 2]
    assert steps(tmp_path, "diffusion") == [1]


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_restart_survives_a_last_line_that_was_cut_off(tmp_path, cut):
    write(tmp_path, "diffusion", 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    text = path.read_text("utf-8")
    path.write_text(text[: len(text) - cut], "utf-8")
    write(tmp_path, "diffusion", 2, [3, 4])
    assert steps(tmp_path, "diffusion") == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b'{"step": 1}\n', b"7\n", b"{}{}\n",
                                    b'{"stage": "diffusion", "step": "x"}\n'])  # fmt: skip
def test_restart_survives_damaged_lines(tmp_path, damage):
    write(tmp_path, "diffusion", 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes())
    write(tmp_path, "diffusion", 2, [3, 4])
    assert steps(tmp_path, "diffusion") == [1, 2, 3, 4]


def test_restart_survives_another_stages_line_that_was_cut_off(tmp_path):
    write(tmp_path, "first_stage", 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").removesuffix("\n"), "utf-8")  # all but its end
    write(tmp_path, "diffusion", 0, [1])
    assert steps(tmp_path, "first_stage") == [1, 2]
    assert steps(tmp_path, "diffusion") == [1]


# TensorBoard.


def test_tensorboard_scalars(tmp_path):
    writer = loggers.RunWriter(tmp_path, "diffusion", 0, True)
    for step in (1, 2):
        writer.scalars(step, {"loss": 0.5 / step, "grad_norm": 3.0}, "train")
    writer.scalars(2, {"psnr": 20.0}, "test")
    writer.close()
    assert tags(tmp_path, "diffusion") == {"train/loss", "train/grad_norm", "test/psnr"}
    found = {
        (value.tag, event.step): value.simple_value
        for event in events(tmp_path, "diffusion")
        for value in event.summary.value
    }
    assert found["train/loss", 1] == 0.5 and found["train/loss", 2] == 0.25
    assert found["test/psnr", 2] == 20.0


def test_tensorboard_images(tmp_path):
    writer = loggers.RunWriter(tmp_path, "diffusion", 0, True)
    writer.image(4, "preview", np.zeros((5, 7, 3), np.uint8))
    writer.close()
    (event,) = [event for event in events(tmp_path, "diffusion") if event.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (4, "preview")
    assert (value.image.height, value.image.width, value.image.colorspace) == (5, 7, 3)
    assert value.image.encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_has_a_folder_for_each_stage(tmp_path):
    write(tmp_path, "first_stage", 0, [1], l1=1.0)
    write(tmp_path, "diffusion", 0, [1], loss=1.0)
    assert tags(tmp_path, "first_stage") == {"train/l1"}
    assert tags(tmp_path, "diffusion") == {"train/loss"}


def test_tensorboard_is_told_of_a_restart(tmp_path):
    write(tmp_path, "diffusion", 2, [3])
    starts = [
        event.step
        for event in events(tmp_path, "diffusion")
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [3]  # older points from this step on are void


# Processes but the first.


def test_disabled_writer_writes_nothing(tmp_path):
    writer = loggers.RunWriter(tmp_path, "diffusion", 0, False)
    writer.scalars(1, {"loss": 1.0}, "train")
    writer.image(1, "preview", np.zeros((5, 7, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_disabled_writer_leaves_the_first_ones_rows(tmp_path):
    write(tmp_path, "diffusion", 0, [1, 2, 3])
    write(tmp_path, "diffusion", 1, [2], enabled=False)
    assert steps(tmp_path, "diffusion") == [1, 2, 3]


# The terminal.


@pytest.fixture
def lines_logged(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "info", lambda text, *args: found.append(text % args))
    return found


def test_progress_without_a_terminal_is_log_lines(lines_logged):
    progress = loggers.Progress("diffusion", 0, 100, True)
    for step in range(1, 61):
        progress.step(step)
    assert lines_logged == []
    progress.figures(60, 0.125, 320.0, 0.5)
    progress.close()
    (line,) = lines_logged
    for part in ("diffusion", "60/100", "0.125", "320 images/s", "20 s left"):
        assert part in line


def test_progress_of_other_processes_says_nothing(lines_logged, capsys):
    progress = loggers.Progress("diffusion", 0, 100, False)
    progress.step(1)
    progress.figures(1, 0.5, 320.0, 0.5)
    progress.close()
    assert lines_logged == [] and capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(lines_logged, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    progress = loggers.Progress("diffusion", 10, 100, True)
    progress.step(50)
    progress.figures(60, 0.125, 320.0, 0.5)
    progress.close()
    shown = capsys.readouterr().err
    assert "diffusion" in shown and "60/100" in shown and "0.125" in shown
    assert lines_logged == []


@pytest.fixture
def absl_handler():
    """absl's handler, put back as it was after the test."""
    handler = logging.get_absl_handler()
    before = handler.filters[:], handler.python_handler.formatter, logging.get_verbosity()
    stream, parsed = handler.python_handler.stream, flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()  # before, absl writes to stderr in a way of its own
    yield handler
    handler.python_handler.setStream(stream)
    if not parsed:
        flags.FLAGS.unparse_flags()
    handler.filters[:] = before[0]
    handler.setFormatter(before[1])
    logging.set_verbosity(before[2])


def record(level, message, file):
    path = str(file)
    return python_logging.LogRecord("absl", level, path, 1, message, ("x",), None)


def test_logging_shows_our_lines_and_others_warnings(absl_handler):
    loggers.set_up_logging()
    ours = pathlib.Path(latent_diffusion_jax.__file__).parent / "train.py"
    theirs = pathlib.Path(np.__file__)
    shown = [bool(absl_handler.filter(record(level, "about %s", file)))
             for file in (ours, theirs)
             for level in (python_logging.INFO, python_logging.WARNING)]  # fmt: skip
    assert shown == [True, True, False, True]
    assert logging.get_verbosity() == logging.INFO


def test_log_lines_go_to_the_stderr_of_their_time(absl_handler, monkeypatch):
    # A progress bar on show replaces stderr, to keep the lines above it.
    loggers.set_up_logging()
    for text in ("first %s", "second %s"):
        monkeypatch.setattr("sys.stderr", io.StringIO())
        absl_handler.handle(record(python_logging.WARNING, text, __file__))
        assert sys.stderr.getvalue().endswith(f"warning: {text % 'x'}\n")


def test_log_lines_name_warnings(absl_handler):
    loggers.set_up_logging()
    info = absl_handler.format(record(python_logging.INFO, "about %s", __file__))
    assert info.endswith(" about x") and info.count(":") == 2  # those of the clock
    warning = absl_handler.format(record(python_logging.WARNING, "about %s", __file__))
    assert warning.endswith(" warning: about x")


def test_scalars_that_cannot_be_written_are_an_error(tmp_path, small_files):
    writer = loggers.RunWriter(tmp_path, "first_stage", 0, True)
    writer.scalars(1, {"loss": 1.0}, "train")
    small_files(2_000)
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: File too large"):
        for step in range(2, 1000):
            writer.scalars(step, {"loss": 1.0}, "train")
    writer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_pictures_that_cannot_be_written_are_an_error_and_nothing_waits(tmp_path, small_files):
    """TensorBoard's thread dies of it; its queue would then fill up, and block for ever."""
    writer = loggers.RunWriter(tmp_path, "first_stage", 0, True)
    small_files(20_000)
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    with pytest.raises(StorageError, match=r"cannot write .*tensorboard: is the disk full"):
        for step in range(8):  # the queue holds more
            writer.image(step, "preview", noise)
            time.sleep(0.3)
    writer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_many_figures_at_once_do_not_wait_for_a_thread_that_has_ended(tmp_path):
    """On a disk that is full, while the last block of metrics.jsonl still has room."""
    writer = loggers.RunWriter(tmp_path, "first_stage", 0, True)
    events = writer._board._get_file_writer().event_writer
    end = threading.Event()
    events._ev_writer.write_event = events._ev_writer.flush = lambda *_: end.wait() and 1 / 0
    figures = {f"figure_{i}": 1.0 for i in range(18)}
    writer.scalars(1, figures, "train")  # more than its queue holds by default
    end.set()
    events._worker.join(10.0)
    with pytest.raises(StorageError, match=r"cannot write .*tensorboard: is the disk full"):
        writer.scalars(2, figures, "train")
    writer.close()
    events._ev_writer.flush = lambda: None  # it is tried once more when Python ends


def test_what_is_written_is_known(tmp_path):
    writer = loggers.RunWriter(tmp_path, "first_stage", 0, True)
    writer.scalars(2, {"loss": 1.0}, "train")
    writer.scalars(3, {"loss": 1.0}, "test")
    assert [writer.has(step, "test") for step in (2, 3, 4)] == [False, True, False]
    assert not loggers.RunWriter(tmp_path, "diffusion", 0, True).has(3, "test")
    assert not loggers.RunWriter(tmp_path, "first_stage", 0, False).has(3, "test")
    writer.close()


def test_other_processes_say_what_the_first_one_cannot_know(absl_handler, monkeypatch):
    monkeypatch.setattr(loggers.processes, "process_index", lambda: 1)
    loggers.set_up_logging()
    ours = pathlib.Path(latent_diffusion_jax.__file__).parent / "train.py"
    known, damaged = (record(python_logging.WARNING, "about %s", ours) for _ in range(2))
    damaged.of_any_process = True
    failed = record(python_logging.ERROR, "about %s", ours)
    assert [bool(absl_handler.filter(r)) for r in (known, damaged, failed)] == [False, True, True]
    assert logging.get_verbosity() == logging.WARNING
    assert absl_handler.format(damaged).endswith("warning: process 1: about x")


def test_log_lines_have_no_commands_for_a_terminal(absl_handler):
    loggers.set_up_logging()
    name = "about %s: \x1b]0;x\x07.png\nerror: false \udc80"
    ours = pathlib.Path(latent_diffusion_jax.__file__).parent / "train.py"
    said = absl_handler.format(record(python_logging.WARNING, name, ours))
    assert said.endswith(r"about x: \x1b]0;x\x07.png\x0aerror: false \xdc80")
    theirs = absl_handler.format(record(python_logging.WARNING, "%s\n\x1b two", np.__file__))
    assert theirs.endswith("warning: x\n\\x1b two")
