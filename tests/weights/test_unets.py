"""UNets in and out of diffusers' folders, against diffusers itself."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, unets
from tests.unets import CONFIGS, arguments, assert_same_tree, in_jax, in_torch, model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders that diffusers saved, by name of their config; not to be changed."""

    @functools.cache
    def save(name: str):
        path = tmp_path_factory.mktemp("unets") / name
        model(name).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def loaded_from(folder):
    """What we load from the folders, by name of their config; not to be changed."""
    return functools.cache(lambda name: unets.load(folder(name)))


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of a diffusers folder with other values in its config."""

    def change(name: str, **values):
        place = tmp_path / "changed"
        shutil.copytree(folder(name), place)
        config = json.loads((place / "config.json").read_text()) | values
        (place / "config.json").write_text(json.dumps(config))
        return place

    return change


def check_refused(place, *parts: str):
    with pytest.raises(UserError) as error:
        unets.load(place)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_equal_diffusers(name, loaded_from):
    loaded = loaded_from(name)
    for leaf in jax.tree.leaves(loaded.params):
        assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 and leaf.flags.writeable
    given = arguments(loaded)
    ours, expected = in_jax(loaded, *given), in_torch(model(name), *given)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_fields_are_those_of_the_config(loaded_from):
    first = loaded_from("stable_diffusion_1")
    assert (first.in_channels, first.context_dim, first.linear_projections) == (4, 24, False)
    assert first.fields == dict(
        out_channels=4, channels=32, channel_multipliers=(1, 2), num_res_blocks=1,
        attention_levels=(0,), attention="transformer", scale_shift_norm=False,
        resblock_updown=False, as_in_ddpm=False, dropout=0.0, num_groups=32,
        norm_epsilon=1e-5, num_heads=4,
        transformer_depth=1,
    )  # fmt: skip
    second = loaded_from("stable_diffusion_2")
    assert (second.in_channels, second.context_dim, second.linear_projections) == (5, 40, True)
    assert second.fields["num_heads"] == (2, 4) and second.fields["transformer_depth"] == (1, 2)
    assert loaded_from("text2im").fields["num_classes"] == 7
    vectors = loaded_from("vectors").fields
    assert (vectors["vector_dim"], vectors["dropout"]) == (6, 0.1) and vectors["scale_shift_norm"]
    plain = loaded_from("unconditional")
    assert (plain.in_channels, plain.context_dim) == (3, None)
    assert (plain.fields["attention"], plain.fields["head_dim"]) == ("self", 8)
    assert plain.fields["norm_epsilon"] == 1e-6 and plain.fields["attention_levels"] == (1,)
    blocks = loaded_from("res_blocks").fields
    assert blocks["resblock_updown"] and blocks["num_heads"] == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_through_ours_changes_no_bit(name, tmp_path, loaded_from):
    loaded, original = loaded_from(name), model(name)
    unets.save_diffusers(
        tmp_path / "new" / "unet",
        loaded.fields,
        loaded.params,
        sample_size=8,
        linear_projections=loaded.linear_projections,
    )
    again, info = type(original).from_pretrained(
        tmp_path / "new" / "unet", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(info.values()), info
    for key, tensor in original.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    names = sorted(path.name for path in (tmp_path / "new" / "unet").iterdir())
    assert names == ["config.json", WEIGHTS]
    given = arguments(loaded)
    np.testing.assert_array_equal(in_torch(again.eval(), *given), in_torch(original, *given))
    ours = unets.load(tmp_path / "new")  # a pipeline's folder
    assert ours.fields == loaded.fields and ours.context_dim == loaded.context_dim
    assert_same_tree(ours.params, loaded.params)


def test_a_network_without_a_context_survives(tmp_path):
    fields = dict(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(0,))
    shapes = jax.eval_shape(UNet(**fields).init, jax.random.key(0), np.zeros((1, 4, 4, 3)),
                            np.zeros(1))["params"]  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    unets.save_diffusers(tmp_path, fields, params)
    again = unets.load(tmp_path)
    assert again.context_dim is None and again.fields["num_heads"] == (1, 2)
    assert_same_tree(again.params, params)
    UNet2DConditionModel.from_pretrained(tmp_path)


def test_old_names_of_attention_are_read(folder, tmp_path, loaded_from):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in model("unconditional").state_dict().items():
        for current, before in old.items():
            key = key.replace(current, before)
        state[key] = tensor
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    shutil.copy(folder("unconditional") / "config.json", tmp_path)
    assert any("proj_attn" in key for key in state)
    assert_same_tree(unets.load(tmp_path).params, loaded_from("unconditional").params)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files_are_read(tmp_path, loaded_from, variant, safe):
    model("text2im").save_pretrained(
        tmp_path, max_shard_size="300KB", variant=variant, safe_serialization=safe
    )
    parts = [path for path in tmp_path.iterdir() if "-of-" in path.name]
    assert len(parts) > 2
    assert_same_tree(unets.load(tmp_path).params, loaded_from("text2im").params)
    parts[0].unlink()
    check_refused(tmp_path, "cannot read weights", parts[0].name)


def test_an_index_that_leads_elsewhere_is_refused(changed):
    place = changed("unconditional")
    (place / WEIGHTS).rename(place.parent / "other")
    index = place / f"{WEIGHTS}.index.json"
    for content in ({"weight_map": {"a": "../other"}}, {"weight_map": {"a": 3}}, {"weight_map": 1}):
        index.write_text(json.dumps(content))
        check_refused(place, f"{index} has no weight_map")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    half = UNet2DModel(**CONFIGS["unconditional"]).to(dtype)
    half.save_pretrained(tmp_path, variant="fp16")
    kernel = unets.load(tmp_path).params["conv_in"]["kernel"]
    assert kernel.dtype == np.float32
    expected = half.conv_in.weight.detach().float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
    ("name", "values", "parts"),
    [
        ("text2im", dict(_class_name="AutoencoderKL"), ("'AutoencoderKL'", "UNet2DConditionModel")),
        ("text2im", dict(act_fn="gelu"), ("act_fn 'gelu'", "'silu'")),
        ("text2im", dict(flip_sin_to_cos=False), ("'flip_sin_to_cos': False",)),
        ("text2im", dict(freq_shift=1), ("'freq_shift': 1",)),
        ("text2im", dict(only_cross_attention=[True, False]), ("only_cross_attention [True,",)),
        ("text2im", dict(mid_block_type=None), ("mid_block_type None",)),
        ("text2im", dict(addition_embed_type="text_time"), ("addition_embed_type 'text_time'",)),
        ("text2im", dict(class_embed_type="timestep"), ("class_embed_type 'timestep'",)),
        ("text2im", dict(attention_head_dim=[1, 2, 3]), ("attention_head_dim [1, 2, 3]",)),
        ("text2im", dict(attention_head_dim=5), ("num_heads=5 does not divide the 64 channels",)),
        ("text2im", dict(cross_attention_dim=[8, 16]), ("cross_attention_dim [8, 16]",)),
        ("text2im", dict(layers_per_block=[1, 2]), ("layers_per_block [1, 2]",)),
        ("text2im", dict(block_out_channels=[32, 48]), ("[32, 48]", "multiples of the first")),
        ("text2im", dict(norm_num_groups=7), ("7 groups do not divide",)),
        ("text2im", dict(dropout="x"), ("dropout 'x'",)),
        ("text2im", dict(resnet_time_scale_shift="x"), ("resnet_time_scale_shift 'x'",)),
        ("text2im", dict(down_block_types=["KDownBlock2D"] * 2), ("KDownBlock2D", "known are")),
        ("text2im", dict(down_block_types=["DownBlock2D"]), ("1 down_block_types and 2 block_",)),
        ("text2im", dict(up_block_types=["UpBlock2D"] * 2), ("attention on different levels",)),
        ("unconditional", dict(time_embedding_type="fourier"), ("time_embedding_type 'fourier'",)),
        ("unconditional", dict(downsample_padding=0), ("'downsample_padding': 0",)),
        ("unconditional", dict(add_attention=False), ("add_attention False",)),
        ("unconditional", dict(upsample_type="resnet"), ("by residual blocks in others",)),
        ("res_blocks", dict(attn_norm_num_groups=None), ("attn_norm_num_groups None",)),
    ],
)
def test_configs_that_this_network_cannot_be_are_refused(changed, name, values, parts):
    place = changed(name, **values)
    check_refused(place, *parts, str(place))


def test_every_missing_extra_and_misshapen_tensor_is_named(changed):
    place = changed("stable_diffusion_1")
    tensors = dict(safetensors.numpy.load_file(place / WEIGHTS))
    del tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    tensors["conv_out.bias"] = np.zeros(3, np.float32)
    tensors["surprise"] = np.zeros((2, 5), np.float32)
    files.write(place / WEIGHTS, tensors)
    check_refused(
        place,
        "1 missing: 'mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight' (64, 24)",
        "1 misshapen: 'conv_out.bias' (3,), expected (4,)",
        "1 extra: 'surprise' (2, 5)",
    )


def test_folders_without_a_unet_are_refused(changed, tmp_path):
    check_refused(tmp_path, "no config.json in it, nor in unet/")
    place = changed("unconditional")
    (place / WEIGHTS).unlink()
    check_refused(place, f"{place} has neither {WEIGHTS} nor")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (dict(channel_multipliers=(2, 4)), "channel_multipliers"),
        (dict(conv_resample=False), "conv_resample"),
        (dict(resblock_updown=True), "resblock_updown"),
        (dict(attention="self", vector_dim=3), "vector_dim"),
        (dict(attention="self", attention_levels=(0,), num_heads=4), "num_heads"),
    ],
)
def test_networks_that_diffusers_does_not_have_are_refused(tmp_path, loaded_from, values, field):
    loaded = loaded_from("stable_diffusion_1")
    with pytest.raises(UserError, match=f"cannot express {field}"):
        unets.save_diffusers(tmp_path / "out", loaded.fields | values, loaded.params)
    assert not (tmp_path / "out").exists()
