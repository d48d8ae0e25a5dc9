"""First stages in and out of CompVis' files; diffusers' own converter reads what is written."""

import pickle
import re
import sys
import types

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import autoencoders, files

CONFIGS = ("kl", "kl_attention", "vq", "vq_plain")


def assert_same_tree(a, b):
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


def as_numpy(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def check_refused(*parts: str, path, **arguments):
    with pytest.raises(UserError) as error:
        autoencoders.load(path, **arguments)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def tensors(model, compvis_state):
    return as_numpy(compvis_state(model("kl")))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_kind_and_fields_are_inferred(model, compvis_state, loaded_from, name, prefix, tmp_path):
    path = tmp_path / "model.safetensors"
    state = {prefix + key: x for key, x in as_numpy(compvis_state(model(name))).items()}
    files.write(path, state)
    loaded, expected = autoencoders.load(path), loaded_from(name)
    assert (loaded.kind, loaded.fields) == (expected.kind, expected.fields)
    assert loaded.scaling_factor is None
    assert_same_tree(loaded.params, expected.params)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_a_whole_model_is_read(
    model, compvis_state, loaded_from, legacy, tmp_path, monkeypatch
):
    """Lightning's layout, with objects of classes that are not there when it is read."""
    module = types.ModuleType("made_up_callbacks")
    exec(
        "class Callback:\n    def __setstate__(self, state):\n        raise SystemExit",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, "made_up_callbacks", module)
    callback = module.Callback()
    callback.best = np.float64(0.5)
    callback.__dict__["paths"] = {"a": {1, 2}}
    network = compvis_state(model("vq"))
    state = {f"first_stage_model.{name}": tensor for name, tensor in network.items()}
    state |= {
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2, 2),
        "first_stage_model.colorize": torch.zeros(3, 1, 1, 1),
        "model.diffusion_model.time_embed.0.weight": torch.ones(4, 4),
        "cond_stage_model.transformer.bias": torch.ones(4),
        "model_ema.decay": torch.tensor(0.9999),
        "betas": torch.zeros(1000),
        "scale_factor": torch.tensor(0.75),
    }
    checkpoint = {
        "epoch": 3,
        "global_step": 7,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {module.Callback: callback, "list": [callback, torch.device("cpu")]},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "lr_schedulers": [np.arange(3.0), torch.float16, torch.Size([1])],
    }
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "made_up_callbacks")
    loaded = autoencoders.load(path)
    assert (loaded.kind, loaded.scaling_factor) == ("vq", 0.75)
    assert loaded.fields == loaded_from("vq").fields
    assert_same_tree(loaded.params, loaded_from("vq").params)


def test_an_autoencoder_alone_is_read_with_its_loss_and_ema_left_out(
    tensors, loaded_from, tmp_path
):
    extra = {
        "loss.logvar": np.zeros((), np.float32),
        "loss.perceptual_loss.lin0.model.1.weight": np.zeros((1, 64, 1, 1), np.float32),
        "model_ema.encoderconv_inweight": np.zeros(3, np.float32),
        "model_ema.num_updates": np.zeros((), np.int32),
    }
    files.write(tmp_path / "model.safetensors", tensors | extra)
    loaded = autoencoders.load(tmp_path / "model.safetensors")
    assert_same_tree(loaded.params, loaded_from("kl").params)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_change_no_bit(model, compvis_state, loaded_from, name, prefix, tmp_path):
    path, loaded = tmp_path / "new" / "out.safetensors", loaded_from(name)
    saved = loaded.kind, loaded.fields, loaded.params
    autoencoders.save_compvis(path, *saved, prefix=prefix, scaling_factor=0.5)
    written = files.read(path)
    expected = as_numpy(compvis_state(model(name)))
    if prefix:
        expected = {f"first_stage_model.{key}": x for key, x in expected.items()}
        expected["scale_factor"] = np.array(0.5, np.float32)
    assert written.keys() == expected.keys()
    for key, tensor in written.items():
        assert tensor.shape == expected[key].shape and tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[key], err_msg=key)
    again = autoencoders.load(path)
    assert again.scaling_factor == (0.5 if prefix else None)
    assert (again.kind, again.fields) == (loaded.kind, loaded.fields)
    assert_same_tree(again.params, loaded.params)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_converter_of_diffusers_reads_what_is_written(model, loaded_from, prefix, tmp_path):
    path, loaded = tmp_path / "out.safetensors", loaded_from("kl")
    autoencoders.save_compvis(path, loaded.kind, loaded.fields, loaded.params, prefix)
    written = {name: torch.tensor(x) for name, x in files.read(path).items()}
    converted = convert_ldm_vae_checkpoint(written, dict(model("kl").config))
    original = model("kl").state_dict()
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)


