"""Text conditions: which caption of a record becomes tokens."""

import numpy as np
import pytest

from latent_diffusion_jax.conditioning import text, tokenizers

CAPTIONS = ["one duck", "two geese", "three hens"]
RECORD = {"captions": CAPTIONS, "image": None}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(CAPTIONS, vocab_size=300, max_length=6)


def which(tokenizer, tokens) -> int:
    """Which caption these are the tokens of."""
    matches = (tokenizers.encode(tokenizer, CAPTIONS) == tokens).all(axis=1)
    assert matches.sum() == 1
    return int(matches.argmax())


def test_without_a_generator_the_first(tokenizer):
    tokens = text.caption_tokens(RECORD, None, tokenizer)
    assert tokens.shape == (6,) and tokens.dtype == np.int32
    assert which(tokenizer, tokens) == 0


def test_with_a_generator_every_caption_about_as_often(tokenizer):
    found = [
        which(tokenizer, text.caption_tokens(RECORD, np.random.default_rng(seed), tokenizer))
        for seed in range(300)
    ]
    counts = np.bincount(found, minlength=3)
    assert (np.abs(counts - 100) < 4 * np.sqrt(300 * 2 / 9)).all()


def test_the_generator_decides(tokenizer):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [which(tokenizer, text.caption_tokens(RECORD, rng, tokenizer)) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_null_tokens_are_those_of_the_empty_caption(tokenizer):
    null = text.null_tokens(tokenizer)
    assert null.shape == (6,) and null.dtype == np.int32
    np.testing.assert_array_equal(null, tokenizers.encode(tokenizer, [""])[0])
    assert not (tokenizers.encode(tokenizer, CAPTIONS) == null).all(axis=1).any()
