"""Emphasis, and prompts of several chunks."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning import prompts, tokenizers
from latent_diffusion_jax.conditioning.prompts import encode_chunks, parse, tokenize_weighted
from latent_diffusion_jax.runtime.errors import UserError
from tests.clip_files import WORDS, make_tokenizer_folder

LENGTH = 8  # six tokens and both ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    make_tokenizer_folder(path)
    return path


@pytest.fixture(scope="module", params=["clip", "ours"])
def tokenizer(request, folder):
    """With one token for each of the words below."""
    if request.param == "clip":
        return tokenizers.load_clip(folder, max_length=LENGTH)
    texts = ["a red green blue circle square star photo of above the"] * 4
    return tokenizers.prompt_tokenizer(tokenizers.train(texts, 400, LENGTH))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(
        prompts.logging, "warning", lambda text, *values: found.append(text % values)
    )
    return found


def contents(tokenizer, row):
    """Token ids of a chunk between its start and its end; the rest must be padding."""
    start, end, pad = tokenizer.null[0], tokenizer.null[1], tokenizer.null[-1]
    row = list(row)
    assert row[0] == start and end in row[1:]
    last = row.index(end, 1)
    assert set(row[last + 1 :]) <= {pad}
    return row[1:last]


def ids(tokenizer, text):
    return [token for word in tokenizer.words(text) for token, _ in word]


# Parsing.


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", []),
        ("a red circle", [("a red circle", 1.0)]),
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("((red))", [("red", 1.1**2)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("[[[red]]]", [("red", 1.1**-3)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 0.5 ) star", [("red", 0.5), (" star", 1.0)]),
        ("(red:.5)(star:2)(of:+3.)", [("red", 0.5), ("star", 2.0), ("of", 3.0)]),
        ("(red:0)(star:-1)", [("red", 0.0), ("star", -1.0)]),
        ("(a (red) star)", [("a ", 1.1), ("red", 1.1**2), (" star", 1.1)]),
        ("(a (red:1.5) star:2)", [("a ", 2.0), ("red", 3.0), (" star", 2.0)]),
        ("([red])", [("red", 1.0)]),
        ("(a [red])", [("a ", 1.1), ("red", 1.0)]),
        ("()a[]", [("a", 1.0)]),
        ("(red)(star)", [("redstar", 1.1)]),
        # Escaped brackets are text, in emphasis too.
        (r"a \(red\) \[star\]", [("a (red) [star]", 1.0)]),
        (r"(a \(red\))", [("a (red)", 1.1)]),
        (r"\\(red)", [("\\", 1.0), ("red", 1.1)]),
        (r"a\b \n", [(r"a\b \n", 1.0)]),
        (r"(red\)", [("(red)", 1.0)]),
        # So are brackets without a partner, and what is no number or stands elsewhere.
        ("a (red", [("a (red", 1.0)]),
        ("a red)", [("a red)", 1.0)]),
        ("[red", [("[red", 1.0)]),
        ("red]", [("red]", 1.0)]),
        ("((red)", [("(", 1.0), ("red", 1.1)]),
        ("(red))", [("red", 1.1), (")", 1.0)]),
        ("(red]", [("(red]", 1.0)]),
        ("([red)", [("([red)", 1.0)]),
        ("(a [b) c]", [("(a ", 1.0), ("b) c", 1 / 1.1)]),
        ("a:1.5", [("a:1.5", 1.0)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        ("(a:1.5", [("(a:1.5", 1.0)]),
        ("16:9 (wide:1.2)", [("16:9 ", 1.0), ("wide", 1.2)]),
        ("a\n(日本:2) 😀", [("a\n", 1.0), ("日本", 2.0), (" 😀", 1.0)]),
    ],
)
def test_parse(prompt, expected):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("([" * 20_000 + "red" + "])" * 20_000, [("red", 1.0)]),
        ("[x" * 20_000 + "]" * 20_000, None),
        ("(" * 60_000, [("(" * 60_000, 1.0)]),
        ("(red:" + "9" * 60_000, [("(red:" + "9" * 60_000, 1.0)]),
    ],
)
def test_long_and_deep_prompts_parse_in_linear_time(prompt, expected):
    started = time.process_time()
    found = parse(prompt)
    assert time.process_time() - started < 2
    if expected is None:  # each letter weighs less than the one before
        assert "".join(text for text, _ in found) == "x" * 20_000
        weights = [weight for _, weight in found]
        assert weights == sorted(weights, reverse=True) and weights[0] == 1 / 1.1
    else:
        assert [text for text, _ in found] == [text for text, _ in expected]
        np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-9)


@pytest.mark.parametrize(
    "prompt, place",
    [
        ("a (red:" + "9" * 400 + ")", 3),
        ("(red:100.1)", 1),
        ("(red:-101)", 1),
        ("((red:11):10)", 2),
        ("(" * 8000 + "red" + ")" * 8000, 8000),
    ],
)
def test_weights_out_of_bounds_name_their_bracket(prompt, place):
    wanted = (
        rf"^the bracket '\(' at place {place} of the prompt .* weights must be from -100 to 100$"
    )
    with pytest.raises(UserError, match=wanted):
        parse(prompt)


def test_weights_may_be_large_on_the_way():
    ((text, weight),) = parse("(" * 60 + "[" * 60 + "red" + "]" * 60 + ")" * 60)
    assert text == "red" and weight == pytest.approx(1)
    assert parse("(red:100)(star:-100)") == [("red", 100.0), ("star", -100.0)]


# Chunks.


def cut_off(tokenizer, prompt: str) -> str:
    """The end of a prompt that the tokenizer itself has no room for."""
    overflowing = tokenizer.backend.encode(prompt).overflowing
    if not overflowing:
        return ""
    starts = [start for start, end in overflowing[0].offsets if end > start]
    return prompt[starts[0] :].strip() if starts else ""


def test_a_plain_prompt_is_as_the_tokenizer_encodes_it(tokenizer):
    texts = ["", " ", "a red circle", "the star of", "a red circle, above!", "the star ", "日 a"]
    texts = [text for text in texts if cut_off(tokenizer, text) == ""]
    assert len(texts) > 3
    tokens, weights = tokenize_weighted(tokenizer, texts, max_chunks=3)
    assert tokens.dtype == np.int32 and weights.dtype == np.float32
    assert tokens.shape == weights.shape == (len(texts), 1, LENGTH)
    np.testing.assert_array_equal(tokens[:, 0], tokenizer.encode(texts))
    assert (weights == 1).all()


@pytest.mark.parametrize("text", ["red " * 20, "red star 日本 " * 4, "日本日本"])
def test_one_chunk_cuts_where_the_tokenizer_does(tokenizer, text, warnings):
    tokens, _ = tokenize_weighted(tokenizer, [text], max_chunks=1)
    np.testing.assert_array_equal(tokens[:, 0], tokenizer.encode([text]))
    assert len(warnings) == 1 and repr(cut_off(tokenizer, text)) in warnings[0]


def test_weights_lie_on_their_tokens(tokenizer):
    tokens, weights = tokenize_weighted(tokenizer, ["a (red circle:1.5) [star]"], max_chunks=1)
    assert contents(tokenizer, tokens[0, 0]) == ids(tokenizer, "a red circle star")
    expected = [1, 1, 1.5, 1.5, 1 / 1.1, 1, 1, 1]
    np.testing.assert_allclose(weights[0, 0], expected, rtol=1e-6)


def test_emphasis_does_not_change_the_tokens(tokenizer):
    """Spaces at the seams are no tokens."""
    plain, _ = tokenize_weighted(tokenizer, ["a red star of the circle"], max_chunks=1)
    for prompt in ("a (red) star of the circle", "(a red ) [ star] of (the:2) circle"):
        tokens, _ = tokenize_weighted(tokenizer, [prompt], max_chunks=1)
        np.testing.assert_array_equal(tokens, plain)


def test_long_prompts_take_several_chunks(tokenizer, warnings):
    words = [*WORDS, "a", "red", "star"]
    tokens, weights = tokenize_weighted(tokenizer, [" ".join(words), "star", ""], max_chunks=5)
    assert tokens.shape == weights.shape == (3, 3, LENGTH)
    parts = [contents(tokenizer, chunk) for chunk in tokens[0]]
    assert parts == [ids(tokenizer, " ".join(words[i : i + 6])) for i in (0, 6, 12)]
    assert [contents(tokenizer, chunk) for chunk in tokens[1]] == [ids(tokenizer, "star"), [], []]
    np.testing.assert_array_equal(tokens[1, 1:], np.stack(2 * [tokenizer.null]))
    np.testing.assert_array_equal(tokens[2], np.stack(3 * [tokenizer.null]))
    assert (weights == 1).all() and warnings == []


def test_words_stay_whole_where_they_fit(tokenizer):
    (word,) = tokenizer.words("qxz")
    assert len(word) > 2
    prompt = "star " * 5 + "qxz star"
    tokens, _ = tokenize_weighted(tokenizer, [prompt], max_chunks=2)
    assert contents(tokenizer, tokens[0, 0]) == ids(tokenizer, "star " * 5)[:5]
    assert contents(tokenizer, tokens[0, 1]) == ids(tokenizer, "qxz star")


def test_words_longer_than_a_chunk_are_split(tokenizer, warnings):
    long = "qxzqxzqxzqxz"
    tokens, weights = tokenize_weighted(tokenizer, [f"star ({long}:2)"], max_chunks=9)
    parts = [contents(tokenizer, chunk) for chunk in tokens[0]]
    assert [token for part in parts for token in part] == ids(tokenizer, f"star {long}")
    assert all(len(part) == LENGTH - 2 for part in parts[:-1])
    assert weights[0, 0, 1] == 1 and (weights[0, 0, 2:-1] == 2).all() and warnings == []


def test_what_does_not_fit_is_named(tokenizer, warnings):
    words = ["star"] * 12
    prompt = " ".join(words) + " (Above the:1.2)  RED"
    tokens, _ = tokenize_weighted(tokenizer, ["star", prompt], max_chunks=2)
    assert tokens.shape == (2, 2, LENGTH)
    assert [contents(tokenizer, chunk) for chunk in tokens[1]] == 2 * [
        ids(tokenizer, " ".join(words[:6]))
    ]
    (warning,) = warnings
    assert "'Above the RED'" in warning and "2 x 6 tokens" in warning and repr(prompt) in warning


def test_no_prompts_and_no_chunks(tokenizer):
    tokens, weights = tokenize_weighted(tokenizer, [], max_chunks=2)
    assert tokens.shape == weights.shape == (0, 1, LENGTH)
    with pytest.raises(UserError, match="max_chunks=0 must be at least 1"):
        tokenize_weighted(tokenizer, ["a"], max_chunks=0)


# The network half.

TABLE = np.random.default_rng(0).normal(size=(20, LENGTH, 5)).astype(np.float32) + 0.5


def encoder(tokens):
    """Vectors [N, L, D] that depend on token, place and the chunk's first token."""
    places = jnp.arange(tokens.shape[1])
    return jnp.asarray(TABLE)[tokens, places] + jnp.asarray(TABLE)[tokens[:, :1], 0]


