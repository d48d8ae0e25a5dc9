"""Data that goes away: waited for, then one clear error; damaged records are something else."""

import logging
import pickle
import shutil
import threading
import time

import pytest
from PIL import Image

from latent_diffusion_jax.data import patience, pipeline
from latent_diffusion_jax.data.patience import Patience, RecordError
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime import stopping
from latent_diffusion_jax.runtime.errors import DataError, UserError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE", 0.02)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")
    return folder


def open_folder(folder, retry_seconds, max_damaged_share=0.2):
    source = open_source(str(folder), "train", caption_key="", holdout_share=0.0)
    return pipeline.DecodedSource(source, max_damaged_share, 3, retry_seconds)


def test_a_folder_that_comes_back_is_waited_for(folder, tmp_path, caplog):
    source = open_folder(folder, 60.0)
    expected = source[3]["image"].tobytes()
    folder.rename(tmp_path / "away")
    timer = threading.Timer(0.3, lambda: (tmp_path / "away").rename(folder))
    timer.start()
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert source[3]["image"].tobytes() == expected
    timer.join()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "cannot read the data; trying for 60 s more" in said[0], said
    assert not source.damaged
    assert caplog.records[0].of_any_process  # the first process cannot say it for the others


def test_a_folder_that_stays_away_is_an_error_after_the_time_given(folder):
    source = open_folder(folder, 0.2)
    shutil.rmtree(folder)
    start = time.monotonic()
    said = (
        r"cannot read the data, tried for 0 s \(data\.retry_seconds=0\.2\): .*\.png: No such file"
    )
    with pytest.raises(DataError, match=said):
        source[3]
    assert 0.2 <= time.monotonic() - start < 10


def test_one_file_that_is_gone_counts_as_damaged(folder):
    source = open_folder(folder, 60.0)
    names = {i: source.records[i]["name"] for i in range(len(source))}
    index = next(i for i, name in names.items() if name.endswith("3.png"))
    next_one = source[index + 1]["image"].tobytes()
    (folder / "3.png").unlink()
    assert source[index]["image"].tobytes() == next_one
    assert source.damaged == {index: names[index]}
    (folder / "4.png").unlink()
    with pytest.raises(UserError, match="2 of 9 images cannot be decoded"):
        source.check(10)


def test_an_error_without_a_file_is_said_too():
    def fails():
        raise OSError("the wire is cut")

    with pytest.raises(DataError, match="the wire is cut"):
        Patience(0.0).read(fails)


def test_other_errors_are_not_waited_for():
    def fails():
        raise RecordError("a record", "it is damaged")

    with pytest.raises(RecordError, match="it is damaged"):
        Patience(60.0).read(fails)


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(Patience(3.0))).read(lambda: 7) == 7


@pytest.fixture
def asked_soon():
    """The process is asked to stop in a moment."""
    timer = threading.Timer(0.3, stopping.ask)
    timer.start()
    yield
    timer.join()
    stopping.ask(False)


def test_who_is_asked_to_stop_does_not_wait_for_long(folder, monkeypatch, asked_soon):
    monkeypatch.setattr(patience, "PAUSE", 600.0)
    monkeypatch.setattr(patience, "STOPPING_SECONDS", 1.0)
    source = open_folder(folder, 1000.0)
    shutil.rmtree(folder)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"tried for 1 s \(.*=1000, and was asked to stop\): .*No"):
        source[3]
    assert 1.0 <= time.monotonic() - start < 60


def test_who_is_asked_to_stop_gives_a_moment_to_what_fails_once():
    stopping.ask()
    tries = iter([OSError(116, "Stale file handle"), OSError(5, "Input/output error"), None])

    def read():
        if error := next(tries):
            raise error
        return 7

    try:
        assert Patience(60.0).read(read) == 7
    finally:
        stopping.ask(False)


def test_the_time_given_is_of_all_reads_together():
    """Threads that read ahead would each begin anew with the next record."""
    there = Patience(0.5)
    tries = []

    def read():
        tries.append(1)
        raise FileNotFoundError(2, "No such file")

    for _ in range(3):
        with pytest.raises(DataError):
            there.read(read)
    waited = len(tries)
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(DataError):
            there.read(read)
    assert len(tries) == waited + 20 and time.monotonic() - start < 0.5
    assert there.read(lambda: 7) == 7  # it is back
    tries.clear()
    with pytest.raises(DataError):
        there.read(read)
    assert len(tries) > 2


def test_threads_that_fail_and_threads_that_read_do_not_meet_half_way(monkeypatch):
    """One reads again while another asks for how long nothing could be read."""
    there = Patience(60.0)
    fails = iter([OSError(116, "Stale file handle"), None])

    def read():
        if error := next(fails):
            raise error
        return 7

    def asked():  # in the middle of the question
        threading.Thread(target=there.read, args=[lambda: 8], daemon=True).start()
        time.sleep(0.1)
        return False

    monkeypatch.setattr(patience.stopping, "asked", asked)
    assert there.read(read) == 7


@pytest.mark.parametrize(("between", "tries"), [(0.0, 1), (0.3, 3)])
def test_what_was_away_long_ago_is_waited_for_anew(monkeypatch, between, tries):
    """And tries that take long themselves are of one time without data."""
    monkeypatch.setattr(patience, "FORGOTTEN_SECONDS", 0.2)
    there, count = Patience(0.5), []

    def read():
        count.append(1)
        time.sleep(0.25)
        raise OSError(110, "Connection timed out")

    with pytest.raises(DataError):
        there.read(read)
    assert len(count) in (3, 4)
    count.clear()
    time.sleep(between)
    with pytest.raises(DataError):
        there.read(read)
    assert len(count) >= tries and (len(count) == 1) == (tries == 1)
