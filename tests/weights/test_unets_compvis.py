"""UNets in and out of CompVis' names, against diffusers' conversion of its files."""

import functools
import math

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from latent_diffusion_jax.models.attention import PixelAttention
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import unets
from tests.torch_networks import draw_params, nchw, nhwc
from tests.unets import CONFIGS, TRANSFORMERS, assert_same_tree, model

PREFIX = "model.diffusion_model."
SELF = dict(channels=32, num_res_blocks=1, attention="self", out_channels=3)
# Networks that diffusers does not convert.
OTHERS = {
    "plain": SELF | dict(channel_multipliers=(1, 2), attention_levels=(1,), num_heads=4),
    "one_level": SELF | dict(channel_multipliers=(1,), num_res_blocks=2, attention_levels=(0,)),
    "res_blocks": SELF | dict(
        channel_multipliers=(1, 1, 2), attention_levels=(0, 2), num_heads=2, resblock_updown=True,
        scale_shift_norm=True, num_classes=3,
    ),
    "averaging": SELF | dict(
        channel_multipliers=(1, 2, 2), attention_levels=(), num_res_blocks=2, conv_resample=False,
    ),
    "no_context": dict(
        channels=32, channel_multipliers=(2, 4), num_res_blocks=1, attention_levels=(0, 1),
        transformer_depth=2, num_heads=4,
    ),
}  # fmt: skip


@functools.cache
def drawn(name: str):
    """Random parameters of one of the others."""
    network = UNet(**OTHERS[name])
    vector = np.zeros(1, np.int32) if network.num_classes else None
    return draw_params(network, np.zeros((1, 4, 4, 5)), np.zeros(1), None, vector)


@pytest.fixture(scope="module")
def loaded_from(tmp_path_factory):
    """What we load of diffusers' models, by name of their config; not to be changed."""

    @functools.cache
    def load(name: str):
        path = tmp_path_factory.mktemp("unets") / name
        model(name).save_pretrained(path)
        return unets.load(path)

    return load


