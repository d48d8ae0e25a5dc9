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