def draw(batch=3, chunks=2):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 20, (batch, chunks, LENGTH))
    return tokens, rng.uniform(0.5, 1.5, tokens.shape).astype(np.float32)


def test_weight_one_is_exactly_the_encoder():
    tokens, _ = draw()
    expected = np.concatenate([np.asarray(encoder(tokens[:, i])) for i in range(2)], axis=1)
    for run in (encode_chunks, jax.jit(encode_chunks, static_argnums=0)):
        context = run(encoder, tokens, np.ones(tokens.shape, np.float32))
        np.testing.assert_array_equal(context, expected)


def test_weight_one_is_exact_even_where_the_mean_overflows():
    tokens, _ = draw()
    context = encode_chunks(lambda t: encoder(t) * 3e37, tokens, np.ones(tokens.shape, np.float32))
    assert np.isfinite(context).all()


def test_weights_scale_and_the_mean_stays():
    tokens, weights = draw()
    context = np.asarray(encode_chunks(encoder, tokens, weights), np.float64)
    plain = np.asarray(encode_chunks(encoder, tokens, np.ones_like(weights)), np.float64)
    scaled = plain * weights.reshape(3, -1, 1)
    expected = scaled * (plain.mean((1, 2)) / scaled.mean((1, 2)))[:, None, None]
    np.testing.assert_allclose(context, expected, rtol=1e-5)
    np.testing.assert_allclose(context.mean((1, 2)), plain.mean((1, 2)), rtol=1e-5)
    assert np.abs(context - plain).max() > 0.1