def test_fields_that_only_compvis_can_express_survive(tmp_path):
    fields = dict(
        image_channels=2, z_channels=5, embed_dim=3, channels=32, channel_multipliers=(2, 1),
        num_res_blocks=1, attention_levels=(0,), mid_attention=True, num_groups=32,
    )  # fmt: skip
    network, images = autoencoders.NETWORKS["kl"](**fields), np.zeros((1, 4, 4, 2), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    path = tmp_path / "a.safetensors"
    autoencoders.save_compvis(path, "kl", fields, params)
    loaded = autoencoders.load(path)
    assert (loaded.kind, loaded.fields) == ("kl", fields)
    assert_same_tree(loaded.params, params)


def test_groups_are_assumed_or_given(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    files.write(path, tensors)
    assert autoencoders.load(path).fields["num_groups"] == 32
    assert autoencoders.load(path, num_groups=16).fields["num_groups"] == 16
    check_refused("32 channels, which 5 groups do not divide", path=path, num_groups=5)


def test_every_missing_extra_and_misshapen_tensor_is_named(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    del tensors["encoder.mid.attn_1.q.weight"], tensors["decoder.up.1.upsample.conv.bias"]
    tensors["quant_conv.weight"] = np.zeros((3, 3, 1, 1), np.float32)
    tensors["encoder.mid.attn_1.to_qkv.weight"] = np.zeros((9, 3, 1, 1), np.float32)
    files.write(path, tensors)
    check_refused(
        "2 missing: ",
        "'encoder.mid.attn_1.q.weight' (64, 64, 1, 1)",
        "'decoder.up.1.upsample.conv.bias' (64,)",
        "1 misshapen: 'quant_conv.weight' (3, 3, 1, 1), expected (6, 6, 1, 1)",
        "1 extra: 'encoder.mid.attn_1.to_qkv.weight' (9, 3, 1, 1)",
        path=path,
    )


@pytest.mark.parametrize(
    ("drop", "add", "parts"),
    [
        ("", {}, ("holds no first stage", "encoder.*")),
        ("", {"unet.a": (1,)}, ("holds no first stage", "the first are 'unet.a'")),
        ("", {"encoder.down_blocks.0.x": (1,)}, ("a diffusers model", "config.json")),
        (
            "decoder.conv_in.weight|post_quant_conv.weight",
            {},
            ("does not tell the size", "decoder.conv_in.weight, post_quant_conv.weight"),
        ),
        (r"encoder\.down\.0\.|decoder\.up\.0\.", {}, ("has no blocks for level 0",)),
        (
            "^$",
            {
                f"{side}.{i}.block.{j}.{layer}.weight": (48, 48, 3, 3)
                for side, i in (("encoder.down", 1), ("decoder.up", 1))
                for j in (0, 1)
                for layer in ("conv1", "conv2", "norm2")
            },
            ("48 channels on level 1", "no multiple of the 32"),
        ),
        ("^$", {"quantize.embed.weight": (7, 3)}, ("no codebook quantize.embedding.weight",)),
        ("^$", {"first_stage_model.x": (1,)}, ("holds no first stage",)),
    ],
)
def test_files_without_a_whole_first_stage_are_refused(tensors, tmp_path, drop, add, parts):
    path = tmp_path / "model.safetensors"
    kept = {name: x for name, x in tensors.items() if not re.search(drop, name)}
    files.write(path, kept | {name: np.zeros(shape, np.float32) for name, shape in add.items()})
    check_refused(*parts, path=path)


def test_networks_that_compvis_code_does_not_have_are_refused(loaded_from, tmp_path):
    path, loaded = tmp_path / "out.safetensors", loaded_from("vq")
    for values, message in (
        (dict(num_groups=16), "32 groups; it cannot express num_groups 16"),
        (dict(levels=(8, 5, 5, 5, 5)), "cannot express finite scalar quantisation"),
    ):
        with pytest.raises(UserError, match=message):
            autoencoders.save_compvis(path, "vq", loaded.fields | values, loaded.params)
    with pytest.raises(UserError, match=r"written as \.safetensors, not to .*out\.ckpt"):
        autoencoders.save_compvis(path.with_suffix(".ckpt"), "vq", loaded.fields, loaded.params)
    assert not list(tmp_path.iterdir())


def test_a_scale_factor_of_the_wrong_shape_is_refused(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    prefixed = {f"first_stage_model.{name}": x for name, x in tensors.items()}
    files.write(path, prefixed | {"scale_factor": np.zeros(4, np.float32)})
    check_refused("scale_factor of shape (4,)", path=path)


@pytest.mark.parametrize(
    "factor", [np.complex64(1), np.float32(np.nan), np.float64(0), np.int8(-1)]
)
def test_a_scale_factor_that_is_no_positive_number_is_refused(tensors, tmp_path, factor):
    path = tmp_path / "model.safetensors"
    prefixed = {f"first_stage_model.{name}": x for name, x in tensors.items()}
    files.write(path, prefixed | {"scale_factor": np.array(factor)})
    check_refused("scal", "factor", path=path)


def test_a_plain_pickle_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {"encoder.conv_in.weight": 1}}))
    check_refused("a pickle, but not one that torch.save wrote", path=path)
