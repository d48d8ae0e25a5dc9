"""What fuzzing has found worth keeping is read, or refused by one line. See fuzz_readers.py."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent
CORPUS = sorted(path.relative_to(FOLDER / "corpus") for path in FOLDER.glob("corpus/*/*"))


def fuzz_readers():
    spec = importlib.util.spec_from_file_location("fuzz_readers", FOLDER / "fuzz_readers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CORPUS, ids=str)
def test_it_is_read_or_refused(path, tmp_path):
    data = (FOLDER / "corpus" / path).read_bytes()
    taken = fuzz_readers().check(path.parent.name, data, tmp_path)
    assert taken or path.stem not in ("small", "zip", "legacy", "table", "texts")


def test_there_is_a_corpus_for_each_reader():
    assert {path.parent.name for path in CORPUS} == set(fuzz_readers().READERS)
