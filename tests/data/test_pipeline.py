"""The pipeline: order, resuming, sharing among processes, damaged images."""

import io
import itertools
import json
import pickle
import threading

import numpy as np
import pytest
from absl import logging
from PIL import Image

from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.data.sources import open_source
from latent_diffusion_jax.runtime.errors import UserError

CAPTIONS = ("one", "two", "three", "four")
SIZE = 6


class Memory:
    """A source of images held in memory, with damaged ones where the bytes say so."""

    label_names = ()

    def __init__(self, encoded):
        self._encoded = encoded

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, index):
        return {
            "image": self._encoded[index],
            "captions": [f"{index} {caption}" for caption in CAPTIONS],
            "label": None,
            "name": f"image {index}",
        }


def prepare(record, rng):
    """Which record, which caption and the augmented pixels."""
    index = 0 if rng is None else rng.integers(len(record["captions"]))
    number, _ = record["captions"][index].split()
    image = pipeline.image_example(record, rng, SIZE, random_flip=True)
    return {"index": np.int32(number), "caption": np.int32(index), "image": image}


@pytest.fixture
def make_source():
    """(number of images, {index: damaged bytes}) -> a DecodedSource of distinct wide images."""

    def make(count, damaged=None, max_damaged_share=0.0):
        encoded = []
        for i in range(count):  # noise, so that every crop differs from every other
            pixels = np.random.default_rng(i).integers(256, size=(SIZE, 2 * SIZE, 3))
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
            encoded.append(buffer.getvalue())
        for index, data in (damaged or {}).items():
            encoded[index] = data(encoded[index]) if callable(data) else data
        return pipeline.DecodedSource(Memory(encoded), max_damaged_share)

    return make


def rows_of(batch_size, process_index, process_count):
    """An equal share of a batch's rows, one after the other."""
    return np.array_split(np.arange(batch_size), process_count)[process_index]


