"""Files of `torch.save` read without Torch: what Torch itself reads, and nothing executed."""

import collections
import importlib
import importlib.util
import io
import os
import pathlib
import pickle
import runpy
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, torch_pickles

FORMATS = {"zip": True, "legacy": False}


@pytest.fixture(params=sorted(FORMATS))
def save(request, tmp_path):
    """Saves an object in one of Torch's two formats."""

    def write(value, **arguments):
        path = tmp_path / "file.ckpt"
        torch.save(value, path, _use_new_zipfile_serialization=FORMATS[request.param], **arguments)
        return path

    return write


def check_refused(path, *parts: str):
    with pytest.raises(UserError) as error:
        files.read(path)
    message = str(error.value)
    assert message.startswith(f"cannot read weights {path}: ") and "\n" not in message
    for part in parts:
        assert part in message


def assert_same(path, expected: dict[str, torch.Tensor]):
    found = files.read(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert str(tensor.dtype) == f"torch.{found[name].dtype}", name
        theirs = tensor.detach().contiguous()
        if theirs.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            theirs, mine = theirs.float(), found[name].astype(np.float32)
        else:
            mine = found[name]
        np.testing.assert_array_equal(mine, theirs.numpy(), err_msg=name)


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def test_every_dtype_is_read(save):
    values = torch.arange(24).reshape(2, 3, 4) % 5
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    assert_same(save(tensors), tensors)


def test_dtypes_without_a_storage_class_are_read(tmp_path):
    """Their storages are of bytes, and Torch calls `_rebuild_tensor_v3`."""
    values = torch.arange(12).reshape(3, 4)
    dtypes = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn)
    tensors = {str(dtype): values.to(dtype)[1:, ::2] for dtype in dtypes}
    torch.save(tensors, tmp_path / "a.pt")
    assert_same(tmp_path / "a.pt", tensors)


def test_views_share_storages_and_keep_strides_and_offsets(save):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1:, ::2, 1:4],
        "column": base[:, 1, 2],
        "repeated": base[0, 0, :1].expand(7),
        "scalar": base[2, 3, 4],
        "empty": base[:0],
        "tied": base,
        "parameter": torch.nn.Parameter(base[1] + 1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert_same(save(tensors), tensors)


def test_modules_states_are_read(save):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).half()
    assert_same(save(module.state_dict()), module.state_dict())  # an OrderedDict with an attribute


def test_the_state_dict_is_meant_where_there_is_one(save):
    weight = torch.ones(2)
    assert_same(save({"state_dict": {"w": weight}, "other": torch.zeros(3)}), {"w": weight})
    assert_same(save({"w": weight, "state_dict": 3}), {"w": weight})


def test_only_tensors_with_names_are_returned(save):
    weight = torch.ones(2)
    junk = {1: weight, "list": [weight], "number": 3.0, "array": np.ones(2), "text": "abc"}
    junk |= {"path": pathlib.PurePosixPath("a"), "scalar": np.float32(1), "bytes": b"\xff\x00"}
    assert_same(save(junk | {"w": weight}), {"w": weight})


def test_skipped_names_are_not_read(save):
    path = save({"model.a": torch.ones(2), "model_ema.b": torch.ones(3), "first.c": torch.ones(4)})
    assert list(files.read(path, skip=("model.", "first."))) == ["model_ema.b"]


def test_a_published_file_from_2018_is_read():
    """Written by Python 2 on a GPU, with storages of that device."""
    spec = importlib.util.find_spec("lpips")  # importing it would need torchvision
    path = pathlib.Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
    assert_same(path, torch.load(path, map_location="cpu", weights_only=True))


