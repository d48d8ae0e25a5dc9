"""Checkpoints: what was saved comes back, anywhere; what is broken is named."""

import contextlib
import gc
import json
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.runtime import checkpoints, retention, sharding
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training.state import State

# From Orbax, after an array that cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ITEMS = {"data": {"next_index": 3}, "config": {"betas": [0.5, 0.9], "name": "x"}, "info": {}}


def init(seed=0) -> State:
    """A state like a stage's: several networks, numbers of several types."""
    params = {
        "unet": {"kernel": jax.random.normal(jax.random.key(seed), (1024, 512))},
        "conditioner": {"bias": jnp.arange(3.0) + seed},
    }
    ema = {"unet": {"kernel": jnp.arange(64.0) + seed}}
    opt = ({"mu": jnp.full((16, 8), seed, jnp.bfloat16)}, jnp.int32(7))
    return State(jnp.int32(seed), params, ema, opt)


def mesh_of(devices, fsdp=-1):
    return sharding.make_mesh({"data": 1, "fsdp": fsdp, "tensor": 1}, devices)


def wanted(mesh) -> State:
    shapes = jax.eval_shape(init)
    return checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))


def make_state(mesh, seed=0) -> State:
    shardings = sharding.state_sharding(jax.eval_shape(init), mesh)
    return jax.jit(init, static_argnums=0, out_shardings=shardings)(seed)


def save(directory, steps, items=ITEMS, keep=5, state=None):
    state = make_state(mesh_of(jax.devices())) if state is None else state
    with checkpoints.open_manager(directory, kept=retention.Kept(keep), create=True) as manager:
        for step in steps:
            checkpoints.save(manager, step, state, items)
        manager.wait_until_finished()


def test_a_save_in_the_middle_of_another_error_is_a_save(tmp_path):
    """As where data are gone, and what was learned is kept."""
    try:
        raise OSError("data are gone")
    except OSError:
        save(tmp_path, [1, 2])
    assert checkpoints.latest_step(tmp_path) == 2


def restore(directory, step, shapes):
    with checkpoints.open_manager(directory) as manager:
        return checkpoints.restore_state(manager, step, shapes)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stage's folder with a checkpoint of step 5; tests must not change it."""
    directory = tmp_path_factory.mktemp("run") / "diffusion"
    save(directory, [5])
    return directory


@pytest.fixture
def copy_of_saved(saved, tmp_path):
    """A copy of `saved` for tests that damage it."""
    return shutil.copytree(saved, tmp_path / "copy")


