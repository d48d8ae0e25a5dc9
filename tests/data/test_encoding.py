"""Images on their way through an encoder into files: views, order, damage, stops."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data import latents, pipeline
from latent_diffusion_jax.data.encoding import Split, encode_shards, views
from latent_diffusion_jax.runtime.errors import UserError

SIZE = 4


class Memory:
    """Wide images of noise, held in memory; the damaged ones are cut off."""

    label_names = ()

    def __init__(self, count, damaged=()):
        self._encoded = []
        for i in range(count):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(256, size=(SIZE, 3 * SIZE, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
            data = buffer.getvalue()
            self._encoded.append(data[:50] if i in damaged else data)

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, index):
        return {"image": self._encoded[index], "captions": [str(index)], "label": None,
                "name": f"image {index}"}  # fmt: skip


def make_split(count=10, damaged=(), share=0.5, crops=1, flips=1, shard_size=4):
    source = pipeline.DecodedSource(Memory(count, damaged), share)
    return Split("train", source, crops, flips, shard_size)


def read_from(split):
    return lambda index: views(split, index, image_size=SIZE, resize=0, seed=0)


def program(batch):
    return batch.astype(np.float32)  # the identity encodes best


def encode(split, out, shards=None, batch_size=3, program=program, should_stop=lambda: False):
    shards = range(split.num_shards) if shards is None else shards
    return encode_shards(split, list(shards), out, read_from(split), program,
                         batch_size=batch_size, num_threads=2, should_stop=should_stop)  # fmt: skip


def read(split, out, shard):
    """Records of a file."""
    path = latents.shard_path(out, split.name, shard, split.num_shards)
    count = latents.count_records(path)
    one = {"views": [split.crops, split.flips], "records": [count]}
    index = {"format": 1, "done": True, "dtype": "float32", "moments_shape": [4, 4, 3],
             "image_size": 16, "label_names": [], "splits": {"train": one, "test": one},
             "autoencoder": {"fingerprint": "1234", "source": "a run"}}  # fmt: skip
    folder = out / f"read_{shard}"
    folder.mkdir()
    (folder / "latents.json").write_text(json.dumps(index))
    (folder / "train-00000-of-00001.array_record").write_bytes(path.read_bytes())
    source = latents.LatentSource(folder, "train")
    return [source[i] for i in range(count)]


def test_the_views_are_those_of_training():
    split = make_split(flips=2)
    found = views(split, 3, image_size=SIZE, resize=0, seed=0)
    centre = pipeline.image_example(split.source[3], None, SIZE, random_flip=True)
    assert found.pixels.shape == (1, 2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(found.pixels[0, 0], centre)
    np.testing.assert_array_equal(found.pixels[0, 1], centre[:, ::-1])
    assert found.record == {"captions": ["3"], "label": None, "name": "image 3"}


def test_random_crops_differ_and_are_the_same_again():
    split = make_split(crops=5)
    found = views(split, 3, image_size=SIZE, resize=0, seed=0).pixels
    again = views(split, 3, image_size=SIZE, resize=0, seed=0).pixels
    other = views(split, 3, image_size=SIZE, resize=0, seed=1).pixels
    assert found.shape == (5, 1, SIZE, SIZE, 3)
    assert len({crop.tobytes() for crop in found}) > 2
    np.testing.assert_array_equal(found, again)
    assert (found != other).any()
    whole = np.asarray(split.source[3]["image"])
    windows = {whole[:, i : i + SIZE].tobytes() for i in range(2 * SIZE + 1)}
    assert {crop.tobytes() for crop in found} <= windows


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_files_hold_their_images_in_order(tmp_path, batch_size):
    split = make_split(crops=2, flips=2)
    assert encode(split, tmp_path, batch_size=batch_size)
    for shard, rows in enumerate((range(4), range(4, 8), range(8, 10))):
        found = read(split, tmp_path, shard)
        assert [r["captions"] for r in found] == [[str(i)] for i in rows]
        for i, r in zip(rows, found, strict=True):
            np.testing.assert_array_equal(r["moments"], read_from(split)(i).pixels)


def test_a_process_writes_its_own_files_and_the_same_ones(tmp_path):
    split = make_split()
    assert encode(split, tmp_path)
    whole = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(whole) == 3
    for process in range(2):
        out = tmp_path / str(process)
        out.mkdir()
        assert encode(split, out, shards=range(process, 3, 2))
        own = {p.name: p.read_bytes() for p in out.iterdir()}
        assert own == {name: whole[name] for name in sorted(whole)[process::2]}


def test_damaged_images_are_left_out_and_not_replaced(tmp_path):
    split = make_split(damaged=(1, 4, 5, 6, 7))  # a whole file among them
    assert encode(split, tmp_path)
    found = [[int(r["captions"][0]) for r in read(split, tmp_path, i)] for i in (0, 2)]
    assert found == [[0, 2, 3], [8, 9]]
    assert latents.count_records(latents.shard_path(tmp_path, "train", 1, 3)) == 0
    assert sorted(split.source.damaged) == [1, 4, 5, 6, 7]


def test_too_much_damage_stops_and_keeps_whole_files_alone(tmp_path):
    split = make_split(damaged=(8, 9), share=0.1)
    with pytest.raises(UserError, match=r"2 of 10 images cannot be decoded"):
        encode(split, tmp_path, batch_size=1)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["train-00000-of-00003.array_record"]


def test_a_stop_keeps_whole_files_alone(tmp_path):
    split = make_split()
    calls = iter(range(100))
    assert not encode(split, tmp_path, batch_size=1, should_stop=lambda: next(calls) == 6)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000-of-00003.array_record"]
    assert encode(split, tmp_path, shards=[1, 2])
    assert len(list(tmp_path.iterdir())) == 3
    assert [r["captions"] for r in read(split, tmp_path, 1)] == [["4"], ["5"], ["6"], ["7"]]


def test_nothing_to_do_is_done(tmp_path):
    assert encode(make_split(), tmp_path, shards=[]) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("float16", "try --dtype=float32"), ("float32", "the first stage is damaged")],
)
def test_moments_that_are_not_finite_are_refused(tmp_path, dtype, said):
    def overflowing(batch):
        return np.where(batch[..., :1] >= 0, np.inf, 0.0).astype(dtype)

    with pytest.raises(UserError, match=rf"moments of image 0 are not finite in {dtype}; {said}"):
        encode(make_split(), tmp_path, program=overflowing)
    assert not list(tmp_path.iterdir())
