"""Folders of latents: records there and back, what is refused, which view an example takes."""

import json
import os
import pickle
import shutil
import threading
from concurrent import futures

import grain
import numpy as np
import pytest

from latent_diffusion_jax.data import latents
from latent_diffusion_jax.data.pipeline import image_example
from latent_diffusion_jax.runtime.errors import DataError, StorageError, UserError

SHAPE = (2, 2, 4, 4, 6)  # crops, flips, h, w, c


def record(i, dtype="float16", shape=SHAPE):
    moments = np.random.default_rng(i).normal(size=shape).astype(dtype)
    return {"captions": [f"{i}: größer", "x"], "label": i % 3, "name": f"a[{i}]",
            "moments": moments}  # fmt: skip


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found["moments"], wanted["moments"])
    assert found["moments"].dtype == wanted["moments"].dtype
    assert {**found, "moments": None} == {**wanted, "moments": None}


def write_folder(folder, counts=(3, 2), done=True, **changes):
    """Latents of two splits, both in files of so many records."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in latents.SPLITS:
        i = 0
        for shard, count in enumerate(counts):
            writer = latents.ShardWriter(latents.shard_path(folder, split, shard, len(counts)))
            for _ in range(count):
                writer.write(record(i))
                i += 1
            writer.close(whole=True)
    one = {"views": list(SHAPE[:2]), "records": list(counts)}
    index = {"format": 1, "done": done, "dtype": "float16", "moments_shape": list(SHAPE[2:]),
             "image_size": 16, "label_names": ["a", "b", "c"],
             "autoencoder": {"fingerprint": "1234", "source": "a run"},
             "splits": {"train": one, "test": one}} | changes  # fmt: skip
    (folder / "latents.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", latents.DTYPES)
def test_records_come_back(dtype):
    wanted = record(1, dtype) | {"label": None}
    assert_same(latents.from_bytes(latents.to_bytes(wanted), SHAPE, dtype), wanted)


def test_the_bytes_are_as_the_docstring_says():
    wanted = record(2)
    data = latents.to_bytes(wanted)
    length = int.from_bytes(data[:4], "little")
    assert json.loads(data[4 : 4 + length])["captions"] == wanted["captions"]
    np.testing.assert_array_equal(
        np.frombuffer(data[4 + length :], "<f2"), wanted["moments"].ravel()
    )


def test_big_endian_moments_are_turned():
    wanted = record(3)
    turned = wanted | {"moments": wanted["moments"].astype(">f2")}
    assert latents.to_bytes(turned) == latents.to_bytes(wanted)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:2], lambda b: b[:20], lambda b: b[:-2], lambda b: b"\xff" * len(b)],
)
def test_damaged_bytes_are_refused(damage):
    with pytest.raises(ValueError):
        latents.from_bytes(damage(latents.to_bytes(record(0))), SHAPE, "float16")


def test_a_source_gives_records_in_order_over_files(tmp_path):
    source = latents.LatentSource(write_folder(tmp_path, counts=(3, 0, 2)), "train")
    assert len(source) == 5 and list(source.label_names) == ["a", "b", "c"]
    for i in range(5):
        assert_same(source[i], record(i))
        assert source.captions(i) == record(i)["captions"]
    assert source.records is source and not source.damaged
    assert_same(pickle.loads(pickle.dumps(source))[4], record(4))


def test_plain_array_record_readers_can_read_it(tmp_path):
    write_folder(tmp_path)
    found = grain.sources.ArrayRecordDataSource(sorted(map(str, tmp_path.glob("train-*"))))
    assert [found[i] for i in range(5)] == [latents.to_bytes(record(i)) for i in range(5)]


def test_a_file_that_is_not_whole_does_not_stay(tmp_path):
    path = latents.shard_path(tmp_path, "train", 0, 1)
    writer = latents.ShardWriter(path)
    writer.write(record(0))
    assert not path.exists()
    writer.close(whole=False)
    assert not list(tmp_path.iterdir())


def check_refused(folder, match, split="train"):
    with pytest.raises(UserError, match=match) as error:
        latents.LatentSource(folder, split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "where",
    ["done", "image_size", "moments_shape", "dtype", "label_names", "splits", "splits.train",
     "splits.test.views", "splits.train.records", "autoencoder", "autoencoder.fingerprint",
     "autoencoder.source"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 3.5, [1, "a"]])
def test_an_index_that_lacks_something_is_damaged(tmp_path, where, value):
    folder = write_folder(tmp_path)
    index = json.loads((folder / "latents.json").read_text())
    at, (*above, last) = index, where.split(".")
    for key in above:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    (folder / "latents.json").write_text(json.dumps(index))
    check_refused(folder, rf"latents\.json is damaged: {where} is")


def test_what_is_no_finished_folder_is_refused(tmp_path):
    check_refused(tmp_path / "none", r"none holds no latents \(there is no latents.json\).*encode")
    check_refused(write_folder(tmp_path / "a", done=False), "are not finished; the command")
    check_refused(write_folder(tmp_path / "b", format=7), "of format 7, this version reads 1")
    check_refused(write_folder(tmp_path / "c", counts=(0,)), "split 'train' .* is empty")
    folder = write_folder(tmp_path / "d")
    (folder / "latents.json").write_text("{")
    check_refused(folder, r"latents\.json is damaged")
    (folder / "latents.json").write_text("[" * 100_000)
    check_refused(folder, r"latents\.json is damaged")
    (folder / "latents.json").unlink()
    os.mkfifo(folder / "latents.json")  # of which reading would wait for ever
    check_refused(folder, r"latents\.json is damaged: it is no ordinary file")
    folder = write_folder(tmp_path / "e")
    (folder / "test-00001-of-00002.array_record").unlink()
    os.mkfifo(folder / "test-00001-of-00002.array_record")
    check_refused(folder, r"test-00001.* are damaged \(it is no ordinary file\)", "test")
    (folder / "test-00001-of-00002.array_record").unlink()
    check_refused(folder, "lack 1 of 2 files of 'test', the first is test-00001", "test")
    assert len(latents.LatentSource(folder, "train")) == 5


def test_damaged_files_are_refused(tmp_path):
    folder = write_folder(tmp_path / "a")
    path = folder / "train-00000-of-00002.array_record"
    path.write_bytes(path.read_bytes()[:-100])
    check_refused(folder, r"train-00000-of-00002\.array_record are damaged .*encode again")
    folder = write_folder(tmp_path / "b")
    one, other = (folder / f"train-0000{i}-of-00002.array_record" for i in range(2))
    one.write_bytes(other.read_bytes())
    check_refused(folder, "have 2 records, 3 were written")


def test_a_damaged_record_is_named(tmp_path):
    folder = write_folder(tmp_path)
    path = folder / "train-00000-of-00002.array_record"
    data = path.read_bytes()
    needle = record(1)["moments"].tobytes()
    assert needle in data
    path.write_bytes(data.replace(needle, bytes(len(needle))))
    source = latents.LatentSource(folder, "train")
    assert_same(source[0], record(0))
    with pytest.raises(UserError, match=r"record 1 of the split 'train' .* is damaged"):
        source[1]


def test_moments_of_another_shape_are_refused(tmp_path):
    source = latents.LatentSource(write_folder(tmp_path, moments_shape=[4, 4, 8]), "train")
    with pytest.raises(UserError, match=r"record 0 .* is damaged .*reshape"):
        source[0]


def test_use_is_checked():
    index = {"image_size": 16, "splits": {"train": {"views": [1, 1]}}}
    latents.check_use(index, "F", 16, random_flip=False)
    with pytest.raises(UserError, match=r"in F are of images of 16 pixels, data\.image_size=32"):
        latents.check_use(index, "F", 32, random_flip=False)
    with pytest.raises(UserError, match=r"random_flip=True, but .* F are of no mirrored images"):
        latents.check_use(index, "F", 16, random_flip=True)
    index["splits"]["train"]["views"] = [1, 2]
    latents.check_use(index, "F", 16, random_flip=True)


def test_examples_take_the_view_that_an_image_would_become():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    views = np.stack([image, image[:, ::-1]])[None]
    taken = []
    for seed in range(20):
        for random_flip in (False, True):
            one, other = np.random.default_rng(seed), np.random.default_rng(seed)
            wanted = image_example({"image": image}, one, 4, random_flip)
            found = latents.latent_example({"moments": views}, other, random_flip)
            np.testing.assert_array_equal(found, wanted)
            assert one.integers(1000) == other.integers(1000), "captions would be others"
            taken.append(bool((found == image).all()))
    assert {*taken} == {False, True} and all(taken[::2])
    np.testing.assert_array_equal(latents.latent_example({"moments": views}, None, True), image)


def test_every_crop_is_taken():
    views = np.arange(6).reshape(3, 2)
    rng = np.random.default_rng(0)
    found = [latents.latent_example({"moments": views}, rng, True) for _ in range(100)]
    assert {*map(int, found)} == set(range(6))
    found = [latents.latent_example({"moments": views}, rng, False) for _ in range(50)]
    assert {*map(int, found)} == {0, 2, 4}
    assert latents.latent_example({"moments": views}, None, True) == 0


def test_a_disk_that_takes_no_more_is_named_and_leaves_nothing(tmp_path, small_files):
    path = tmp_path / "train-00000-of-00001.array_record"
    small_files(1000)
    writer = latents.ShardWriter(path)

    def write():
        for i in range(100):
            writer.write(record(i))
        writer.close(whole=True)

    with pytest.raises(StorageError, match=f"cannot write latents {path}: "):
        write()
    writer.close(whole=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"cannot write latents .*none"):
        latents.ShardWriter(tmp_path / "none" / "a.array_record").close(whole=True)


def test_records_come_back_when_what_was_open_is_dead(tmp_path, kill_handles):
    source = latents.LatentSource(write_folder(tmp_path / "a"), "train", retry_seconds=60.0)
    assert_same(source[1], record(1))
    assert kill_handles(tmp_path)
    with futures.ThreadPoolExecutor(5) as pool:
        for i, found in enumerate(pool.map(source.__getitem__, range(5))):
            assert_same(found, record(i))
    kill_handles(tmp_path)
    (tmp_path / "a").rename(tmp_path / "away")
    timer = threading.Timer(0.3, lambda: (tmp_path / "away").rename(tmp_path / "a"))
    timer.start()
    assert_same(source[4], record(4))
    timer.join()
    shutil.rmtree(tmp_path / "a")
    gone = latents.LatentSource(write_folder(tmp_path / "a"), "train")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot read the data, .*No such file"):
        gone[0]


def test_identity_is_of_the_encoder_the_split_and_its_files(tmp_path):
    def found(name, split="train", **changes):
        return latents.LatentSource(write_folder(tmp_path / name, **changes), split).identity

    one = found("a")
    assert len(one) == 16 and found("b") == one
    encoder = {"fingerprint": "1", "source": "here"}
    other = found("c", autoencoder=encoder)
    assert found("d", autoencoder=encoder | {"source": "there"}) == other
    assert len({one, other, found("a", "test"), found("e", counts=(2, 3))}) == 4