def loader(source, batch_size=4, seed=0, process_index=0, process_count=1):
    return pipeline.train_loader(
        source,
        prepare,
        batch_size=batch_size,
        seed=seed,
        rows=rows_of(batch_size, process_index, process_count),
        num_threads=2,
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"index", "caption", "image"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def differ(batches, others, key):
    return any((a[key] != b[key]).any() for a, b in zip(batches, others, strict=True))


# Order.


def test_batches_are_determined_by_the_seed(make_source):
    source = make_source(10)
    first = take(loader(source, seed=1), 8)
    assert_same(first, take(loader(source, seed=1), 8))
    assert differ(first, take(loader(source, seed=2), 8), "index")


def test_every_epoch_is_another_permutation(make_source):
    rows = [int(row) for b in take(loader(make_source(20)), 15) for row in b["index"]]
    epochs = [rows[:20], rows[20:40], rows[40:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in (*epochs, range(20))}) == 4


def test_epochs_may_end_inside_a_batch(make_source):
    rows = [int(row) for b in take(loader(make_source(7)), 7) for row in b["index"]]
    for start in range(0, 28, 7):
        assert sorted(rows[start : start + 7]) == list(range(7))


def test_augmentation_and_captions_are_drawn_anew_every_epoch(make_source):
    batches = take(loader(make_source(4)), 30)
    for index in range(4):
        seen = [(b["caption"][i], b["image"][i].tobytes()) for b in batches for i in range(4)
                if b["index"][i] == index]  # fmt: skip
        assert len(seen) == 30
        assert {caption for caption, _ in seen} == set(range(len(CAPTIONS)))
        # 7 places to crop, each flipped or not.
        assert len({image for _, image in seen}) > 7


def test_rows_hold_what_their_record_says(make_source):
    source = make_source(6)
    for batch in take(loader(source), 6):
        assert batch["image"].shape == (4, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        for index, image in zip(batch["index"], batch["image"], strict=True):
            whole = np.asarray(source[int(index)]["image"])
            crops = [whole[:, left : left + SIZE] for left in range(SIZE + 1)]
            assert any((image == c).all() or (image == c[:, ::-1]).all() for c in crops)


# Resuming.


@pytest.mark.parametrize("given", [0, 1, 7])
def test_resumes_exactly_where_it_was(make_source, given):
    source = make_source(10)
    straight = take(loader(source), 12)
    stopped = loader(source)
    take(stopped, given)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = loader(source)
    resumed.set_state(state)
    assert_same(take(resumed, 12 - given), straight[given:])
    assert differ(straight[:1], straight[1:2], "image")


def test_position_is_the_same_for_another_number_of_processes(make_source):
    source = make_source(10)
    alone = loader(source)
    take(alone, 5)
    state = json.loads(json.dumps(alone.get_state()))
    parts = [loader(source, process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        part.set_state(state)
    assert_same(joined([take(part, 4) for part in parts]), take(alone, 4))


# Processes.


def joined(processes):
    """The rows of all processes, in their order."""
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*processes, strict=True)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_give_the_global_batch(make_source, count):
    source = make_source(10)
    parts = [take(loader(source, 8, 0, i, count), 6) for i in range(count)]
    assert all(len(batch["index"]) == 8 // count for part in parts for batch in part)
    assert_same(joined(parts), take(loader(source, 8), 6))


# Held-out data.


def eval_batches(source, num_examples, process_index=0, process_count=1):
    return list(
        pipeline.eval_batches(
            source,
            prepare,
            batch_size=4,
            num_examples=num_examples,
            rows=rows_of(4, process_index, process_count),
        )
    )


@pytest.mark.parametrize(
    ("num_examples", "expected"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3]), (99, [4, 4, 4, 1])]
)
def test_eval_batches_are_the_first_examples_in_order(make_source, num_examples, expected):
    batches = eval_batches(make_source(13), num_examples)
    assert [valid for _, valid in batches] == expected
    assert all(len(batch["index"]) == len(batch["image"]) == 4 for batch, _ in batches)
    rows = [int(row) for batch, valid in batches for row in batch["index"][:valid]]
    assert rows == list(range(sum(expected)))


def test_eval_batches_are_not_augmented(make_source):
    source = make_source(5)
    for batch, _ in eval_batches(source, 5):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            whole = np.asarray(source[int(index)]["image"])
            np.testing.assert_array_equal(image, whole[:, SIZE // 2 : SIZE // 2 + SIZE])
        assert not batch["caption"].any()


def test_eval_batches_of_processes_together_are_the_global_ones(make_source):
    source = make_source(9)
    parts = [eval_batches(source, 9, i, 2) for i in range(2)]
    whole = eval_batches(source, 9)
    assert [[valid for _, valid in part] for part in parts] == [[4, 4, 1]] * 2
    together = joined([[batch for batch, _ in part] for part in parts])
    assert_same(together, [batch for batch, _ in whole])


# Damaged images.

DAMAGE = {
    "truncated": lambda png: png[: len(png) // 2],
    "text": b"this is no image at all",
    "empty": b"",
}


@pytest.fixture
def warnings_logged(monkeypatch):
    """The warnings logged here or by `check` (other tests' loaders may still read ahead)."""
    found = []

    def warning(text, *args, extra):
        if threading.current_thread().name.startswith(("MainThread", "check")):
            assert extra == {"of_any_process": True}  # each process reads others
            found.append(text % args)

    monkeypatch.setattr(logging, "warning", warning)
    return found


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_image_is_replaced_by_the_next_whole_one(make_source, warnings_logged, kind):
    source = make_source(6, {2: DAMAGE[kind], 3: b"", 5: b""}, max_damaged_share=0.5)
    assert [source[i]["name"] for i in range(6)] == [
        f"image {i}"
        for i in (0, 1, 4, 4, 4, 0)  # after the last comes the first
    ]
    assert source[2]["captions"] == source[4]["captions"]
    np.testing.assert_array_equal(source[2]["image"], source[4]["image"])
    assert source.damaged == {2: "image 2", 3: "image 3", 5: "image 5"}


def test_damaged_image_is_named_once(make_source, warnings_logged):
    source = make_source(10, {3: b"", 7: b"text"}, max_damaged_share=0.2)
    for _ in range(3):
        for i in range(10):
            source[i]
    assert len(warnings_logged) == 2
    assert "image 3" in warnings_logged[0] and "1 so far" in warnings_logged[0]
    assert "image 7" in warnings_logged[1] and "2 so far" in warnings_logged[1]


def test_replacement_does_not_depend_on_the_order_of_access(make_source):
    damaged = {2: b"", 3: b"", 5: b""}
    forward = make_source(6, damaged, max_damaged_share=0.5)
    backward = make_source(6, damaged, max_damaged_share=0.5)
    names = [forward[i]["name"] for i in range(6)]
    assert [backward[i]["name"] for i in reversed(range(6))] == names[::-1]


def test_loader_replaces_damaged_images(make_source):
    source = make_source(10, {3: b"", 7: b"text"}, max_damaged_share=0.2)
    batches = take(loader(source), 10)
    rows = [int(row) for batch in batches for row in batch["index"]]
    for start in range(0, 40, 10):
        assert sorted(rows[start : start + 10]) == [0, 1, 2, 4, 4, 5, 6, 8, 8, 9]
    assert_same(batches, take(loader(source), 10))


def test_limit_is_a_share_of_the_images(make_source):
    make_source(20, {3: b"", 4: b""}, max_damaged_share=0.1).check(20)
    source = make_source(20, {3: b"", 4: b"", 9: b""}, max_damaged_share=0.1)
    with pytest.raises(UserError, match=r"3 of 20 .*image 9.*data\.max_damaged_share=0\.1"):
        source.check(20)


def test_all_images_damaged(make_source):
    source = make_source(4, dict.fromkeys(range(4), b""), max_damaged_share=1.0)
    with pytest.raises(UserError, match="none of the 4 images"):
        source[1]


def test_too_much_damage_arrives_through_the_loader(make_source):
    source = make_source(10, dict.fromkeys(range(5), b"text"), max_damaged_share=0.2)
    with pytest.raises(UserError, match=r"of 10 images.*data\.max_damaged_share=0\.2") as raised:
        take(loader(source), 10)
    assert type(raised.value) is UserError
    assert "\n" not in str(raised.value)


def test_check_finds_damage_up_front(make_source, warnings_logged):
    source = make_source(50, {49: b""}, max_damaged_share=0.1)
    source.check(50)
    assert source.damaged == {49: "image 49"} and len(warnings_logged) == 1


def test_check_spreads_its_images_evenly(make_source):
    damaged = dict.fromkeys(range(30, 60), b"")  # a third of the images, in one piece
    source = make_source(90, damaged, max_damaged_share=0.5)
    source.check(9)
    assert len(source.damaged) >= 3
    make_source(90).check(1000)  # more than there are


def test_damaged_files_in_a_folder_are_named_by_path(make_folder, png, warnings_logged):
    files = {f"{i}.{kind}": png(i) if kind == "png" else "text" for i in range(9)
             for kind in ("png", "txt")}  # fmt: skip
    folder = make_folder(files | {"4.png": png()[:-30]})
    source = pipeline.DecodedSource(open_source(str(folder), "train", holdout_share=0.0), 0.2)
    source.check(len(source))
    assert list(source.damaged.values()) == [str(folder / "4.png")]
    assert str(folder / "4.png") in warnings_logged[0]


# Sizes and channels.


def test_crops_are_taken_from_the_resized_image(make_source):
    source = make_source(1)  # SIZE high, twice as wide
    whole = np.asarray(source[0]["image"].resize((16, 8), Image.Resampling.BICUBIC))
    tops_and_lefts = {
        whole[top : top + SIZE, left : left + SIZE].tobytes(): (top, left)
        for top in range(3)
        for left in range(11)
    }
    rng = np.random.default_rng(0)
    found = {
        tops_and_lefts[pipeline.image_example(source[0], rng, SIZE, False, 8).tobytes()]
        for _ in range(400)
    }
    assert len(found) == 33  # all places
    centre = pipeline.image_example(source[0], None, SIZE, False, 8)
    np.testing.assert_array_equal(centre, whole[1 : 1 + SIZE, 5 : 5 + SIZE])


def test_arrays_with_any_number_of_channels_reach_the_batch():
    arrays = [np.random.default_rng(i).integers(256, size=(SIZE, SIZE, 7)) for i in range(4)]
    arrays = [array.astype(np.uint8) for array in arrays]
    source = pipeline.DecodedSource(Memory(arrays), 0.0, 7)
    for batch in take(loader(source), 2):
        assert batch["image"].shape == (4, SIZE, SIZE, 7)
        for index, image in zip(batch["index"], batch["image"], strict=True):
            flipped = arrays[index][:, ::-1]
            assert (image == arrays[index]).all() or (image == flipped).all()


# Pickling, which Grain's worker processes need.


def test_pickled_source_keeps_its_records_and_its_count(make_source):
    source = make_source(10, {3: b""}, max_damaged_share=0.1)
    source.check(10)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.damaged == {3: "image 3"}
    assert_same(take(loader(copy), 5), take(loader(source), 5))
    late = pickle.loads(pickle.dumps(make_source(10, {3: b""}, max_damaged_share=0.0)))
    with pytest.raises(UserError, match="image 3"):
        late.check(10)


def test_pickled_source_of_a_dataset(digits_dir):
    records = open_source("handwritten_digits", "test", data_dir=str(digits_dir))
    source = pipeline.DecodedSource(records, 0.0)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 297 and copy[5]["captions"] == source[5]["captions"]
    np.testing.assert_array_equal(copy[5]["image"], source[5]["image"])