@contextlib.contextmanager
def raises_user_error(directory, step, *parts):
    """Expects a UserError of one line that names the checkpoint and says these."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    with pytest.raises(UserError, match=rf"^{pattern}.*{directory}/{step}: [^\n]*$"):
        yield
    gc.collect()  # drops the reads that Orbax left unfinished here, not in a later test


# What was saved comes back.


def test_round_trip_with_shardings(saved):
    mesh = mesh_of(jax.devices())
    found = restore(saved, 5, wanted(mesh))
    assert_same(found, make_state(mesh))
    same = jax.tree.map(lambda x, y: x.sharding == y.sharding, found, make_state(mesh))
    assert all(jax.tree.leaves(same))
    kernel = found.params["unet"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // jax.device_count()


@pytest.mark.parametrize("count", [1, 2])
def test_restores_onto_another_number_of_devices(saved, count):
    mesh = mesh_of(jax.devices()[:count])
    found = restore(saved, 5, wanted(mesh))
    assert_same(found, init())
    assert found.params["unet"]["kernel"].sharding.device_set == set(jax.devices()[:count])


def test_each_step_has_its_own_state(tmp_path):
    mesh = mesh_of(jax.devices())
    for step in (1, 2):
        save(tmp_path / "s", [step], state=make_state(mesh, seed=step))
    for step in (1, 2):
        assert_same(restore(tmp_path / "s", step, wanted(mesh)), make_state(mesh, seed=step))


def test_a_step_that_is_there_is_not_overwritten(tmp_path):
    mesh = mesh_of(jax.devices())
    save(tmp_path / "s", [1], state=make_state(mesh, seed=1))
    save(tmp_path / "s", [1], state=make_state(mesh, seed=2))
    assert_same(restore(tmp_path / "s", 1, wanted(mesh)), make_state(mesh, seed=1))


def test_restore_part(saved):
    mesh = mesh_of(jax.devices()[:1])
    found = checkpoints.restore_part(saved, 5, {"ema": wanted(mesh).ema})
    assert_same(found, {"ema": init().ema})


def overwrite_large_files(step_directory):
    """Overwrites the middle of the files in which the large arrays lie."""
    large = [path for path in step_directory.rglob("*")
             if path.is_file() and path.stat().st_size > 2**17]  # fmt: skip
    assert large
    for path in large:
        data = bytearray(path.read_bytes())
        quarter = len(data) // 4
        data[quarter : 3 * quarter] = bytes(2 * quarter)
        path.write_bytes(data)


def test_restore_part_reads_nothing_else(copy_of_saved):
    overwrite_large_files(copy_of_saved / "5")  # that is `params`
    mesh = mesh_of(jax.devices()[:1])
    found = checkpoints.restore_part(copy_of_saved, 5, {"ema": wanted(mesh).ema})
    assert_same(found, {"ema": init().ema})
    with raises_user_error(copy_of_saved, 5):
        checkpoints.restore_part(copy_of_saved, 5, {"params": wanted(mesh).params})


# JSON items.


def test_read_json(saved):
    for item, value in ITEMS.items():
        assert checkpoints.read_json(saved, 5, item) == value


def test_missing_json_item(saved):
    with raises_user_error(saved, 5, "tokenizer"):  # saved without one
        checkpoints.read_json(saved, 5, "tokenizer")


def test_damaged_json_item(copy_of_saved):
    for path in (copy_of_saved / "5" / "config").iterdir():
        path.write_text('{"cut off')
    with raises_user_error(copy_of_saved, 5):
        checkpoints.read_json(copy_of_saved, 5, "config")


def test_items_that_are_none_are_left_out(tmp_path):
    save(tmp_path / "s", [1], ITEMS | {"tokenizer": None})
    assert not (tmp_path / "s" / "1" / "tokenizer").exists()
    assert checkpoints.read_json(tmp_path / "s", 1, "config") == ITEMS["config"]


def test_tokenizer_is_a_file_that_tokenizers_loads(tmp_path):
    tokenizer = tokenizers.train(["a small duck", "two large geese"], 300, 8)
    save(tmp_path / "s", [1], ITEMS | {"tokenizer": json.loads(tokenizer.to_str())})
    file = tmp_path / "s" / "1" / "tokenizer" / "tokenizer.json"
    loaded = Tokenizer.from_file(str(file))
    for text in ("a small goose", "large " * 20):
        assert loaded.encode(text).ids == tokenizer.encode(text).ids
    text = json.dumps(checkpoints.read_json(tmp_path / "s", 1, "tokenizer"))
    assert tokenizers.load(text).encode("a duck").ids == tokenizer.encode("a duck").ids


# What does not fit, or is broken, is named.


def changed(shapes: State, **unet) -> State:
    return shapes.replace(params=shapes.params | {"unet": unet})


def test_everything_that_does_not_fit_is_named(saved):
    shapes = wanted(mesh_of(jax.devices()))
    kernel = shapes.params["unet"]["kernel"]
    halves = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    asked = shapes.replace(params={"unet": {"kernel": halves, "scale": kernel}}, ema=None)
    with raises_user_error(
        saved, 5, "no params/unet/scale", "params/conditioner/bias, which nothing asks for",
        r"params/unet/kernel float32\[1024, 512\] in place of bfloat16\[1024, 512\]",
        "ema/unet/kernel, which nothing asks for",
    ):  # fmt: skip
        restore(saved, 5, asked)


def test_wrong_shape(saved):
    shapes = wanted(mesh_of(jax.devices()))
    kernel = shapes.params["unet"]["kernel"]
    wrong = jax.ShapeDtypeStruct((1024, 1024), kernel.dtype, sharding=kernel.sharding)
    with raises_user_error(saved, 5, "512", "1024"):
        restore(saved, 5, changed(shapes, kernel=wrong))
    with raises_user_error(saved, 5, "512", "1024"):
        checkpoints.restore_part(saved, 5, {"params": changed(shapes, kernel=wrong).params})


def test_missing_leaf(saved):
    shapes = wanted(mesh_of(jax.devices()))
    kernel = shapes.params["unet"]["kernel"]
    with raises_user_error(saved, 5, "scale"):
        restore(saved, 5, changed(shapes, kernel=kernel, scale=kernel))


def test_leaf_that_nobody_asked_for(saved):
    shapes = wanted(mesh_of(jax.devices()))
    with raises_user_error(saved, 5, "bias"):
        restore(saved, 5, shapes.replace(params={"unet": shapes.params["unet"], "conditioner": {}}))


def test_missing_leaf_of_a_part(saved):
    shapes = wanted(mesh_of(jax.devices()))
    kernel = shapes.params["unet"]["kernel"]
    asked = changed(shapes, kernel=kernel, scale=kernel)
    with raises_user_error(saved, 5, "scale"):
        checkpoints.restore_part(saved, 5, {"params": asked.params})


def test_missing_part(saved):
    with raises_user_error(saved, 5, "average"):
        checkpoints.restore_part(saved, 5, {"average": wanted(mesh_of(jax.devices())).ema})


def test_missing_step(saved):
    shapes = wanted(mesh_of(jax.devices()))
    with raises_user_error(saved, 9):
        restore(saved, 9, shapes)
    with raises_user_error(saved, 9):
        checkpoints.restore_part(saved, 9, {"ema": shapes.ema})
    with raises_user_error(saved, 9):
        checkpoints.read_json(saved, 9, "config")


def test_damaged_state(copy_of_saved):
    overwrite_large_files(copy_of_saved / "5")
    with raises_user_error(copy_of_saved, 5):
        restore(copy_of_saved, 5, wanted(mesh_of(jax.devices())))


def test_of_a_damaged_one_the_one_before_is_offered(tmp_path):
    save(tmp_path / "s", [3, 4], keep=2)
    shapes = wanted(mesh_of(jax.devices()))
    overwrite_large_files(tmp_path / "s" / "4")
    with raises_user_error(tmp_path / "s", 4, "step 3, is still there"):
        restore(tmp_path / "s", 4, shapes)
    shutil.rmtree(tmp_path / "s" / "4")
    assert checkpoints.latest_step(tmp_path / "s") == 3
    assert_same(restore(tmp_path / "s", 3, shapes), make_state(mesh_of(jax.devices())))


def test_of_those_before_one_that_is_empty_is_not_offered(tmp_path):
    save(tmp_path, [1, 2, 3])
    shutil.rmtree(tmp_path / "2" / "state")
    overwrite_large_files(tmp_path / "3")
    with raises_user_error(tmp_path, 3, "The one before, of step 1,"):
        restore(tmp_path, 3, wanted(mesh_of(jax.devices())))


def test_state_without_its_files(copy_of_saved):
    shutil.rmtree(copy_of_saved / "5" / "state")
    with raises_user_error(copy_of_saved, 5):
        restore(copy_of_saved, 5, wanted(mesh_of(jax.devices())))


# Which checkpoints there are.


def test_latest_step(tmp_path):
    assert checkpoints.latest_step(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()
    (tmp_path / "empty").mkdir()
    assert checkpoints.latest_step(tmp_path / "empty") is None
    save(tmp_path / "s", [2, 10])
    assert checkpoints.latest_step(tmp_path / "s") == 10


def test_interrupted_saves_do_not_count(copy_of_saved):
    partial = copy_of_saved / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy_of_saved / "5", partial)
    assert checkpoints.latest_step(copy_of_saved) == 5
    time.sleep(0.3)  # deleting would happen in the background
    assert (partial / "state").exists()  # whoever only reads deletes nothing
    save(copy_of_saved, [6])
    assert checkpoints.latest_step(copy_of_saved) == 6
    assert not partial.exists()


def test_keep_deletes_the_oldest(tmp_path):
    save(tmp_path / "s", [2, 4, 6, 8], keep=2)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["6", "8"]
    save(tmp_path / "s", [9], keep=2)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["8", "9"]


def test_one_that_cannot_be_deleted_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    """A file that somebody else reads, on a disk of another machine."""
    rmtree = shutil.rmtree

    def busy(path, *args, **options):
        if path.name.endswith(".deleted"):
            raise OSError(16, "Device or resource busy")
        rmtree(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        save(tmp_path, [1, 2], keep=1)
    assert "cannot delete" in caplog.text and "1.deleted: Device or resource busy" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.deleted", "2"]
    assert checkpoints.latest_step(tmp_path) == 2
    save(tmp_path, [3], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def kept_of(steps, **rules):
    kept = retention.Kept(**rules)
    infos = [types.SimpleNamespace(step=step) for step in steps]
    stay = kept.should_preserve(infos, context=None)
    return [step for step, stays in zip(steps, stay, strict=True) if stays]


def test_which_checkpoints_stay():
    steps = [10, 20, 25, 30, 35]
    assert kept_of(steps) == [35]
    assert kept_of(steps, last=2) == [30, 35]
    assert kept_of(steps, every=20) == [20, 35]
    assert kept_of(steps, last=3, regular=20) == [20, 35]
    assert kept_of(steps, last=2, regular=5) == [30, 35]
    assert kept_of(steps, last=2, every=25, regular=10) == [25, 30, 35]
    scores = {10: 0.3, 20: 0.2, 30: 0.4, 99: 0.0}  # of 99 there is no checkpoint any more
    assert kept_of(steps, best=True, scores=scores) == [20, 35]
    assert kept_of(steps, last=2, every=10, best=True, scores={25: 0.1}) == steps
    assert kept_of(steps, best=True) == [35]  # nothing is known of any
    scores = {
        10: float("nan"),
        20: float("-inf"),
        25: 0.1,
        30: 0.3,
    }  # no numbers are never the best
    assert kept_of(steps, best=True, scores=scores) == [25, 35]


def test_what_stays_is_decided_at_each_save(tmp_path):
    kept = retention.Kept(last=1, every=4, best=True)
    with checkpoints.open_manager(tmp_path / "s", kept=kept, create=True) as manager:
        for step, score in {2: 0.5, 3: 0.1, 4: 0.3, 5: 0.2, 6: 0.9}.items():
            checkpoints.save(manager, step, {"x": jnp.ones(3)}, ITEMS)
            kept.scores[step] = score  # after the save, as evaluation is
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["3", "4", "6"]


def test_reading_creates_and_deletes_nothing(tmp_path):
    with checkpoints.open_manager(tmp_path / "s"):
        pass
    assert not (tmp_path / "s").exists()
    save(tmp_path / "s", [1, 2, 3])
    with checkpoints.open_manager(tmp_path / "s", kept=retention.Kept(1)):
        pass
    assert len(list((tmp_path / "s").iterdir())) == 3


# Plain JSON files.


def test_write_json(tmp_path):
    path = tmp_path / "config.json"
    for value in ({"a": [1, 2.5, None, "ü"]}, {"b": {}}):  # the second time over the first
        checkpoints.write_json(path, value)
        assert json.loads(path.read_text()) == value
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_is_all_or_nothing(tmp_path):
    path = tmp_path / "config.json"
    checkpoints.write_json(path, {"whole": True})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"cannot": object()})
    assert json.loads(path.read_text()) == {"whole": True}


def test_write_json_is_never_seen_half_written(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    checkpoints.write_json(path, {"old": True})
    seen = []
    write_text = type(path).write_text

    def spy(self, text, *args, **kwargs):
        done = write_text(self, text[: len(text) // 2], *args, **kwargs)  # as if killed here
        seen.append(json.loads(path.read_text()))
        return done + write_text(self, text, *args, **kwargs)

    monkeypatch.setattr(type(path), "write_text", spy)
    checkpoints.write_json(path, {"new": True})
    assert seen == [{"old": True}]
    assert json.loads(path.read_text()) == {"new": True}
