"""First stages in and out of diffusers' folders, against diffusers itself."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL, VQModel

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import autoencoders, files

CONFIGS = ("kl", "kl_attention", "vq", "vq_plain")
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICKLY = {"xla_backend_optimization_level": 0}  # compiled


def network_of(loaded):
    return autoencoders.NETWORKS[loaded.kind](**loaded.fields)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_same_tree(a, b):
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


@pytest.fixture
def check_refused():
    def check(*parts: str, path, **arguments):
        with pytest.raises(UserError) as error:
            autoencoders.load(path, **arguments)
        assert "\n" not in str(error.value)
        for part in parts:
            assert part in str(error.value)

    return check


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of a diffusers folder with other values in its config, or without keys (None)."""

    def change(name: str = "kl", **values):
        place = tmp_path / "changed"
        shutil.copytree(folder(name), place)
        config = json.loads((place / "config.json").read_text()) | values
        config = {key: value for key, value in config.items() if value is not None}
        (place / "config.json").write_text(json.dumps(config))
        return place

    return change


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loaded_tree_is_that_of_the_network(name, loaded_from):
    loaded = loaded_from(name)
    network = network_of(loaded)
    images = np.zeros((1, 8, 8, loaded.fields["image_channels"]), np.float32)
    wanted = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    for leaf in jax.tree.leaves(loaded.params):
        assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 and leaf.flags.writeable


def test_fields_are_those_of_the_config(folder, loaded_from):
    shared = dict(num_groups=32, channels=32)
    kl = autoencoders.load(str(folder("kl_attention")))  # a string works as well as a path
    assert (kl.kind, kl.scaling_factor) == ("kl", 0.18215)
    assert kl.fields == shared | dict(
        image_channels=1, z_channels=4, embed_dim=4, channel_multipliers=(1, 1, 3),
        num_res_blocks=2, attention_levels=(1,), mid_attention=False,
    )  # fmt: skip
    vq = autoencoders.load(folder("vq"), num_groups=32)
    assert vq.kind == "vq"
    assert vq.fields == shared | dict(
        image_channels=3, z_channels=3, embed_dim=5, channel_multipliers=(1, 2), num_res_blocks=2,
        attention_levels=(0, 1), mid_attention=True, codebook_size=17,
    )  # fmt: skip
    assert loaded_from("kl").scaling_factor == 0.25
    assert loaded_from("vq_plain").fields["embed_dim"] == 4


