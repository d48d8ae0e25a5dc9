"""Files and folders of users: what cannot be read, or written, is refused before any work."""

import os
import pathlib

import pytest

from latent_diffusion_jax.runtime import files
from latent_diffusion_jax.runtime.errors import UserError


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    files.check_folder(tmp_path / "a" / "b", "--out=a/b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    files.check_file(tmp_path / "c" / "d.png", "--out=c/d.png")
    assert list((tmp_path / "c").iterdir()) == []


def test_what_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out=file/a: Not a directory"):
        files.check_folder(tmp_path / "file" / "a", "--out=file/a")
    with pytest.raises(UserError, match="cannot write to --out=x: "):
        files.check_folder(pathlib.Path("/proc/self"), "--out=x")  # read-only for root too
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is for others than root
    with pytest.raises(UserError, match="--out=file: the file that is there may not be changed"):
        files.check_file(tmp_path / "file", "--out=file")


def test_texts_are_read_without_marks_and_carriage_returns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffä\r\nb\rc\n\ufeff".encode())
    assert files.read_text(path, 20) == "ä\nb\nc\n\ufeff"
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        files.read_text(path, 20)
    path.write_bytes(b"a" * 21)
    with pytest.raises(ValueError, match="its 1 MiB are more than the 0 allowed"):
        files.read_text(path, 20)
