"""Notes in the metadata of single files."""

import json

import numpy as np
import pytest

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, single_files
from latent_diffusion_jax.weights.single_files import NOTES, Notes


def test_notes_are_read_as_they_were_written(tmp_path):
    notes = Notes(num_heads=3, settings={"steps": 7, "spacing": "leading"}, label_names=["a", "ü"])
    path = tmp_path / "a.safetensors"
    files.write(path, {"w": np.zeros(1)}, notes.metadata())
    assert single_files.read_notes(path) == notes
    files.write(path, {"w": np.zeros(1)}, {"format": "pt"})
    assert single_files.read_notes(path) == Notes()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "5", "null", '{"x": 1}', '{"num_heads": "3"}', '{"num_heads": 3.0}',
        '{"settings": []}', '{"label_names": [1]}', '{"tokenizer": {"a": 1}}',
        '{"settings":' + "[" * 100_000, '{"num_heads":' + "9" * 5_000 + "}",
        json.dumps({"settings": {"a": "x"}}).replace('"x"', '{"a":' * 900 + "1" + "}" * 900),
    ],
    ids=range(14),
)  # fmt: skip
def test_notes_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    files.write(path, {"w": np.zeros(1)}, {NOTES: text})
    with pytest.raises(UserError, match=f"the metadata '{NOTES}' of {path} is damaged"):
        single_files.read_notes(path)
