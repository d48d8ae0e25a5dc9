"""Meshes, the rules that split parameters over them, and batches."""

import dataclasses
import functools
import math
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import txt2img
from latent_diffusion_jax import build
from latent_diffusion_jax.planning.topologies import open_topology
from latent_diffusion_jax.runtime import sharding, trees
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training.optimizer import make_optimizer


def sizes(data=1, fsdp=1, tensor=1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def shape_of(**axes):
    """Stands for a mesh of these sizes where only the sizes count."""
    return types.SimpleNamespace(shape=sizes(**axes))


# Meshes.

EIGHT = [f"device {i}" for i in range(8)]  # a mesh does not ask what they are


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (sizes(data=8), (8, 1, 1)),
        (sizes(data=-1), (8, 1, 1)),
        (sizes(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (sizes(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (sizes(fsdp=4, tensor=-1), (1, 4, 2)),
        (sizes(data=-1, fsdp=8), (1, 8, 1)),
    ],
)
def test_mesh_sizes(asked, expected):
    mesh = sharding.make_mesh(asked, EIGHT)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == expected
    assert sorted(mesh.devices.ravel()) == EIGHT


def test_mesh_takes_all_devices_unless_told():
    assert sharding.make_mesh(sizes(data=-1)).devices.size == jax.device_count()
    assert sharding.make_mesh(sizes(data=-1), jax.devices()[:1]).devices.size == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (sizes(data=2, fsdp=2), ["data=2, fsdp=2, tensor=1", "needs 4 devices", "8 are there"]),
        (sizes(data=16), ["needs 16 devices", "8 are there", "-1"]),
        (sizes(data=3, fsdp=-1), ["8 devices", "data=3, fsdp=-1, tensor=1"]),
        (sizes(data=-1, fsdp=16), ["8 devices", "fsdp=16"]),
        (sizes(data=-1, fsdp=-1), ["at most one -1", "data=-1, fsdp=-1"]),
        (sizes(data=0), ["positive", "data=0"]),
        (sizes(data=-2, fsdp=4), ["positive", "data=-2"]),
    ],
)
def test_impossible_meshes(asked, said):
    with pytest.raises(UserError) as raised:
        sharding.make_mesh(asked, EIGHT)
    for part in said:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


# Slices of TPUs.


@pytest.fixture
def slices_of_eight(tpu_topology):
    """A function from a number of slices to the devices of so many v5e:2x4."""
    tpu_topology("v5e:2x4")  # skips where there is no compiler
    return lambda count: open_topology("v5e:2x4" + (f"*{count}" if count > 1 else ""))[0]


@pytest.mark.parametrize(
    ("count", "inside", "over", "expected"),
    [  # sizes of a slice, slices along each axis, and what those become
        (2, sizes(data=2, fsdp=2, tensor=2), {}, (2, 1, 1)),
        (2, sizes(data=2, fsdp=2, tensor=2), {"dcn_data": 2}, (2, 1, 1)),
        (2, sizes(data=2, fsdp=2, tensor=2), {"dcn_fsdp": 2}, (1, 2, 1)),
        (2, sizes(data=2, fsdp=2, tensor=2), {"dcn_tensor": 2}, (1, 1, 2)),
        (2, sizes(fsdp=-1), {"dcn_data": 1, "dcn_fsdp": -1}, (1, 2, 1)),
        (2, sizes(data=-1), {"dcn_data": 1, "dcn_tensor": -1}, (1, 1, 2)),
        (4, sizes(fsdp=4, tensor=2), {"dcn_fsdp": 2}, (2, 2, 1)),
        (4, sizes(fsdp=-1, tensor=2), {"dcn_data": 2, "dcn_tensor": -1}, (2, 1, 2)),
        (1, sizes(data=2, fsdp=2, tensor=2), {"dcn_data": 1}, (1, 1, 1)),
    ],
)
def test_slices_lie_along_the_axes_that_are_asked_for(
    slices_of_eight, count, inside, over, expected
):
    devices = slices_of_eight(count)
    mesh = sharding.make_mesh(inside | over, devices[::-1])
    assert set(mesh.devices.flat) == set(devices)
    own = [side // slices for side, slices in zip(mesh.devices.shape, expected, strict=True)]
    assert math.prod(own) == 8
    for axis, size in zip(sharding.AXES, own, strict=True):
        assert inside[axis] in (-1, size)
    for place, device in np.ndenumerate(mesh.devices):
        slice_place = [i // size for i, size in zip(place, own, strict=True)]
        assert getattr(device, "slice_index", 0) == np.ravel_multi_index(slice_place, expected)


def test_neighbours_in_a_mesh_of_slices_are_neighbours_on_links(slices_of_eight):
    asked = sizes(data=2, fsdp=2, tensor=2) | {"dcn_data": 2}
    mesh = sharding.make_mesh(asked, slices_of_eight(2))
    coords = np.array([device.coords for device in mesh.devices.flat]).reshape(4, 2, 2, 3)
    for axis in (1, 2):  # fsdp and tensor, which have most to say
        assert (np.abs(np.diff(coords, axis=axis)).sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (sizes(data=8) | {"dcn_data": 3}, ["dcn_data=3", "needs 3 slices", "2 are there"]),
        (sizes(data=8) | {"dcn_data": 1}, ["dcn_data=1", "needs 1 slices", "2 are there"]),
        (
            sizes(data=8) | {"dcn_data": 2, "dcn_fsdp": 2},
            ["dcn_data=2, dcn_fsdp=2", "needs 4 slices"],
        ),
        (sizes(data=8) | {"dcn_fsdp": 3}, ["2 slices cannot be split", "dcn_fsdp=3"]),
        (sizes(data=8) | {"dcn_fsdp": -1}, ["at most one -1", "dcn_data=-1, dcn_fsdp=-1"]),
        (sizes(data=8) | {"dcn_tensor": 0}, ["positive", "dcn_tensor=0"]),
        (sizes(data=16), ["data=16", "needs 16 devices of a slice", "8 are there"]),
        (sizes(data=3, fsdp=-1), ["8 devices of a slice cannot be split", "data=3"]),
    ],
)
def test_impossible_meshes_of_slices(slices_of_eight, asked, said):
    with pytest.raises(UserError) as raised:
        sharding.make_mesh(asked, slices_of_eight(2))
    for part in said:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_devices_that_are_no_tpus_are_one_slice():
    """Also those that say a slice, as GPUs of several hosts do."""
    device = dataclasses.make_dataclass("Device", ["platform", "slice_index", "id"], frozen=True)
    devices = [device("gpu", i // 4, i) for i in range(8)]
    mesh = sharding.make_mesh(sizes(fsdp=8) | {"dcn_data": 1}, devices)
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    with pytest.raises(UserError, match=r"dcn_data=2.* needs 2 slices, 1 are there"):
        sharding.make_mesh(sizes(fsdp=4) | {"dcn_data": 2}, devices)


# Where a leaf is split.


def test_one_device_splits_nothing():
    for shape in ((), (3,), (512, 512)):
        assert not any(sharding.leaf_spec("/a/to_q/dense/kernel", shape, shape_of(data=8)))


def test_fsdp_splits_the_largest_dimension_that_divides():
    mesh = shape_of(fsdp=4)
    assert sharding.leaf_spec("/a/kernel", (3, 3, 64, 128), mesh) == P(None, None, None, "fsdp")
    assert sharding.leaf_spec("/a/kernel", (512, 128), mesh) == P("fsdp", None)
    assert sharding.leaf_spec("/a/kernel", (126, 510, 4), mesh) == P(None, None, "fsdp")
    assert sharding.leaf_spec("/a/kernel", (513, 128), mesh) == P(None, "fsdp")


def test_fsdp_replicates_what_does_not_divide():
    assert not any(sharding.leaf_spec("/a/kernel", (510, 511), shape_of(fsdp=4)))


def test_fsdp_replicates_small_leaves():
    size = sharding.MIN_FSDP_SIZE
    assert not any(sharding.leaf_spec("/a/kernel", (4, size // 4 - 1), shape_of(fsdp=4)))
    assert any(sharding.leaf_spec("/a/kernel", (4, size // 4), shape_of(fsdp=4)))
    assert sharding.leaf_spec("/step", (), shape_of(fsdp=4)) == P()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("/x/attn1/to_q/dense/kernel", (64, 96), P(None, "tensor")),
        ("/x/attn2/to_k/dense/kernel", (64, 96), P(None, "tensor")),
        ("/x/attn2/to_v/dense/kernel", (64, 96), P(None, "tensor")),
        ("/x/attn1/to_out/dense/kernel", (96, 64), P("tensor", None)),
        ("/x/attn1/to_out/dense/bias", (64,), P(None)),
        ("/x/ff/proj_in/dense/kernel", (64, 512), P(None, "tensor")),
        ("/x/ff/proj_in/dense/bias", (512,), P("tensor")),
        ("/x/ff/proj_out/dense/kernel", (256, 64), P("tensor", None)),
        ("/x/ff/proj_out/dense/bias", (64,), P(None)),
        ("/x/proj_in/dense/kernel", (64, 64), P(None, None)),  # the transformer's, not the ff's
        ("/x/layer_11_ff_in/dense/kernel", (64, 256), P(None, "tensor")),
        ("/x/layer_11_ff_out/dense/kernel", (256, 64), P("tensor", None)),
        ("/x/conv_in/kernel", (3, 3, 64, 64), P(None, None, None, None)),
        ("/x/attn1/to_q/dense/kernel", (64, 95), P(None, None)),  # does not divide
    ],
)
def test_tensor_splits_by_name(name, shape, expected):
    assert sharding.leaf_spec(name, shape, shape_of(tensor=2)) == expected


def test_tensor_and_fsdp_split_different_dimensions():
    mesh = shape_of(fsdp=2, tensor=2)
    found = sharding.leaf_spec("/x/to_q/dense/kernel", (128, 1024), mesh)
    assert found == P("fsdp", "tensor")
    assert sharding.leaf_spec("/x/to_q/dense/kernel", (127, 1024), mesh) == P(None, "tensor")


# The rules against the networks that they are for.


@pytest.fixture(scope="module")
def parameters():
    """Shapes of what the second stage trains, by variant of the config."""
    shapes = {}
    for variant in txt2img.VARIANTS:
        config = txt2img.get_config(variant)
        vocab_size, length = config.tokenizer.vocab_size, config.tokenizer.max_length
        ldm = build.latent_diffusion(config, vocab_size, length)
        tokens = np.zeros((1, length), np.int32)
        init = functools.partial(ldm.init_trained, inputs={"tokens": tokens})
        shapes[variant] = jax.eval_shape(init, jax.random.key(0))
    return shapes


@pytest.mark.parametrize("variant", txt2img.VARIANTS)
@pytest.mark.parametrize("pattern", [pattern for pattern, _ in sharding.TENSOR_RULES])
def test_every_tensor_rule_finds_parameters(parameters, variant, pattern):
    names = ["/" + name for name in trees.flatten_names(parameters[variant])]
    assert any(re.search(pattern, name) for name in names)


@pytest.mark.parametrize("network", ["unet", "conditioner"])
def test_heads_are_split_alike_on_the_way_in_and_out(parameters, network):
    names = trees.flatten_names(parameters["digits"][network])
    attentions = {name.split("/to_q/")[0] for name in names if "/to_q/" in name}
    assert attentions
    for attention in attentions:
        spec = {}
        for part in ("to_q", "to_k", "to_v", "to_out"):
            name = f"{attention}/{part}/dense/kernel"
            spec[part] = sharding.leaf_spec(f"/{name}", names[name].shape, shape_of(tensor=2))
        assert spec["to_q"] == spec["to_k"] == spec["to_v"] == P(None, "tensor")
        assert spec["to_out"] == P("tensor", None)
        q, out = (names[f"{attention}/{part}/dense/kernel"].shape for part in ("to_q", "to_out"))
        assert q[-1] == out[-2]  # the heads


def test_most_of_the_model_is_split(parameters):
    mesh = shape_of(fsdp=8, tensor=2)
    names = trees.flatten_names(parameters["paper"])
    split = {
        name: math.prod(
            mesh.shape[axis]
            for axis in sharding.leaf_spec("/" + name, leaf.shape, mesh)
            if axis is not None
        )
        for name, leaf in names.items()
    }
    per_device = sum(math.prod(leaf.shape) // split[name] for name, leaf in names.items())
    assert per_device < 1.1 * trees.count(parameters["paper"]) / 8
    assert 16 in split.values()


def test_moments_lie_where_their_parameters_do(parameters):
    params, mesh = parameters["digits"], shape_of(fsdp=2, tensor=2)
    optimizer = make_optimizer(10, **txt2img.get_config("digits").optimizer)
    moments = trees.flatten_names(jax.eval_shape(optimizer.init, params))
    for name, leaf in trees.flatten_names(params).items():
        spec = sharding.leaf_spec("/" + name, leaf.shape, mesh)
        found = [
            sharding.leaf_spec("/" + key, moment.shape, mesh)
            for key, moment in moments.items()
            if key.endswith("/" + name)
        ]
        assert found == [spec, spec]  # first and second


def test_state_sharding_of_a_tree():
    mesh = sharding.make_mesh(sizes(fsdp=-1))
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((512, 64), np.float32)},
            "step": jax.ShapeDtypeStruct((), np.int32)}  # fmt: skip
    found = sharding.state_sharding(tree, mesh)
    devices = jax.device_count()
    assert found["a"]["kernel"].shard_shape((512, 64)) == (512 // devices, 64)
    assert found["step"].shard_shape(()) == ()
    assert found["step"].mesh == mesh


def test_one_rule_names_first_level_parameters_too():
    mesh = sharding.make_mesh(sizes(tensor=-1))
    found = sharding.state_sharding({"to_q": {"dense": {"kernel": np.ones((8, 8))}}}, mesh)
    kernel = found["to_q"]["dense"]["kernel"]
    assert kernel.shard_shape((8, 8)) == (8, 8 // jax.device_count())


# Batches.


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (3, 1), (2, 2), (1, 6)])
def test_batch_size_complaint_names_the_nearest_valid_sizes(data, fsdp):
    mesh = shape_of(data=data, fsdp=fsdp, tensor=5)

    def is_valid(size):
        return size >= 1 and size % (data * fsdp) == 0

    for size in range(-1, 20):
        if is_valid(size):
            sharding.check_batch_size(size, mesh, "batch_size")
            continue
        with pytest.raises(UserError, match=rf"first_stage\.batch_size={size} ") as raised:
            sharding.check_batch_size(size, mesh, "first_stage.batch_size")
        named = {int(n) for n in re.findall(r"\d+", str(raised.value).split(";")[-1])}
        below = [n for n in range(1, size) if is_valid(n)]
        above = [n for n in range(max(size, 1), 40) if is_valid(n)]
        assert named == {*below[-1:], above[0]}


def test_put_batch_splits_rows_over_data_and_fsdp():
    count = jax.device_count()
    fsdp = 2 if count % 2 == 0 else 1
    mesh = sharding.make_mesh(sizes(data=-1, fsdp=fsdp))
    images = np.arange(2 * count * 3).reshape(2 * count, 3)
    batch = sharding.put_batch({"image": images, "index": np.arange(2 * count)}, mesh, 2 * count)
    np.testing.assert_array_equal(batch["image"], images)
    assert batch["index"].shape == (2 * count,)
    shards = sorted(batch["image"].addressable_shards, key=lambda shard: shard.index[0].start or 0)
    assert len({shard.device for shard in shards}) == count
    for i, shard in enumerate(shards):
        np.testing.assert_array_equal(shard.data, images[2 * i : 2 * i + 2])


def test_put_batch_repeats_rows_along_the_tensor_axis():
    mesh = sharding.make_mesh(sizes(tensor=-1))
    images = np.arange(12).reshape(4, 3)
    batch = sharding.put_batch(images, mesh, 4)
    assert len(batch.addressable_shards) == jax.device_count()
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, images)
