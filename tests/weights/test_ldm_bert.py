"""LDM's own text encoder in and out of the formats of diffusers and CompVis' code."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import ldm_bert

FIELDS = dict(vocab_size=30, max_length=7, width=12, depth=3, num_heads=2, head_dim=5)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 7))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LDMBertConfig(
        vocab_size=30, max_position_embeddings=7, d_model=12, encoder_layers=3,
        encoder_ffn_dim=48, encoder_attention_heads=2, head_dim=5,
    )  # fmt: skip
    model = LDMBertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm") / "bert"
    model.save_pretrained(path)
    return path


def encode(loaded):
    network = TextTransformer(**loaded.fields)
    return np.asarray(jax.jit(network.apply)({"params": loaded.params}, TOKENS))


def torch_encode(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS), return_dict=True).last_hidden_state.numpy()


def in_compvis(model):
    """The state as x-transformers, which CompVis' code has a copy of, names it."""
    theirs = {
        "model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb",
        "model.layer_norm": "norm", "to_logits": "to_logits",
    }  # fmt: skip
    parts = {
        "self_attn_layer_norm": (0, "0"), "self_attn.q_proj": (0, "1.to_q"),
        "self_attn.k_proj": (0, "1.to_k"), "self_attn.v_proj": (0, "1.to_v"),
        "self_attn.out_proj": (0, "1.to_out"), "final_layer_norm": (1, "0"),
        "fc1": (1, "1.net.0.0"), "fc2": (1, "1.net.2"),
    }  # fmt: skip
    for layer in range(3):
        for part, (half, name) in parts.items():
            place = f"attn_layers.layers.{2 * layer + half}.{name}"
            theirs[f"model.layers.{layer}.{part}"] = place
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[f"cond_stage_model.transformer.{theirs[module]}.{kind}"] = tensor.numpy()
    return state


def assert_same_tree(a, b):
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


def test_a_folder_of_diffusers(model, folder):
    loaded = ldm_bert.load(folder)
    assert loaded.fields == FIELDS
    expected = torch_encode(model)
    np.testing.assert_allclose(encode(loaded), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_of_compvis(model, folder):
    tensors = in_compvis(model) | {"model.diffusion_model.out.2.bias": np.zeros(4)}
    loaded = ldm_bert.from_compvis(tensors, "ldm.ckpt", num_heads=2)
    assert loaded.fields == FIELDS
    assert_same_tree(loaded.params, ldm_bert.load(folder).params)
    written = ldm_bert.to_compvis(loaded.fields, loaded.params)
    assert written.keys() == in_compvis(model).keys()
    for name, tensor in written.items():
        if "to_logits" not in name:
            np.testing.assert_array_equal(tensor, tensors[name])


def test_round_trip_through_a_folder(model, folder, tmp_path):
    loaded = ldm_bert.load(folder)
    ldm_bert.save_diffusers(tmp_path / "new", loaded.fields, loaded.params)
    again = ldm_bert.load(tmp_path / "new")
    assert again.fields == loaded.fields
    assert_same_tree(again.params, loaded.params)
    theirs = LDMBertModel.from_pretrained(tmp_path / "new").eval()
    np.testing.assert_array_equal(torch_encode(theirs), torch_encode(model))


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(model_type="bert"), "model_type 'bert'; LDMBertModel has 'ldmbert'"),
        (dict(activation_function="relu"), "activation_function 'relu', this network has 'gelu'"),
        (dict(scale_embedding=True), "scale_embedding True, this network has False"),
        (dict(encoder_ffn_dim=24), "encoder_ffn_dim 24, this network four times d_model 12"),
        (dict(encoder_layers=0), "encoder_layers"),
        (dict(encoder_layers=2), "extra: 'model.layers.2."),
    ],
)
def test_configs_that_do_not_fit(folder, tmp_path, values, message):
    config = json.loads((folder / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        ldm_bert.load(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_files_without_it(model):
    with pytest.raises(UserError, match=r"sd.ckpt holds no text encoder of LDM: .*token_emb"):
        ldm_bert.from_compvis({"betas": np.zeros(3)}, "sd.ckpt")
    with pytest.raises(UserError, match="attention of width 10, which 8 heads do not divide"):
        ldm_bert.from_compvis(in_compvis(model), "ldm.ckpt")
    tensors = in_compvis(model)
    del tensors["cond_stage_model.transformer.norm.bias"]
    with pytest.raises(UserError, match=r"missing: 'norm.bias' \(12,\)"):
        ldm_bert.from_compvis(tensors, "ldm.ckpt", num_heads=2)
