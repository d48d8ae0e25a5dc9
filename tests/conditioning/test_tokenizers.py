"""Tokenizers: fixed lengths, the same ids every time, and clear words about what is lost."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.data.digits import CAPTIONS, WORDS
from latent_diffusion_jax.runtime.errors import UserError

TEXTS = [c.format(word=word, digit=i) for i, word in enumerate(WORDS) for c in CAPTIONS]
LENGTH = 10


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(TEXTS, vocab_size=256, max_length=LENGTH)


def ids(tokenizer, *tokens):
    return [tokenizer.token_to_id(token) for token in tokens]


def test_encoding_is_start_words_end_padding(tokenizer):
    (row,) = tokenizers.encode(tokenizer, ["a handwritten seven"])
    words = ids(tokenizer, "[CLS]", "a", "handwritten", "seven", "[SEP]")
    pad = tokenizer.token_to_id("[PAD]")
    assert None not in words
    assert row.tolist() == words + [pad] * (LENGTH - len(words))


def test_encode_gives_one_array_of_fixed_length(tokenizer):
    found = tokenizers.encode(tokenizer, ["", "a", "a handwritten seven", "a " * 50])
    assert found.shape == (4, LENGTH) and found.dtype == np.int32
    assert tokenizers.max_length(tokenizer) == LENGTH
    assert found.min() >= 0 and found.max() < tokenizer.get_vocab_size()


def test_long_captions_are_cut_and_still_end(tokenizer):
    (row,) = tokenizers.encode(tokenizer, ["seven " * 50])
    assert row.tolist() == ids(tokenizer, "[CLS]", *["seven"] * (LENGTH - 2), "[SEP]")


def test_empty_caption_has_no_words(tokenizer):
    (row,) = tokenizers.encode(tokenizer, [""])
    assert row.tolist() == ids(tokenizer, "[CLS]", "[SEP]", *["[PAD]"] * (LENGTH - 2))


def test_captions_of_the_training_data_are_told_apart(tokenizer):
    found = tokenizers.encode(tokenizer, TEXTS)
    assert len({row.tobytes() for row in found}) == len(set(TEXTS)) == 80
    assert tokenizer.token_to_id("[UNK]") not in found


def test_case_does_not_matter(tokenizer):
    upper, lower = tokenizers.encode(tokenizer, ["A HandWritten SEVEN", "a handwritten seven"])
    np.testing.assert_array_equal(upper, lower)


def test_special_tokens_are_distinct(tokenizer):
    special = ids(tokenizer, "[PAD]", "[UNK]", "[CLS]", "[SEP]")
    assert None not in special and len(set(special)) == 4


def test_vocabulary_keeps_to_its_size():
    small = tokenizers.train(TEXTS, vocab_size=80, max_length=LENGTH)
    assert small.get_vocab_size() == 80
    found = tokenizers.encode(small, TEXTS)
    assert small.token_to_id("[UNK]") not in found  # words in pieces, none lost


@pytest.mark.parametrize("vocab_size", [256, 80])
def test_training_is_deterministic(vocab_size):
    # Every process of a run trains its own, and their ids must agree.
    trained = [tokenizers.train(TEXTS, vocab_size, LENGTH) for _ in range(5)]
    encoded = [tokenizers.encode(tokenizer, TEXTS) for tokenizer in trained]
    for other, found in zip(trained[1:], encoded[1:], strict=True):
        np.testing.assert_array_equal(found, encoded[0])
        assert other.get_vocab() == trained[0].get_vocab()


def test_training_does_not_need_a_list():
    tokenizer = tokenizers.train(iter(TEXTS), vocab_size=256, max_length=LENGTH)
    assert tokenizer.token_to_id("handwritten") is not None


@pytest.mark.parametrize("through_json", [False, True])
def test_round_trip_through_tokenizer_json(tokenizer, through_json):
    text = tokenizer.to_str()
    if through_json:  # as the checkpoints keep it
        text = json.dumps(json.loads(text))
    copy = tokenizers.load(text)
    texts = [*TEXTS, "", "a jaguar", "a " * 50]
    np.testing.assert_array_equal(
        tokenizers.encode(copy, texts), tokenizers.encode(tokenizer, texts)
    )
    assert tokenizers.max_length(copy) == LENGTH
    assert tokenizers.complaints(copy, "a jaguar") == tokenizers.complaints(tokenizer, "a jaguar")


@pytest.mark.parametrize("text", ["", "{}", "null", "{oops", '{"version": "1.0", "model": 3}'])
def test_damaged_json(text):
    with pytest.raises(UserError, match=r"^damaged tokenizer\.json: [^\n]+$"):
        tokenizers.load(text)


@pytest.mark.parametrize("remove", ["no_padding", "no_truncation"])
def test_tokenizer_without_a_fixed_length(tokenizer, remove):
    other = Tokenizer.from_str(tokenizer.to_str())
    getattr(other, remove)()
    with pytest.raises(UserError, match="fixed length"):
        tokenizers.load(other.to_str())


def test_tokenizer_that_cuts_later_than_it_pads(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(2 * LENGTH)
    with pytest.raises(UserError, match="fixed length"):
        tokenizers.load(other.to_str())


def test_no_complaint_about_what_training_knows(tokenizer):
    for text in ("", "a handwritten seven", "SOMEBODY wrote a scan", "seven " * (LENGTH - 2)):
        assert tokenizers.complaints(tokenizer, text) == []


# No caption has a j or a q, so that these words cannot even be put together from pieces.


def test_complaint_names_unknown_words_as_they_were_written(tokenizer):
    (complaint,) = tokenizers.complaints(tokenizer, "a Jaguar, by 漢 or Q")
    assert complaint.endswith(": Jaguar, 漢, Q")


def test_complaint_quotes_what_is_cut_off(tokenizer):
    text = "seven " * (LENGTH - 2) + "written by Hand"
    (complaint,) = tokenizers.complaints(tokenizer, text)
    assert str(LENGTH) in complaint
    assert complaint.endswith(": 'written by Hand'")


def test_complaints_about_both(tokenizer):
    found = tokenizers.complaints(tokenizer, "jaguar " + "seven " * LENGTH)
    assert len(found) == 2
    assert "jaguar" in found[0] and "jaguar" not in found[1]
    assert found[1].count("seven") == 3  # the jaguar and two special tokens took three places