class Harmful:
    """As unpickled by Python's own unpickler, makes a folder."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def harmful(target) -> list:
    return [
        Harmful(os.system, f"mkdir {target}"),
        Harmful(os.mkdir, str(target)),
        Harmful(eval, f"__import__('os').mkdir({str(target)!r})"),
        Harmful(exec, f"import os; os.mkdir({str(target)!r})"),
        Harmful(getattr, Harmful(__import__, "os"), "mkdir"),
        Harmful(subprocess.Popen, ["mkdir", str(target)]),
        Harmful(runpy.run_path, str(target.with_suffix(".py"))),
        Harmful(importlib.import_module, "antigravity"),
    ]


def test_a_pickle_is_not_executed(save, tmp_path):
    target, weight = tmp_path / "made", torch.ones(2)
    for bad in harmful(target):
        for where in ({"state_dict": {"w": weight, "bad": bad}}, {"w": weight, "callbacks": [bad]}):
            check_refused(save(where), "which no weights need")
            assert not target.exists()
    pickle.loads(pickle.dumps(harmful(target)[1]))
    assert target.exists()  # they would do harm if they were


def test_a_pickle_at_the_top_is_not_executed(save, tmp_path):
    for bad in harmful(tmp_path / "made"):
        check_refused(save(bad), "its pickle calls")
    assert not (tmp_path / "made").exists()
    check_refused(save([torch.ones(2)]), "it holds no dict of tensors")


class Callback:
    """As a trainer keeps beside the weights."""

    def __init__(self, monitor: Any):
        self.monitor = monitor


def test_a_name_that_is_unknown_is_never_called(save, tmp_path):
    """Whatever is not refused by its name does nothing either."""
    target, weight = tmp_path / "made", torch.ones(2)
    unlisted = (
        Harmful(tempfile.mkdtemp, "", "made", str(tmp_path)),
        Harmful(pathlib.Path.mkdir, target),
        Harmful(eval_by_another_name, f"__import__('os').mkdir({str(target)!r})"),
    )
    for bad in unlisted:
        assert_same(save({"w": weight, "callbacks": [bad]}), {"w": weight})
        assert not any(path.is_dir() for path in tmp_path.iterdir())
    assert_same(save({"w": weight, "callbacks": {Callback: Callback(3)}}), {"w": weight})


def eval_by_another_name(text: str) -> Any:
    return eval(text)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_pickle_of_the_old_format_is_guarded(tmp_path, first):
    """It is four pickles, one after another; each could be the harmful one."""
    target, stream = tmp_path / "made", io.BytesIO()
    pickles = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    pickles[first] = Harmful(os.mkdir, str(target))
    for value in (*pickles, {}, []):
        pickle.dump(value, stream, protocol=2)
    (tmp_path / "a.pt").write_bytes(stream.getvalue())
    check_refused(tmp_path / "a.pt")
    assert not target.exists()


def with_pickle(path, code: bytes):
    """A zip archive as Torch's whose pickle is `code`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


STORAGE = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"


def tensor_code(offset: int, shape: bytes, strides: bytes) -> bytes:
    """A dict with one tensor, by the opcodes of protocol 0."""
    return (
        b"(dVw\nctorch._utils\n_rebuild_tensor_v2\n"
        + STORAGE
        + b"I%d\n(%st(%stI00\n(dtRs." % (offset, shape, strides)
    )


def test_a_pickle_by_hand_is_read(tmp_path):
    path = with_pickle(tmp_path / "a.pt", tensor_code(1, b"I3\n", b"I1\n"))
    assert_same(path, {"w": torch.tensor([1.0, 2.0, 3.0])})


def test_byte_strings_of_python_2_are_no_obstacle(tmp_path):
    code = tensor_code(0, b"I4\n", b"I1\n").replace(b"(d", b"(dU\x02\xff\xfeI1\ns", 1)
    assert_same(with_pickle(tmp_path / "a.pt", code), {"w": torch.arange(4.0)})


class ViewedStorage:
    """A storage of Torch before 0.4 that is part of another."""


class ViewedTensor:
    def __reduce__(self):
        arguments = (ViewedStorage(), 1, (2,), (1,), False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class OldPickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, ViewedStorage):  # numbers 2, 3 and 4 of a storage of 6
            return ("storage", torch.FloatStorage, "7", "cpu", 6, ("8", 2, 3))
        return None


