"""Checkpoints on bad disks: damage is seen, and what could not be written does not look whole."""

import json
import os
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.runtime import checkpoints, digests, retention, sharding
from latent_diffusion_jax.runtime.errors import StorageError, UserError

# From Orbax, after an array that cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ITEMS = {"data": {"next_index": 3}, "config": {"sample": {"steps": 50}}, "info": {"x": 0.25}}


def state(seed=0):
    return {
        "params": {"kernel": jax.random.normal(jax.random.key(seed), (64, 130))},
        "ema": {"bias": jnp.arange(300.0).astype(jnp.bfloat16)},
        "step": jnp.int32(seed),
    }


def shapes():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(state)
    )


def save(directory, step, seed=0):
    with checkpoints.open_manager(directory, kept=retention.Kept(9), create=True) as manager:
        checkpoints.save(manager, step, state(seed), ITEMS)


def restore(directory, step):
    with checkpoints.open_manager(directory) as manager:
        found = checkpoints.restore_state(manager, step, shapes())
    return jax.tree.map(np.asarray, found)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "s", 1)
    return tmp_path / "s"


# Digests.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
@pytest.mark.parametrize("shape", [(), (8,), (16, 33, 3), (0, 4)])
def test_the_digest_is_the_same_on_hosts_and_however_it_is_split(dtype, shape):
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    found = digests.of_arrays({"x": np.asarray(values)})["x"]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    specs = [(), ("fsdp",), (("data", "fsdp"),), ("data",)] if shape and shape[0] % 8 == 0 else [()]
    if len(shape) > 1 and shape[0]:
        specs.append(("fsdp", None, "tensor"))
    for names in specs:
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        x = jax.device_put(values, spec)
        assert digests.of_arrays({"x": x}) == {"x": found}
        assert digests._of_parts({"x": x}) == {"x": found}  # as where the host has not all of it
    assert digests._of_parts({"x": jax.device_put(values, jax.devices()[0])}) == {"x": found}


def test_whatever_happens_to_one_number_changes_the_digest():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 7)).astype(np.float32)
    values[::2] = 0.0
    before = digests.of_arrays({"x": values})
    for _ in range(300):
        other = values.copy()
        index, bit = rng.integers(other.size), rng.integers(32)
        other.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
        assert digests.of_arrays({"x": other}) != before
    swapped = values.copy()
    swapped[[1, 3]] = swapped[[3, 1]]
    assert digests.of_arrays({"x": swapped}) != before


# Damage.


def test_numbers_of_another_checkpoint_are_seen(saved):
    save(saved, 2, seed=2)
    shutil.rmtree(saved / "2" / "state")
    shutil.copytree(saved / "1" / "state", saved / "2" / "state")
    with pytest.raises(UserError, match="other numbers than were saved in params/kernel, step"):
        restore(saved, 2)
    one = {"ema": shapes()["ema"]}
    checkpoints.restore_part(saved, 2, one)  # these are the same in both
    with pytest.raises(UserError, match=r"other numbers .* in params/kernel.*step 1, is still"):
        checkpoints.restore_part(saved, 2, {"params": shapes()["params"]})


def test_digests_that_should_be_there_are_missed(saved):
    shutil.rmtree(saved / "1" / "digests")
    restore(saved, 1)  # of a version that made none
    path = saved / "1" / "config" / "metadata"
    path.write_text(json.dumps({"version": 1}))
    for reads in (lambda: restore(saved, 1), lambda: checkpoints.read_json(saved, 1, "data")):
        with pytest.raises(UserError, match=r"/1: it is damaged: its digests are not there"):
            reads()


