"""Inputs damaged at random: each ends in the right result or in one named error, soon.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_mutations.py

does it with 1,000 of them; without `-m slow` it is some of each kind. What a format has no sums for
cannot be told from the right thing: other numbers in a safetensors file, other colours in an image.
"""

import copy
import faulthandler
import io
import json
import pathlib
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from configs import class_cond, txt2img
from latent_diffusion_jax import loading
from latent_diffusion_jax.config_checks import check_config
from latent_diffusion_jax.convert import convert
from latent_diffusion_jax.data.pipeline import DecodedSource
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.planning import programs
from latent_diffusion_jax.runtime import checkpoints, images, sharding
from latent_diffusion_jax.runtime.commands import flatten
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.weights import files, single_files
from tests import ldm_files, stable_diffusion_files

SECONDS = 20.0  # for one input
GROWTH = 700  # MiB of memory that all of a kind may take more than before

pytestmark = pytest.mark.filterwarnings("ignore")
few_and_many = pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, removed, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
        elif kind == 2 and len(data) > 1:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.choice([1, 4, 100])]
        elif kind == 4:
            data[at:at] = data[max(0, at - 30) : at]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 8]))
        if not data:
            break
    return bytes(data)


def peak_memory() -> float:
    """MiB, the most that this process has had."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak) / 1024


def drill(count, attempt):
    """Calls attempt(rng), which gives whether the input was refused, for inputs of these seeds."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, refused = peak_memory(), 0
    for seed in range(count):
        start = time.monotonic()
        faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # of what hangs for good
        refused += attempt(random.Random(seed))
        faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - start < SECONDS, f"seed {seed} took too long"
    grown = peak_memory() - before
    print(f"\n{refused} of {count} refused, {grown:.0f} MiB more")
    assert grown < GROWTH
    assert 0 < refused <= count


def is_refused(call, *names) -> bool:
    """Whether a call ends with a UserError; it is one line and names what was wrong."""
    try:
        call()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 20_000, text[:500]
        assert all(str(name) in text for name in names), text
        return True
    return False


# Weights.

TENSORS = {
    "model.a": np.arange(600, dtype=np.float32).reshape(20, 30),
    "model.b": np.arange(7, dtype=np.int64),
    "model.c": np.ones((3, 4), np.float16),
}


def weights_file(kind: str, path: pathlib.Path) -> bytes:
    if kind == "safetensors":
        files.write(path, TENSORS, {"format": "pt"})
    else:
        tensors = {name: torch.from_numpy(x) for name, x in TENSORS.items()}
        state = {"state_dict": tensors, "epoch": 3}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@few_and_many
def test_weights(tmp_path, kind, count):
    path = tmp_path / "weights"
    whole = weights_file(kind, path)

    def attempt(rng):
        path.write_bytes(mutate(whole, rng))

        def read():
            for name, found in files.read(path).items():
                assert isinstance(name, str) and found.nbytes < 10**6
                np.array(found)  # all of it is there
                if kind == "zip" and name in TENSORS:  # its numbers have sums
                    same = found.shape == TENSORS[name].shape and found.dtype == TENSORS[name].dtype
                    assert not same or np.array_equal(found, TENSORS[name], equal_nan=True)

        return is_refused(read, path)

    drill(count, attempt)


# What configs and notes say of models, to whole models' readers.

SAID: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 32, 64, 10**6, 2**20, 10**9, 10**12, 10**30, 10**400, -(10**30), 0.5, -0.5,
    1e-300, 1e300, float("nan"), float("inf"), "", "x", "3", "x" * 10**4, True, False, None, [], {},
    [0], [1, 2], [-1, 10**12], ["x"], [[1]], [None], {"a": 1}, [32] * 14, [32] * 70, [1] * 10**5,
    ["DownBlock2D"] * 14,
)  # fmt: skip


