"""Text conditions: which caption of a record becomes tokens."""

import numpy as np
import pytest

from latent_diffusion_jax.conditioning import text, tokenizers

CAPTIONS = ["one duck", "two geese", "three hens"]
RECORD = {"captions": CAPTIONS, "image": None}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.prompt_tokenizer(tokenizers.train(CAPTIONS, vocab_size=300, max_length=6))


def tokens_of(tokenizer, rng) -> np.ndarray:
    (name,), (tokens,) = zip(
        *text.caption_conditioning(tokenizer, ["a"]).prepare(RECORD, rng).items(), strict=True
    )
    assert name == "tokens"
    return tokens


def which(tokenizer, tokens) -> int:
    """Which caption these are the tokens of."""
    matches = (tokenizer.encode(CAPTIONS) == tokens).all(axis=1)
    assert matches.sum() == 1
    return int(matches.argmax())


def test_without_a_generator_the_first(tokenizer):
    tokens = tokens_of(tokenizer, None)
    assert tokens.shape == (6,) and tokens.dtype == np.int32
    assert which(tokenizer, tokens) == 0


def test_with_a_generator_every_caption_about_as_often(tokenizer):
    found = [
        which(tokenizer, tokens_of(tokenizer, np.random.default_rng(seed))) for seed in range(300)
    ]
    counts = np.bincount(found, minlength=3)
    assert (np.abs(counts - 100) < 4 * np.sqrt(300 * 2 / 9)).all()


def test_the_generator_decides(tokenizer):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [which(tokenizer, tokens_of(tokenizer, rng)) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_null_tokens_are_those_of_the_empty_caption(tokenizer):
    null = text.caption_conditioning(tokenizer, ["a"]).null["tokens"]
    assert null.shape == (6,) and null.dtype == np.int32
    np.testing.assert_array_equal(null, tokenizer.encode([""])[0])
    assert not (tokenizer.encode(CAPTIONS) == null).all(axis=1).any()


def test_previews_are_the_prompts(tokenizer):
    found = text.caption_conditioning(tokenizer, CAPTIONS[1:]).previews
    np.testing.assert_array_equal(found["tokens"], tokenizer.encode(CAPTIONS[1:]))
