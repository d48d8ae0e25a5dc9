"""The text encoder: against PyTorch's functions, and what a token's output depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_diffusion_jax.models.text_transformer import TextTransformer

MODEL = TextTransformer(
    vocab_size=20, max_length=6, width=16, depth=2, num_heads=3, head_dim=4
)  # heads * head_dim is not the width
TOKENS = np.array([[3, 7, 7, 1, 0, 0], [19, 2, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(MODEL, TOKENS)


@pytest.fixture(scope="module")
def encode(params):
    run = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens))
    return lambda tokens: np.asarray(run(np.asarray(tokens)))


def torch_encoder(weights: dict[str, torch.Tensor], tokens: np.ndarray) -> torch.Tensor:
    """Pre-norm transformer from `torch.nn.functional`; names are ours, layout is PyTorch's."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = F.embedding(torch.tensor(tokens), weights["token_embedding.embedding"])
    x = x + weights["position_embedding"]
    for i in range(2):
        h = norm(f"layer_{i}_norm1", x)
        q, k, v = (
            linear(f"layer_{i}_attention.{name}", h).unflatten(-1, (3, 4)).transpose(1, 2)
            for name in ("to_q", "to_k", "to_v")
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + linear(f"layer_{i}_attention.to_out", h)
        h = F.gelu(linear(f"layer_{i}_ff_in", norm(f"layer_{i}_norm2", x)))
        x = x + linear(f"layer_{i}_ff_out", h)
    return norm("norm_out", x)


def test_the_encoder_equals_torch_functions(params, encode, to_torch):
    weights = to_torch(params, ())
    context = encode(TOKENS)
    assert context.shape == (2, 6, 16)
    np.testing.assert_allclose(context, torch_encoder(weights, TOKENS).numpy(), rtol=0, atol=1e-5)


def test_positions_matter(encode):
    order = np.array([1, 0, 2, 3, 4, 5])
    shuffled = encode(TOKENS[:, order])
    # Not even up to the same shuffling of the output.
    assert np.abs(shuffled - encode(TOKENS)[:, order]).max() > 0.01


def test_without_positions_tokens_are_a_set(params):
    bare = params | {"position_embedding": np.zeros_like(params["position_embedding"])}
    order = np.array([4, 0, 2, 5, 1, 3])
    run = jax.jit(lambda tokens: MODEL.apply({"params": bare}, tokens))
    np.testing.assert_allclose(run(TOKENS[:, order]), run(TOKENS)[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", [0, 3, 5])
def test_every_position_sees_every_token(encode, position):
    """No causal mask and no padding mask."""
    other = TOKENS.copy()
    other[:, position] = 11
    assert np.abs(encode(other) - encode(TOKENS)).max(axis=-1).min() > 1e-4


def test_a_row_does_not_see_other_rows(encode):
    other = TOKENS.copy()
    other[0] = 11
    np.testing.assert_allclose(encode(other)[1], encode(TOKENS)[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(encode(TOKENS[1:])[0], encode(TOKENS)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, 7])
def test_the_wrong_number_of_tokens_is_an_error(params, length):
    with pytest.raises(ValueError, match=rf"takes 6 tokens, got {length}"):
        MODEL.apply({"params": params}, np.zeros((2, length), np.int32))


def test_parameters_stay_float32_in_half_precision():
    half = MODEL.clone(dtype=jnp.bfloat16)
    context, variables = jax.eval_shape(
        lambda: half.init_with_output(jax.random.key(0), jnp.asarray(TOKENS))
    )
    assert context.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