def test_storages_that_are_parts_of_others_are_read(tmp_path):
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"w": ViewedTensor()},
                  ["7"]):  # fmt: skip
        OldPickler(stream, protocol=2).dump(value)
    stream.write(struct.pack("<q6f", 6, *range(6)))
    (tmp_path / "a.pt").write_bytes(stream.getvalue())
    assert_same(tmp_path / "a.pt", {"w": torch.tensor([3.0, 4.0])})


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "part"),
    [
        (2, b"I3\n", b"I1\n", "'w' reaches beyond its storage"),
        (0, b"I2\nI3\n", b"I2\nI1\n", "'w' reaches beyond its storage"),
        (0, b"I999999999\n", b"I1\n", "'w' reaches beyond its storage"),
        (-1, b"I3\n", b"I1\n", "'w' has no valid shape"),
        (3, b"I3\n", b"I-1\n", "'w' has no valid shape"),
        (0, b"I-3\n", b"I1\n", "'w' has no valid shape"),
        (0, b"Vabc\n", b"I1\n", "'w' has no valid shape"),
        (0, b"I2\nI2\n", b"I1\n", "damaged"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, offset, shape, strides, part):
    path = with_pickle(tmp_path / "a.pt", tensor_code(offset, shape, strides))
    check_refused(path, part)


def test_a_pickle_cannot_change_what_later_reads_use(tmp_path):
    """Its BUILD opcode sets attributes of what it names, those of a pair's second by setattr."""
    before = np.dtype(np.float32).byteorder
    names = (b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
             b"ctrainer\nCallback\n", b"ccollections\nOrderedDict\n")  # fmt: skip
    states = (
        b"(I3\nV>\nNNNI-1\nI-1\nI0\nt",
        b"(N(dV__call__\nI1\nsV__defaults__\nI1\nst",
        b"(dVname\nVfloat64\ns",
    )
    for name in names:
        for state in states:
            path = with_pickle(tmp_path / "bad.pt", name + state + b"b.")
            check_refused(path)
    assert np.dtype(np.float32).byteorder == before
    good = with_pickle(tmp_path / "good.pt", tensor_code(0, b"I4\n", b"I1\n"))
    assert_same(good, {"w": torch.arange(4.0)})


def test_truncated_files_are_refused_wherever_they_end(save):
    path = save({"state_dict": {f"w{i}": torch.randn(20, 10) for i in range(4)}, "epoch": 3})
    whole = path.read_bytes()
    assert len(files.read(path)) == 4
    sizes = {*range(1, 40, 3), *range(40, len(whole), len(whole) // 40), len(whole) - 1}
    for size in sorted(sizes):
        path.write_bytes(whole[:size])
        check_refused(path)
    with pytest.raises(UserError):  # though none of what is missing is asked for
        files.read(path, skip=("w",))


def test_damaged_numbers_of_an_archive_are_noticed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.full((100,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(4, 1.5, np.float32).tobytes()) + 40] ^= 1
    path.write_bytes(content)
    check_refused(path, "damaged or cut short (Bad CRC-32")


def test_archives_that_were_compressed_are_read(tmp_path):
    tensors = {"w": torch.arange(100.0), "half": torch.ones(3, 5).half()}
    torch.save(tensors, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    assert_same(tmp_path / "b.pt", tensors)


def test_other_archives_and_pickles_are_refused(tmp_path, save):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", b"x")
    check_refused(path, "a zip archive, but not one that torch.save wrote")
    path.write_bytes(pickle.dumps([1, 2], protocol=4) + b" " * 20)
    check_refused(path, "a pickle, but not one that torch.save wrote")
    check_refused(save([torch.ones(2)]), "it holds no dict of tensors")


def test_big_endian_files_are_refused(tmp_path):
    path = with_pickle(tmp_path / "a.pt", tensor_code(0, b"I4\n", b"I1\n"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    check_refused(path, "big-endian")
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}, {}, []):
        pickle.dump(value, stream, protocol=2)
    (tmp_path / "b.pt").write_bytes(stream.getvalue())
    check_refused(tmp_path / "b.pt", "big-endian")


def test_deep_pickles_end_in_a_message(tmp_path):
    depth = 10 * sys.getrecursionlimit()
    check_refused(with_pickle(tmp_path / "a.pt", b"(l" * depth + b"a" * (depth - 1) + b"."))


# Files that are small and would take much.


def archive_of(path, pickled: bytes, members=(), **options):
    """An archive like Torch's with a pickle of one's own."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in members:
            archive.writestr(f"archive/data/{name}", content)
    return path


def of_tensor(size: int, shape, strides, names=("w",)) -> bytes:
    """The pickle of a dict with a tensor of float32, or several, each of its own storage."""

    class Rebuilt:
        def __init__(self, key):
            self.key = key

        def __reduce__(self):
            storage = Storage(self.key)
            return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, {})

    class Storage(Rebuilt):
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, value.key, "cpu", size)
            return None

    file = io.BytesIO()
    Pickler(file, 2).dump({name: Rebuilt(str(i)) for i, name in enumerate(names)})
    return file.getvalue()


@pytest.mark.parametrize("put", [b"r" + struct.pack("<I", 2**31), b"p2147483648\n", b"q\xff"])
def test_numbers_of_objects_that_are_not_there_take_no_memory(tmp_path, put, save):
    """The unpickler would make a list of four thousand million places for the first."""
    check_refused(archive_of(tmp_path / "a.ckpt", b"\x80\x02}" + put + b"."), "numbers objects")
    path = save({"w": torch.zeros(3)})
    path.write_bytes(b"\x80\x02}" + put + b".")
    check_refused(path, "numbers objects")


def test_a_tensor_that_repeats_one_number_for_ever_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    archive_of(path, of_tensor(1, (10**6, 10**6), (0, 0)), [("0", bytes(4))])
    check_refused(path, f"its tensors would take {4 * 10**12} bytes, and the file has only")
    archive_of(path, of_tensor(1, (1000, 10), (0, 0)), [("0", bytes(4))])
    assert files.read(path)["w"].shape == (1000, 10)


def test_parts_that_unpack_to_far_more_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    packed = {"compression": zipfile.ZIP_DEFLATED}
    archive_of(path, of_tensor(2**25, (2**25,), (1,)), [("0", bytes(2**27))], **packed)
    check_refused(path, f"its parts up to archive/data/0 would take {2**27} bytes")
    with zipfile.ZipFile(path, "w", **packed) as archive:
        archive.writestr("archive/data.pkl", of_tensor(1, (1,), (1,)))
        archive.writestr("archive/byteorder", bytes(2**27))
    tracemalloc.start()
    check_refused(path, "its numbers are big-endian")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    monkeypatch.setattr(torch_pickles, "MAX_PICKLE", 10**6)
    archive_of(path, b"\x80\x02}(" + b"N" * 2 * 10**6 + b"u.", **packed)
    check_refused(path, "its pickle has more than 0 MiB")


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_parts_that_unpack_to_more_than_they_say_take_no_memory(tmp_path, part):
    path = archive_of(tmp_path / "a.ckpt", of_tensor(25, (25,), (1,)))
    pickled = zipfile.ZipFile(path).read("archive/data.pkl")
    contents = {"data.pkl": pickled, "data/0": bytes(100)} | {part: pickled + bytes(2**27)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"archive/{name}", content)
    whole = bytearray(path.read_bytes())
    entry = whole.index(f"archive/{part}".encode(), whole.index(b"PK\x01\x02")) - 46
    struct.pack_into("<I", whole, entry + 24, 100)
    path.write_bytes(whole)
    tracemalloc.start()
    check_refused(path, "damaged")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "byteorder"])
@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_parts_that_are_packed_otherwise_are_refused(tmp_path, part, packing):
    """Python unpacks all that is there of them, however few bytes are asked for."""
    path = archive_of(tmp_path / "a.ckpt", of_tensor(25, (25,), (1,)))
    contents = {"data.pkl": zipfile.ZipFile(path).read("archive/data.pkl"), "byteorder": b"little"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (contents | {"data/0": bytes(100)}).items():
            kind = packing if name == part else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, compress_type=kind)
    check_refused(path, f"archive/{part} in it is packed in a way that archives of Torch are not")


def test_many_parts_that_unpack_to_a_little_more_are_refused(tmp_path):
    pickled = of_tensor(2**24, (2**24,), (1,), names="abc")
    members = [(str(i), bytes(2**26)) for i in range(3)]
    path = archive_of(tmp_path / "a.ckpt", pickled, members, compression=zipfile.ZIP_DEFLATED)
    check_refused(path, f"its parts up to archive/data/1 would take {2**27} bytes")


def test_parts_of_parts_are_not_read_again_and_again(tmp_path):
    """Each is all that follows it in the file: their sums would take as many times its bytes."""
    keys = "0123456789"
    path = archive_of(tmp_path / "a.ckpt", of_tensor(2**22, (2**22,), (1,), keys))
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    head, own = path.read_bytes()[:start], path.read_bytes()[start:]
    own = own[: own.rindex(b"PK\x05\x06")]  # the pickle's entry in the directory
    data, entries = bytes(2**24), []
    for key in reversed(keys):
        name = f"archive/data/{key}".encode()
        described = struct.pack("<IIIHH", zlib.crc32(data), len(data), len(data), len(name), 0)
        data = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 0, 0, 33) + described + name + data
        entries.append((name, described, len(data)))
    directory = own + b"".join(
        b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 33) + described
        + struct.pack("<HHHII", 0, 0, 0, 0, start + len(data) - size) + name
        for name, described, size in entries
    )  # fmt: skip
    end = struct.pack("<HHHHIIH", 0, 0, 11, 11, len(directory), start + len(data), 0)
    path.write_bytes(head + data + directory + b"PK\x05\x06" + end)
    check_refused(path, "its parts up to archive/data/8 would take")


FLOATS = b"ctorch\nFloatStorage\n"
STORED = b"(X\x07\x00\x00\x00storage" + FLOATS + b"X\x01\x00\x00\x000NK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (b"ctorch._utils\n_rebuild_parameter\n", "Function"),
        (b"ccollections\nOrderedDict\n", "Function"),
        (FLOATS, "DType"),
        (STORED, "Storage"),
        (REBUILD + b"(" + STORED + b"K\x00K\x04\x85K\x01\x85tR", "Tensor"),
    ],
)
@pytest.mark.parametrize(
    "state", [b"}", b"}X\x04\x00\x00\x00nameNs", b"N}X\x01\x00\x00\x00aNs\x86"]
)
def test_what_tensors_are_made_of_cannot_be_changed(tmp_path, made, what, state):
    pickled = b"\x80\x02" + made + state + b"b."
    check_refused(with_pickle(tmp_path / "a.ckpt", pickled), f"its pickle changes a {what}")


def test_a_function_cannot_be_made_to_call_itself(tmp_path):
    """A `functools.partial` takes a function and arguments from a pickle, and ends the process."""
    state = b"(h\x00)}Ntb"  # (itself, (), {}, None)
    pickled = b"\x80\x02ctorch._utils\n_rebuild_parameter\nq\x00" + state + b")R."
    check_refused(with_pickle(tmp_path / "a.ckpt", pickled), "its pickle changes a Function")


PAIR = b"2\x86"  # a tuple of the last object, twice
# A set of the last one and a tuple of it, in that order 50 times: to compare two takes 2^50 steps.
SETS = b"(\x91" + b"q\x010(h\x01h\x01\x85\x91" * 50


@pytest.mark.parametrize(
    "pickled",
    [
        b"}" + b")" + PAIR * 60 + b"Ns.",  # whose hash takes 2^60 steps
        b"}" + b")" + PAIR * 20 + b"q\x01Ns" + b"h\x01Ns" * 200 + b".",  # and 200 times 2^20
        b"}" + b")" + b"q\x01h\x01h\x01\x86" * 60 + b"Ns.",
        b"}" + b"}" * 1_100_000 + b".",
        b"}" + SETS + b"Ns" + SETS + b"Ns" + b".",
        b"}(" + b"K\x01K\x02\x86N" * 20_000 + b"u.",  # keys that could have one hash
        b"}(" + (b"\x8a\x0a" + bytes(9) + b"\x01N") * 1_001 + b"u.",
        # A tensor whose offset is a tuple without end, as the key of a dict, many times.
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x010ctorch\nFloatStorage\nq\x020"
        + b"(X\x07\x00\x00\x00storageh\x02X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQq\x030"
        + b"}(h\x01h\x03)" + PAIR * 20 + b"))oq\x04N" + b"s" + b"h\x04Ns" * 200 + b".",
        b"".join(b"ca\nb%d\n0" % i for i in range(20_000)) + b"}.",
        b"ccollections\nOrderedDict\nq\x000]q\x01((X\x01\x00\x00\x00aNt" + b"2" * 2000
        + b"e0" + b"h\x00(h\x01tR0" * 1000 + b"}.",
    ],
)  # fmt: skip
def test_pickles_that_would_take_for_ever_are_refused(tmp_path, pickled):
    start = time.monotonic()
    said = "without end in each other|keys of tuples|very large|beside tensors|operations|items"
    with pytest.raises(UserError, match=said):
        files.read(archive_of(tmp_path / "a.ckpt", b"\x80\x02" + pickled))
    assert time.monotonic() - start < 60