def test_a_folder_with_a_number_is_no_checkpoint_by_that(saved):
    checkpoints.check_whole(saved, 1)
    (saved / "2").mkdir()
    with pytest.raises(UserError, match=r"cannot restore checkpoint .*/2: .*of step 1, is still"):
        checkpoints.check_whole(saved, 2)
    shutil.rmtree(saved / "1" / "state")
    with pytest.raises(UserError, match=r"cannot restore checkpoint .*/1: "):
        checkpoints.check_whole(saved, 1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        OSError(116, "Stale file handle"),
        ValueError("NOT_FOUND: reading x: Input/output error [os_error_code='5']"),
    ],
)
def test_what_may_pass_is_not_taken_for_damage(saved, monkeypatch, error):
    """Nobody is told to do without a checkpoint that is whole."""

    def fails(*_, **__):
        raise error

    save(saved, 2)
    monkeypatch.setattr(checkpoints, "_read", fails)
    with pytest.raises(StorageError, match=r"cannot read checkpoint .*/2: .*need not be") as raised:
        restore(saved, 2)
    assert "is still there" not in str(raised.value)
    error = MemoryError("no room")
    with pytest.raises(UserError, match=r"not enough memory for checkpoint .*/2: no room"):
        restore(saved, 2)


def test_another_dtype_is_compared_in_the_one_that_was_saved(saved):
    wanted = shapes()["ema"]["bias"]
    wanted = jax.ShapeDtypeStruct(wanted.shape, jnp.float32, sharding=wanted.sharding)
    found = checkpoints.restore_part(saved, 1, {"ema": {"bias": wanted}})["ema"]["bias"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, state()["ema"]["bias"].astype(jnp.float32))


def test_a_changed_item_is_seen(saved):
    path = saved / "1" / "config" / "metadata"
    assert json.loads(path.read_text()) == ITEMS["config"]
    path.write_text(path.read_text().replace("50", "51"))
    with pytest.raises(UserError, match="item config is damaged"):
        checkpoints.read_json(saved, 1, "config")
    assert checkpoints.read_json(saved, 1, "data") == ITEMS["data"]


def test_checkpoints_from_before_digests_are_read(saved):
    shutil.rmtree(saved / "1" / "digests")
    assert int(restore(saved, 1)["step"]) == 0
    assert checkpoints.read_json(saved, 1, "config") == ITEMS["config"]


def read_all(directory):
    """All that there is in a checkpoint."""
    items = {name: checkpoints.read_json(directory, 1, name) for name in ITEMS}
    return items, restore(directory, 1)


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_is_an_error_or_changes_nothing(saved, seed):
    rng = random.Random(seed)
    files = sorted(path for path in saved.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    kind, place = rng.choice(["flip", "cut", "delete"]), rng.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[:place])
    else:
        path.unlink()
    try:
        items, found = read_all(saved)
    except UserError as error:
        assert str(saved / "1") in str(error) and "\n" not in str(error)
        return
    assert items == ITEMS
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, state()))


# Disks that cannot take a checkpoint.


@pytest.mark.parametrize("at_once", [True, False])
def test_a_save_that_fails_leaves_the_last_one(saved, small_files, at_once):
    """Its error comes with the next look, at the latest when all is closed."""
    said = rf"cannot save a checkpoint in {saved}: File too large; the last whole one .* step 1$"
    with (
        pytest.raises(StorageError, match=said),
        checkpoints.open_manager(saved, create=True) as manager,
    ):
        small_files(4_000)
        checkpoints.save(manager, 2, state(2), ITEMS)
        while at_once and not checkpoints.is_whole(manager):
            time.sleep(0.01)
    assert [path.name for path in saved.iterdir()] == ["1"]
    assert int(restore(saved, 1)["step"]) == 0


def test_a_folder_that_is_gone_is_named(saved):
    with (
        pytest.raises(StorageError, match=f"cannot save a checkpoint in {saved}.*: .*is gone"),
        checkpoints.open_manager(saved, create=True) as manager,
    ):
        shutil.rmtree(saved)
        saved.write_text("")  # a file in its place: nobody can make the folder again
        checkpoints.save(manager, 2, state(2), ITEMS)
    assert not os.path.isdir(saved)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"cannot open .*file/s: Not a directory"),
        checkpoints.open_manager(tmp_path / "file" / "s", create=True),
    ):
        pass
    with pytest.raises(StorageError, match=r"cannot write .*config\.json: Not a directory"):
        checkpoints.write_json(tmp_path / "file" / "config.json", {})
