"""safetensors files in and out; Torch's are in test_torch_files.py."""

import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, folders


def check_refused(path, *parts: str):
    with pytest.raises(UserError) as error:
        files.read(path)
    message = str(error.value)
    assert message.startswith(f"cannot read weights {path}: ") and "\n" not in message
    for part in parts:
        assert part in message


DTYPES = (
    np.float64, np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, np.int64,
    np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_, np.complex64,
)  # fmt: skip


def test_every_dtype_of_torch_is_read(tmp_path):
    tensors = {
        np.dtype(dtype).name: (torch.arange(6).reshape(2, 3) % 5).to(
            getattr(torch, np.dtype(dtype).name)
        )
        for dtype in DTYPES
    }
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    found = files.read(path)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert array.dtype.name == name and not array.flags.writeable
        expected = (np.arange(6).reshape(2, 3) % 5).astype(array.dtype)
        np.testing.assert_array_equal(array, expected)


def test_what_is_written_is_read_by_torch_and_by_us(tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    tensors = {
        "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "half": np.arange(5).astype(jnp.bfloat16),
    }
    files.write(path, tensors, {"format": "pt"})
    theirs = safetensors.torch.load_file(path)
    ours = files.read(path)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor)
        np.testing.assert_array_equal(theirs[name].float().numpy(), tensor.astype(np.float32))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_can_be_written_over_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {"w": np.arange(1000.0)})
    mapped = files.read(path)
    files.write(path, {"w": 2 * mapped["w"]})
    np.testing.assert_array_equal(mapped["w"], np.arange(1000.0))
    np.testing.assert_array_equal(files.read(path)["w"], 2 * np.arange(1000.0))


def test_skipped_names_are_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {name: np.zeros(2) for name in ("model.a", "model_ema.b", "first.c")})
    assert list(files.read(path, skip=("model.", "first."))) == ["model_ema.b"]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.safetensors"
    with pytest.raises(UserError, match=f"cannot write weights {path}: File exists"):
        files.write(path, {"w": np.zeros(2)})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot write weights {tmp_path}/folder: "):
        files.write(tmp_path / "folder", {"w": np.zeros(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_no_file_a_folder_and_an_empty_file_are_named(tmp_path):
    check_refused(tmp_path / "none.safetensors", "No such file")
    check_refused(tmp_path, "Is a directory")
    (tmp_path / "empty").write_bytes(b"")
    check_refused(tmp_path / "empty", "it is empty")


def test_a_pipe_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)  # of which reading would wait for ever
    check_refused(path, "it is no ordinary file")
    with pytest.raises(UserError, match=f"cannot read weights {path}: it is no ordinary file"):
        files.read_metadata(path)
    with pytest.raises(UserError, match=f"cannot read {path}: it is no ordinary file"):
        folders.read_json(path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"hello", b'{"a": 1}' * 9, b"\x89PNG" * 10])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    check_refused(path, "neither a safetensors file nor one that torch.save wrote")


def test_truncated_files_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {f"w{i}": np.random.default_rng(i).normal(size=(5, 7)) for i in range(4)})
    whole = path.read_bytes()
    for size in (*range(1, 40, 3), *range(40, len(whole), 37), len(whole) - 1):
        path.write_bytes(whole[:size])
        check_refused(path, "neither" if size < 9 else "cut short")
    path.write_bytes(whole + b"\0")
    check_refused(path, "it is damaged", f"{len(whole) + 1} bytes and should have {len(whole)}")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ({"w": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}, "unknown dtype 'F7'"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "'w' has the wrong number"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 8]}}, "'w' does not follow"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "'w' does not follow"),
        (
            {
                "v": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "'w' does not follow the one before it",
        ),
        (
            {
                "v": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            },
            "'w' does not follow",
        ),
        ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "damaged"),
        ({"w": [0, 8]}, "damaged"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, header, part):
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    check_refused(path, part)


@pytest.mark.parametrize("entry", [{"dtype": "F7"}, {"dtype": "F32", "shape": [3]}, {"shape": 1}])
def test_long_names_are_cut_in_messages(tmp_path, entry):
    name = "begin" + 3_000_000 * "a\n" + "end"
    text = json.dumps({name: {"shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError) as error:
        files.read(path)
    assert len(str(error.value)) < 3_000 and "\n" not in str(error.value)


ONE = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("{" + ONE + "," + ONE + "}", "its header has a name twice"),
        ('{"__metadata__": {"a": 1},' + ONE + "}", "its __metadata__ is not of texts"),
        ('{"__metadata__": ["a"],' + ONE + "}", "its __metadata__ is not of texts"),
        ("[" * 100_000, "neither a safetensors file nor"),
    ],
)
def test_headers_that_other_readers_refuse_are_refused_for_their_metadata_too(
    tmp_path, header, part
):
    path = tmp_path / "a.safetensors"
    header = header if header.startswith("{") else '{"w":' + header
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    check_refused(path, part)
    with pytest.raises(UserError, match=f"cannot read weights {path}: .*{part}"):
        files.read_metadata(path)
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read weights {path}: No such file"):
        files.read_metadata(path)


def test_metadata_is_that_of_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {"w": np.zeros(3, np.float32)}, {"a": "ü", "b": ""})
    assert files.read_metadata(path) == {"a": "ü", "b": ""}
    files.write(path, {"w": np.zeros(3, np.float32)})
    assert files.read_metadata(path) == {}


@pytest.mark.parametrize(
    "places", [{"a": ["x"]}, {"a": {}}, {"a": "../x"}, {"a": ""}, {}, [], None]
)
def test_indexes_that_name_no_files_beside_them_are_refused(tmp_path, places):
    index = tmp_path / f"{folders.DIFFUSERS_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=f"{index} has no weight_map from tensors to files"):
        folders.read_tensors(tmp_path)