def mutate_said(said: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What a JSON object says, with one or two values of another size or kind, or without them."""
    said = copy.deepcopy(said)
    for key in rng.sample(sorted(said), min(len(said), rng.choice([1, 1, 2]))):
        inner = said[key]
        kind = rng.randrange(8)
        if kind == 0:
            del said[key]
        elif kind < 3 and isinstance(inner, list) and inner:
            inner[rng.randrange(len(inner))] = rng.choice(SAID)
        elif kind < 3 and isinstance(inner, dict) and inner:
            inner[rng.choice(sorted(inner))] = rng.choice(SAID)
        else:
            said[key] = rng.choice(SAID)
    return said


def load_whole(path: pathlib.Path):
    leaves = jax.tree.leaves(loading.load_model(path).params)
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("kind", ["stable_diffusion", "ldm", "unconditional"])
@few_and_many
def test_what_folders_say(tmp_path, kind, count):
    folder = tmp_path / "model"
    if kind == "stable_diffusion":
        stable_diffusion_files.make_pipeline(folder)
    elif kind == "ldm":
        ldm_files.make_text_to_image(folder)
    else:
        ldm_files.make_unconditional(folder)
    names = ("config.json", "scheduler_config.json", "model_index.json")
    contents = {path: path.read_text() for path in folder.rglob("*.json") if path.name in names}
    assert len(contents) >= 4

    def attempt(rng):
        path = rng.choice(sorted(contents))
        said = mutate_said(json.loads(contents[path]), rng)
        path.write_text(json.dumps(said))
        try:
            return is_refused(lambda: load_whole(folder), folder)
        except Exception as error:
            text = f"{path.name} of {path.parent.name}: {type(error).__name__}: {error}"
            raise AssertionError(f"{text[:500]}, of {said}"[:2000]) from None
        finally:
            path.write_text(contents[path])

    drill(count, attempt)
    load_whole(folder)


@few_and_many
def test_what_notes_say(tmp_path, count):
    stable_diffusion_files.make_pipeline(tmp_path / "in", groups=32, width=64)
    path = tmp_path / "model.safetensors"
    convert([str(tmp_path / "in")], "compvis", str(path), part="model")
    tensors = {name: np.array(tensor) for name, tensor in files.read(path).items()}
    said = json.loads(files.read_metadata(path)[single_files.NOTES])

    def attempt(rng):
        mutated = mutate_said(said, rng)
        files.write(path, tensors, {single_files.NOTES: json.dumps(mutated)})
        try:
            return is_refused(lambda: load_whole(path), path)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{text[:500]}, of {mutated}"[:2000]) from None

    assert len(said) >= 4
    drill(count, attempt)
    files.write(path, tensors, {single_files.NOTES: json.dumps(said)})
    load_whole(path)


# Checkpoints.


@few_and_many
def test_checkpoints(tmp_path, count):
    state = {
        "params": {"kernel": jax.random.normal(jax.random.key(0), (64, 130)), "bias": jnp.ones(5)},
        "step": jnp.int32(7),
    }
    items = {"data": {"next_index": 7}, "config": {"x": [1, 2]}, "info": {"scale_factor": 0.5}}
    with checkpoints.open_manager(tmp_path / "s", create=True) as manager:
        checkpoints.save(manager, 7, state, items)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    contents = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}

    def read():
        for name, value in items.items():
            assert checkpoints.read_json(tmp_path / "s", 7, name) == value
        with checkpoints.open_manager(tmp_path / "s") as manager:
            found = checkpoints.restore_state(manager, 7, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, state)

    def attempt(rng):
        path = rng.choice(sorted(contents))
        if rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(mutate(contents[path], rng))
        refused = is_refused(read, tmp_path / "s" / "7")
        path.write_bytes(contents[path])
        return refused

    drill(count, attempt)
    read()


# Images and captions.


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "bmp", "npy"])
@few_and_many
def test_images(kind, count):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, kind)

    def attempt(rng):
        try:
            image = images.decode(mutate(file.getvalue(), rng))
        except (ValueError, images.ChannelsError) as error:
            assert not isinstance(error, UserError)
            return True
        cropped = images.resize_and_crop(image, 16)
        assert cropped.shape == (16, 16, 3) and cropped.dtype == np.uint8
        return False

    drill(count if kind != "png" else 2 * count, attempt)


@pytest.mark.parametrize("kind", ["metadata.jsonl", "txt"])
@few_and_many
def test_captions(tmp_path, kind, count):
    rows = []
    for i in range(4):
        Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"ein rotes Bild, {i} · größer"}))
        if kind == "txt":
            (tmp_path / f"{i}.txt").write_text(f"ein rotes Bild, {i} · größer")
    path = tmp_path / ("metadata.jsonl" if kind != "txt" else "2.txt")
    if kind != "txt":
        path.write_text("\n".join(rows))
    whole = path.read_bytes()

    def attempt(rng):
        path.write_bytes(mutate(whole, rng))

        def read():
            source = DecodedSource(open_source(str(tmp_path), "train", holdout_share=0.0), 0.0)
            for i in range(len(source)):
                record = source[i]
                assert record["captions"] and all(isinstance(c, str) for c in record["captions"])
                assert "\x1b" not in "".join(record["captions"])

        return is_refused(read, tmp_path)

    drill(count, attempt)


# Configs.

VALUES = (
    0, 1, -1, 3, 7, 10**6, 0.5, -0.5, 1.5, float("nan"), float("inf"), "", "x", "none", "text",
    True, False, (), (0,), (1, 2), (0, 7), ("x",), None,
)  # fmt: skip


@few_and_many
def test_configs(count):
    configs = [txt2img.get_config("smoke"), class_cond.get_config("smoke")]
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})

    def attempt(rng):
        config = rng.choice(configs).copy_and_resolve_references()
        keys = rng.sample(sorted(flatten(config)), rng.choice([1, 1, 2]))
        changes = {key: rng.choice(VALUES) for key in keys}
        try:
            config.update_from_flattened_dict(changes)
        except (TypeError, ValueError):  # ml_collections sees another type, as the flags do
            return True

        def build_all():
            check_config(config)
            with as_user_error("the config's parts do not fit together"):  # as in `train`
                for name in ("first_stage", "diffusion"):
                    programs.make(config, name, mesh, 8, 10)

        try:
            return is_refused(build_all)
        except Exception as error:
            raise AssertionError(f"{changes}: {type(error).__name__}: {error}") from error

    drill(count, attempt)
