"""CLIP's text encoder: against transformers, values and gradients, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from tests.clip_files import text_model

VOCAB = 40
MODEL = ClipTextEncoder(
    vocab_size=VOCAB, width=32, depth=3, num_heads=4, max_length=9, hidden_width=48
)
TOKENS = np.array([[38, 3, 7, 7, 1, 39, 39, 39, 39], [38, 19, 2, 5, 6, 7, 8, 4, 39]])
RENAMES = [
    (r"^token_embedding/embedding$", "embeddings/token_embedding/weight"),
    (r"^position_embedding$", "embeddings/position_embedding/weight"),
    (r"^layer_(\d+)_attention/to_([qkv])/", r"encoder/layers/\1/self_attn/\2_proj/"),
    (r"^layer_(\d+)_attention/to_out/", r"encoder/layers/\1/self_attn/out_proj/"),
    (r"^layer_(\d+)_norm(\d)/", r"encoder/layers/\1/layer_norm\2/"),
    (r"^layer_(\d+)_ff_in/", r"encoder/layers/\1/mlp/fc1/"),
    (r"^layer_(\d+)_ff_out/", r"encoder/layers/\1/mlp/fc2/"),
    (r"^norm_out/", "final_layer_norm/"),
]


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(MODEL, TOKENS)


@pytest.fixture(scope="module")
def encode(params):
    run = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens))
    return lambda tokens: np.asarray(run(np.asarray(tokens)))


@functools.cache
def reference(activation="quick_gelu", **changes):
    return text_model(VOCAB, max_position_embeddings=9, hidden_act=activation, **changes).double()


def theirs(model, tokens, output_layer):
    """Context by transformers: a layer's output, normed as Stable Diffusion does."""
    states = model(torch.tensor(tokens), output_hidden_states=True).hidden_states
    return model.final_layer_norm(states[output_layer])


@pytest.mark.parametrize("output_layer", [-1, -2, -3])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_values_and_gradients_equal_transformers(
    activation, output_layer, random_params, to_torch, assert_gradients_equal
):
    ours = MODEL.clone(activation=activation, output_layer=output_layer)
    params = random_params(ours, TOKENS)
    model = reference(activation, num_hidden_layers=ours.layers_run)
    model.load_state_dict(to_torch(params, RENAMES), strict=True)
    model.zero_grad()
    direction = np.random.default_rng(1).normal(size=(2, 9, 32)).astype(np.float32)

    @jax.jit
    def run(params):
        context = ours.apply({"params": params}, TOKENS)
        return (context * direction).sum(), context

    gradients, context = jax.grad(run, has_aux=True)(params)
    # The layers after the output layer are not there, so it is the last one of theirs.
    expected = theirs(model, TOKENS, -1)
    scale = expected.abs().max().item()
    np.testing.assert_allclose(context, expected.detach().numpy(), rtol=0, atol=1e-5 * scale)
    (expected * torch.tensor(direction)).sum().backward()
    found = to_torch(gradients, RENAMES)
    largest = max(gradient.abs().max().item() for gradient in found.values())
    for name, parameter in model.named_parameters():
        # Softmax does not see a bias of the keys: its gradient is rounding, here and there.
        if name.endswith("k_proj.bias"):
            assert found[name].abs().max().item() < 1e-6 * largest
            found[name] = parameter.grad
    assert_gradients_equal(found, model, 1e-4)


@pytest.mark.parametrize("output_layer", [-1, -2, -3])
def test_an_earlier_layer_is_the_deep_network_cut_short(output_layer, random_params, to_torch):
    """Against all three layers of transformers', of which hidden states are taken."""
    whole = random_params(MODEL, TOKENS)
    model = reference()
    model.load_state_dict(to_torch(whole, RENAMES), strict=True)
    ours = MODEL.clone(output_layer=output_layer)
    names = jax.eval_shape(ours.init, jax.random.key(0), TOKENS)["params"]
    context = ours.apply({"params": {name: whole[name] for name in names}}, TOKENS)
    expected = theirs(model, TOKENS, output_layer).detach().numpy()
    np.testing.assert_allclose(context, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    last = model(torch.tensor(TOKENS)).last_hidden_state.detach().numpy()
    assert (output_layer == -1) == np.allclose(expected, last)


def test_without_the_final_norm(params, encode):
    bare = MODEL.clone(final_norm=False)
    kept = {name: leaf for name, leaf in params.items() if name != "norm_out"}
    x = np.asarray(bare.apply({"params": kept}, TOKENS))
    mean, deviation = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = (x - mean) / deviation * params["norm_out"]["scale"] + params["norm_out"]["bias"]
    np.testing.assert_allclose(normed, encode(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", [0, 4, 8])
def test_a_token_is_seen_from_its_own_place_on(encode, position):
    other = TOKENS.copy()
    other[:, position] = 11
    change = np.abs(encode(other) - encode(TOKENS)).max(axis=(0, 2))
    assert change[:position].max(initial=0.0) == 0.0
    assert change[position:].min() > 1e-4


def test_fewer_tokens_are_the_beginning_of_more(encode):
    np.testing.assert_allclose(encode(TOKENS[:, :5]), encode(TOKENS)[:, :5], rtol=0, atol=1e-5)


def test_half_precision(params, encode):
    half = MODEL.clone(dtype=jnp.bfloat16)
    context, variables = jax.eval_shape(
        lambda: half.init_with_output(jax.random.key(0), jnp.asarray(TOKENS))
    )
    assert context.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    rounded = np.asarray(half.apply({"params": params}, TOKENS), np.float32)
    exact = encode(TOKENS)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_length=8), "takes at most 8 tokens, got 9"),
        (dict(activation="relu"), "activation 'relu' must be one of quick_gelu, gelu"),
        (dict(num_heads=5), "5 heads do not divide a width of 32"),
        (dict(output_layer=0), r"output_layer 0 must be from -1 \(the last\) to -3"),
        (dict(output_layer=-4), r"output_layer -4 must be from -1 \(the last\) to -3"),
    ],
)
def test_what_does_not_fit_is_an_error(fields, message):
    model = MODEL.clone(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)
