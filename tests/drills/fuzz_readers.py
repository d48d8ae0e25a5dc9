"""Fuzzes the readers of others' files, guided by what of the code a file reaches.

  pip install atheris
  export PYTHONPATH=. FUZZ=tests/drills/fuzz_readers.py
  python $FUZZ weights tests/drills/corpus/weights -max_total_time=600
  python $FUZZ captions tests/drills/corpus/captions -max_total_time=600

The corpus is where libFuzzer starts, and where it puts what reaches more; -rss_limit_mb=4096 bounds
the memory, -timeout=20 the time of one file. Only a UserError of one line may come out.
`test_fuzzed_inputs.py` reads the corpus that is kept here.
"""

import inspect
import json
import pathlib
import pickletools
import shutil
import sys
import tempfile
import zipfile

import numpy as np

from latent_diffusion_jax.data import folders
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, torch_files, torch_pickles

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c636060"
    "600000000400012734270a0000000049454e44ae426082"
)


def read_weights(data: bytes, folder: pathlib.Path) -> None:
    """A file of tensors."""
    (folder / "weights").write_bytes(data)
    for tensor in files.read(folder / "weights").values():
        np.array(tensor)
    files.read_metadata(folder / "weights")


def read_captions(data: bytes, folder: pathlib.Path) -> None:
    """A metadata.jsonl; what is behind a zero byte is a .txt."""
    table, _, text = data.partition(b"\0")
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(PNG)
        (folder / name).with_suffix(".txt").write_bytes(text)
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    if table:
        (folder / "metadata.jsonl").write_bytes(table)
    source = folders.FolderSource(folder, "train", 0.0, "{}")
    for i in range(len(source)):
        assert all(isinstance(text, str) for text in source[i]["captions"])


READERS = {"weights": read_weights, "captions": read_captions}


def check(kind: str, data: bytes, folder: pathlib.Path) -> bool:
    """Whether a reader takes a file; raises what is no UserError of one line."""
    try:
        READERS[kind](data, folder)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error}") from error
        return False
    return True


def main() -> None:
    import atheris

    kind = sys.argv.pop(1)
    for module in (
        files,
        torch_files,
        torch_pickles,
        folders,
        pickletools,
        zipfile,
        json.decoder,
        json.scanner,
    ):
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(function))
    folder = pathlib.Path(tempfile.mkdtemp())

    def once(data: bytes) -> None:
        check(kind, data, folder)

    atheris.Setup(sys.argv, once)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