@pytest.mark.parametrize("name", ["kl", "kl_attention", "vq"])
def test_values_equal_diffusers(model, name, loaded_from):
    loaded, reference = loaded_from(name), model(name)
    network = network_of(loaded)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1, 16, 8, loaded.fields["image_channels"])).astype(np.float32)
    factor = network.downsampling_factor
    z = rng.normal(size=(1, 16 // factor, 8 // factor, loaded.fields["embed_dim"]))
    z = z.astype(np.float32)

    @jax.jit
    def run(params, images, z):
        moments = network.apply({"params": params}, images, method="encode").moments
        return moments, network.apply({"params": params}, z, method="decode")

    ours = run.lower(loaded.params, images, z).compile(QUICKLY)(loaded.params, images, z)
    with torch.no_grad():
        x = torch.tensor(images).permute(0, 3, 1, 2)
        encoded = reference.encode(x)
        # Diffusers clips its log-variances only as it computes the standard deviation.
        latents = encoded.latents if name == "vq" else encoded.latent_dist.parameters
        decoded = reference.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
    for mine, theirs in zip(ours, (latents, decoded), strict=True):
        expected = nhwc(theirs)
        assert mine.shape == expected.shape
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_through_ours_changes_no_bit(model, name, tmp_path, caplog, loaded_from):
    loaded = loaded_from(name)
    saved = (loaded.kind, loaded.fields, loaded.params, loaded.scaling_factor)
    autoencoders.save_diffusers(tmp_path / "new" / "vae", *saved)
    kind = VQModel if name.startswith("vq") else AutoencoderKL
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        again, info = kind.from_pretrained(
            tmp_path / "new" / "vae", low_cpu_mem_usage=False, output_loading_info=True
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert [record.getMessage() for record in caplog.records] == []
    original = model(name).state_dict()
    assert again.state_dict().keys() == original.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, original[key]), key
    ours, theirs = dict(again.config), dict(model(name).config)
    for config in (ours, theirs):
        for key in [*(key for key in config if key.startswith("_")), "sample_size"]:
            del config[key]
    if theirs.get("vq_embed_dim", 0) is None:
        theirs["vq_embed_dim"] = theirs["latent_channels"]  # what it then is
    assert {k: v if not isinstance(v, tuple) else list(v) for k, v in ours.items()} == {
        k: v if not isinstance(v, tuple) else list(v) for k, v in theirs.items()
    }
    assert sorted(path.name for path in (tmp_path / "new" / "vae").iterdir()) == [
        "config.json",
        WEIGHTS,
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_through_theirs_changes_no_bit(name, tmp_path, loaded_from):
    loaded = loaded_from(name)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), loaded.params)
    autoencoders.save_diffusers(tmp_path, loaded.kind, loaded.fields, params, None)
    again = autoencoders.load(tmp_path)
    assert (again.kind, again.fields, again.scaling_factor) == (loaded.kind, loaded.fields, 1.0)
    assert_same_tree(again.params, params)


def test_groups_other_than_32_survive(changed, tmp_path):
    loaded = autoencoders.load(changed(norm_num_groups=16))
    assert loaded.fields["num_groups"] == 16
    autoencoders.save_diffusers(tmp_path, loaded.kind, loaded.fields, loaded.params, 2.0)
    again = autoencoders.load(tmp_path)
    assert (again.fields, again.scaling_factor) == (loaded.fields, 2.0)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_old_names_and_shapes_of_attention_are_read(model, name, folder, tmp_path, loaded_from):
    """From before diffusers 0.17, some with 1x1 convolutions for the projections."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for convolutions in (False, True):
        state = {}
        for key, tensor in model(name).state_dict().items():
            if "attentions" in key:
                for current, before in old.items():
                    key = key.replace(current, before)
                if convolutions and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
            state[key] = tensor
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
        shutil.copy(folder(name) / "config.json", tmp_path)
        assert any("proj_attn" in key for key in state)
        assert_same_tree(autoencoders.load(tmp_path).params, loaded_from(name).params)


@pytest.mark.parametrize(("name", "subfolder"), [("kl", "vae"), ("vq", "vqvae"), ("kl", "vqvae")])
def test_the_folder_of_a_pipeline_is_searched(folder, name, subfolder, tmp_path, loaded_from):
    shutil.copytree(folder(name), tmp_path / subfolder)
    (tmp_path / "model_index.json").write_text("{}")
    loaded = autoencoders.load(tmp_path)
    assert_same_tree(loaded.params, loaded_from(name).params)


def test_half_precision_is_read_as_float32(model, folder, tmp_path):
    model_ = type(model("kl"))(**dict(model("kl").config)).to(torch.bfloat16)
    model_.save_pretrained(tmp_path / "half")
    loaded = autoencoders.load(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype("float32")}
    kernel = model_.encoder.conv_in.weight.detach().float().numpy()
    ours = loaded.params["encoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(ours, kernel.transpose(2, 3, 1, 0))
    shutil.move(tmp_path / "half" / WEIGHTS,
                tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    assert_same_tree(autoencoders.load(tmp_path / "half").params, loaded.params)


def test_diffusers_own_defaults_hold_where_a_config_is_silent(changed):
    loaded = autoencoders.load(changed(scaling_factor=None, norm_num_groups=None))
    assert loaded.scaling_factor == 0.18215 and loaded.fields["num_groups"] == 32


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (dict(_class_name="UNet2DModel"), ("'UNet2DModel'", "AutoencoderKL and VQModel")),
        (dict(_class_name=None), ("the class 'None'",)),
        (dict(act_fn="gelu"), ("act_fn 'gelu'", "'silu'")),
        (dict(use_quant_conv=False), ("use_quant_conv False",)),
        (dict(shift_factor=0.1), ("shift_factor 0.1",)),
        (dict(out_channels=1), ("in_channels 3 and out_channels 1",)),
        (dict(block_out_channels=[64, 96]), ("[64, 96]", "multiples of the first")),
        (dict(block_out_channels=[]), ("block_out_channels []",)),
        (dict(block_out_channels=[32, 64, 64]), ("2 down_block_types and 3 block_out",)),
        (dict(layers_per_block="two"), ("layers_per_block", "two", "positive integers")),
        (dict(layers_per_block=0), ("layers_per_block", "positive integers")),
        (dict(scaling_factor="big"), ("scaling_factor 'big'",)),
        (dict(down_block_types=["DownBlock2D"] * 2), ("down_block_types", "DownEncoderBlock2D")),
        (
            dict(down_block_types=["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
            ("attention on different levels",),
        ),
        (dict(norm_num_groups=7), ("32 channels", "7 groups do not divide")),
    ],
)
def test_configs_that_this_network_cannot_be_are_refused(changed, check_refused, values, parts):
    place = changed(**values)
    check_refused(*parts, str(place), path=place)


def test_folders_without_a_first_stage_are_refused(changed, check_refused, tmp_path):
    check_refused(str(tmp_path), "no config.json in it, nor in vae/ or vqvae/", path=tmp_path)
    place = changed()
    check_refused("norm_num_groups 32, not 8", path=place, num_groups=8)
    (place / WEIGHTS).rename(place / "other.safetensors")
    check_refused("neither diffusion_pytorch_model.safetensors nor", str(place), path=place)
    for text, part in (("{", "cannot read"), ("[]", "holds no JSON object")):
        (place / "config.json").write_text(text)
        check_refused(part, str(place / "config.json"), path=place)


def test_every_missing_extra_and_misshapen_tensor_is_named(changed, check_refused):
    place = changed()
    tensors = dict(safetensors.numpy.load_file(place / WEIGHTS))
    del tensors["encoder.conv_in.bias"], tensors["decoder.mid_block.attentions.0.to_q.weight"]
    tensors["quant_conv.weight"] = np.zeros((3, 3, 1, 1), np.float32)
    tensors["post_quant_conv.bias"] = np.zeros(3, np.int64)
    tensors["surprise"] = np.zeros((2, 5), np.float32)
    tensors["encoder.down_blocks.2.resnets.0.conv1.weight"] = np.zeros(4, np.float32)
    files.write(place / WEIGHTS, tensors)
    check_refused(
        str(place / WEIGHTS),
        "2 missing: ", "'encoder.conv_in.bias' (32,)",
        "'decoder.mid_block.attentions.0.to_q.weight' (64, 64)",
        "2 misshapen: ", "'quant_conv.weight' (3, 3, 1, 1), expected (6, 6, 1, 1)",
        "'post_quant_conv.bias' of int64, expected floating point",
        "2 extra: ", "'surprise' (2, 5)", "'encoder.down_blocks.2.resnets.0.conv1.weight' (4,)",
        path=place,
    )  # fmt: skip


def test_networks_that_diffusers_does_not_have_are_refused(tmp_path, loaded_from):
    for name, values, message in (
        ("kl", dict(channel_multipliers=(2, 4)), r"cannot express channel_multipliers \(2, 4\)"),
        ("kl", dict(embed_dim=2), "cannot express z_channels 3 with embed_dim 2"),
        ("vq", dict(levels=(8, 5, 5, 5, 5)), "VQModel .* cannot express finite scalar"),
    ):
        loaded = loaded_from(name)
        with pytest.raises(UserError, match=message):
            autoencoders.save_diffusers(
                tmp_path / "out", loaded.kind, loaded.fields | values, loaded.params, None
            )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, loaded_from):
    loaded = loaded_from("vq_plain")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write weights {tmp_path}/file/vae"):
        autoencoders.save_diffusers(
            tmp_path / "file" / "vae", loaded.kind, loaded.fields, loaded.params, None
        )