def as_compvis(loaded) -> dict[str, np.ndarray]:
    return unets.to_compvis(
        loaded.fields, loaded.params, linear_projections=loaded.linear_projections
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_diffusers_converts_what_we_write(name, loaded_from):
    tensors = as_compvis(loaded_from(name))
    named = {PREFIX + key: torch.tensor(tensor) for key, tensor in tensors.items()}
    original = model(name)
    converted = single_file_utils.convert_ldm_unet_checkpoint(named, dict(original.config))
    expected = original.state_dict()
    assert converted.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(converted[key], tensor), key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_diffusers_models_survive(name, loaded_from):
    loaded = loaded_from(name)
    whole = {PREFIX + key: tensor for key, tensor in as_compvis(loaded).items()}
    whole |= {
        "first_stage_model.encoder.conv_in.weight": np.zeros((2, 2, 3, 3)),
        "betas": np.ones(3),
    }
    again = unets.from_compvis(whole, "a file", num_heads=4)
    inferred = loaded.fields | dict(num_heads=4, dropout=0.0)
    for key, value in again.fields.items():
        assert value == inferred.get(key, getattr(UNet(), key)), key
    for key in ("in_channels", "context_dim", "linear_projections"):
        assert getattr(again, key) == getattr(loaded, key)
    assert_same_tree(again.params, loaded.params)


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_survive(name):
    fields, params = OTHERS[name], drawn(name)
    tensors = unets.to_compvis(fields, params)
    heads = dict(num_heads=fields["num_heads"]) if "num_heads" in fields else dict(head_dim=32)
    again = unets.from_compvis(tensors, "a file", **heads)
    assert again.in_channels == 5 and again.context_dim is None
    for key, value in (fields | heads).items():
        assert again.fields[key] == value, key
    assert_same_tree(again.params, params)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_are_read_as_float32(dtype):
    tensors = {
        key: x.astype(dtype) for key, x in unets.to_compvis(OTHERS["plain"], drawn("plain")).items()
    }
    params = unets.from_compvis(tensors, "a file", num_heads=4).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(
        params["conv_in"]["kernel"], drawn("plain")["conv_in"]["kernel"], rtol=1e-3
    )


class AttentionBlock(torch.nn.Module):
    """As CompVis' code has it: heads are cut out of the joint projection first."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.norm = torch.nn.GroupNorm(32, channels)
        self.qkv = torch.nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = torch.nn.Conv1d(channels, channels, 1)
        self.num_heads = num_heads

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.flatten(2)
        batch, channels, _ = x.shape
        heads = self.qkv(self.norm(x)).reshape(batch * self.num_heads, -1, x.shape[2])
        q, k, v = heads.split(channels // self.num_heads, dim=1)
        scores = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1])
        out = torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(x.shape)
        return image + self.proj_out(out).reshape(image.shape)


def test_heads_of_a_joint_projection_come_first():
    fields, params = OTHERS["plain"], drawn("plain")
    tensors = unets.to_compvis(fields, params)
    block = AttentionBlock(64, fields["num_heads"])
    state = {
        key.removeprefix("middle_block.1."): torch.tensor(tensor)
        for key, tensor in tensors.items()
        if key.startswith("middle_block.1.")
    }
    block.load_state_dict(state, strict=True)
    x = np.random.default_rng(0).normal(size=(2, 4, 2, 64)).astype(np.float32)
    attention = PixelAttention(num_heads=fields["num_heads"], epsilon=1e-5)
    ours = attention.apply({"params": params["mid_0_attention"]}, x)
    expected = nhwc(block.double()(nchw(x)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Heads, which files do not say.


def with_context(width: int, **fields) -> dict[str, np.ndarray]:
    """The tensors of a small UNet with a context."""
    fields = (
        dict(channels=64, channel_multipliers=(1,), num_res_blocks=1, attention_levels=()) | fields
    )
    network = UNet(**fields)
    context = np.zeros((1, 1, width))
    params = draw_params(network, np.zeros((1, 4, 4, 3)), np.zeros(1), context)
    return unets.to_compvis(fields, params)


@pytest.mark.parametrize(
    ("width", "fields"),
    [
        (768, dict(num_heads=8)),
        (1280, dict(num_heads=8)),
        (1024, dict(head_dim=64)),
        (512, dict(num_heads=1)),
        (640, dict(num_heads=1)),
    ],
)
def test_heads_are_those_of_the_published_model_with_such_a_context(width, fields):
    found = unets.from_compvis(with_context(width), "a file").fields
    assert {"num_heads": 0, "head_dim": 0} | fields == {
        key: found[key] for key in ("num_heads", "head_dim")
    }


def test_heads_of_the_retrieval_augmented_model():
    found = unets.from_compvis(with_context(768, channels=448), "a file").fields
    assert (found["num_heads"], found["head_dim"]) == (0, 32)


@pytest.mark.parametrize(
    ("name", "heads"), [("plain", (0, 32)), ("res_blocks", (8, 0)), ("averaging", (8, 0))]
)
def test_heads_of_models_without_a_context(name, heads):
    found = unets.from_compvis(unets.to_compvis(OTHERS[name], drawn(name)), "a file").fields
    assert (found["num_heads"], found["head_dim"]) == heads


def test_heads_that_are_given_are_taken():
    tensors = with_context(768)
    for arguments in (dict(num_heads=2), dict(head_dim=16)):
        found = unets.from_compvis(tensors, "a file", **arguments).fields
        assert {"num_heads": 0, "head_dim": 0} | arguments == {
            key: found[key] for key in ("num_heads", "head_dim")
        }


# What is refused.


def check_refused(tensors, *parts: str, **arguments):
    with pytest.raises(UserError) as error:
        unets.from_compvis(tensors, "a file", **arguments)
    assert "a file" in str(error.value) and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_unknown_heads_are_refused():
    check_refused(with_context(100), "context of width 100", "give num_heads or head_dim")
    check_refused(with_context(768), "num_heads=7 does not divide the 64 channels", num_heads=7)
    with pytest.raises(UserError, match="num_heads=1 and head_dim=2"):
        unets.from_compvis(with_context(768), "a file", num_heads=1, head_dim=2)


def test_files_without_a_unet_are_refused(loaded_from):
    check_refused({"encoder.conv_in.weight": np.zeros(3)}, "holds no UNet", "'encoder.conv_in")
    check_refused({}, "holds no UNet")
    theirs = {key: x.numpy() for key, x in model("unconditional").state_dict().items()}
    check_refused(theirs, "tensors of a diffusers model")
    assert set(CONFIGS) > set(TRANSFORMERS)


def test_every_missing_extra_and_misshapen_tensor_is_named():
    tensors = unets.to_compvis(OTHERS["plain"], drawn("plain"))
    del tensors["time_embed.2.bias"]
    tensors["middle_block.1.qkv.weight"] = tensors["middle_block.1.qkv.weight"][:, :9]
    tensors["id_predictor.1.weight"] = np.zeros((2, 5), np.float32)
    check_refused(
        tensors,
        "1 missing: 'time_embed.2.bias' (128,)",
        "3 misshapen: ", "'middle_block.1.qkv.q.weight' (64, 9), expected (64, 64)",
        "1 extra: 'id_predictor.1.weight' (2, 5)",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(192, 0, 1), (0, 64, 1), (192, 64, 3), (192,), ()])
def test_joint_projections_of_impossible_shapes_are_named(shape):
    tensors = unets.to_compvis(OTHERS["plain"], drawn("plain"))
    name = "middle_block.1.qkv.weight"
    check_refused(tensors | {name: np.zeros(shape, np.float32)}, "middle_block.1.qkv.")


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("out.2.weight", ("does not tell the size of its UNet", "out.2.weight")),
        ("input_blocks.3.0.out_layers.3.weight", ("input_blocks.3.0.out_layers.3.weight", "None")),
        ("output_blocks.3.", ("4 input blocks and 3 output blocks",)),
    ],
)
def test_tensors_that_tell_no_size_are_refused(gone, parts):
    tensors = unets.to_compvis(OTHERS["plain"], drawn("plain"))
    check_refused({key: x for key, x in tensors.items() if not key.startswith(gone)}, *parts)


@pytest.mark.parametrize(
    ("values", "part"),
    [(dict(num_groups=16), "num_groups 32"), (dict(norm_epsilon=1e-6), "norm_epsilon 1e-05")],
)
def test_networks_that_compvis_code_does_not_have_are_refused(values, part):
    with pytest.raises(UserError, match=part):
        unets.to_compvis(OTHERS["plain"] | values, drawn("plain"))