def test_prompts_are_independent_of_each_other():
    tokens, weights = draw()
    weights[1] = 1
    together = np.asarray(encode_chunks(encoder, tokens, weights))
    for i in range(3):
        alone = encode_chunks(encoder, tokens[i : i + 1], weights[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)
    np.testing.assert_array_equal(
        together[1], encode_chunks(encoder, tokens, np.ones_like(weights))[1]
    )


def test_other_weights_do_not_compile_again():
    tokens, weights = draw()
    run = jax.jit(lambda tokens, weights: encode_chunks(encoder, tokens, weights))
    for factors in (weights, np.ones_like(weights), 2 * weights):
        run(tokens, factors)
    assert run._cache_size() == 1


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_means_of_zero_make_no_nan(weight):
    tokens, weights = draw()
    context = encode_chunks(
        lambda tokens: jnp.zeros((*tokens.shape, 5)), tokens, np.full_like(weights, weight)
    )
    assert (np.asarray(context) == 0).all()
    gone = encode_chunks(encoder, tokens, np.zeros_like(weights))
    assert (np.asarray(gone) == 0).all()


def test_the_dtype_is_the_encoders():
    tokens, weights = draw()
    for dtype in (jnp.float32, jnp.bfloat16):
        context = jax.eval_shape(
            lambda t, w, dtype=dtype: encode_chunks(lambda t: encoder(t).astype(dtype), t, w),
            tokens, weights,
        )  # fmt: skip
        assert context.dtype == dtype and context.shape == (3, 2 * LENGTH, 5)
