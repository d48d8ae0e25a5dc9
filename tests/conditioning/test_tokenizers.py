"""Tokenizers: fixed lengths, the same ids every time, no text that they do not know."""

import json
import os
import subprocess
import sys
import unicodedata

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
    return tokenizers.train(TEXTS, vocab_size=400, max_length=LENGTH)


def special(tokenizer):
    """Ids of padding, start and end."""
    return [tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]


def content(tokenizer, row) -> list[int]:
    """A row's ids between start and end; the rest must be padding."""
    pad, start, end = special(tokenizer)
    row = list(row)
    assert row[0] == start and row.count(end) == 1
    assert set(row[row.index(end) + 1 :]) <= {pad}
    return row[1 : row.index(end)]


def test_special_tokens_are_distinct(tokenizer):
    assert None not in special(tokenizer) and len(set(special(tokenizer))) == 3


def test_encode_gives_one_array_of_fixed_length(tokenizer):
    found = tokenizers.encode(tokenizer, ["", "a", "a handwritten seven", "a " * 50])
    assert found.shape == (4, LENGTH) and found.dtype == np.int32
    assert tokenizers.max_length(tokenizer) == LENGTH
    assert found.min() >= 0 and found.max() < tokenizer.get_vocab_size()


def test_encoding_is_start_words_end_padding(tokenizer):
    one, three, twice = tokenizers.encode(
        tokenizer, ["seven", "a handwritten seven", "seven seven"]
    )
    (seven,) = content(tokenizer, one)  # frequent words are one token
    assert len(content(tokenizer, three)) == 3 and content(tokenizer, three)[-1] == seven
    assert content(tokenizer, twice) == [seven, seven]


def test_long_captions_are_cut_and_still_end(tokenizer):
    short, long = tokenizers.encode(tokenizer, ["seven", "seven " * 50])
    assert content(tokenizer, long) == content(tokenizer, short) * (LENGTH - 2)


def test_empty_caption_has_no_content(tokenizer):
    (row,) = tokenizers.encode(tokenizer, [""])
    assert content(tokenizer, row) == []


def test_captions_of_the_training_data_fit_and_are_told_apart(tokenizer):
    found = tokenizers.encode(tokenizer, TEXTS)
    assert len({row.tobytes() for row in found}) == len(set(TEXTS)) == 80
    assert all(len(content(tokenizer, row)) <= LENGTH - 2 for row in found)


def test_case_does_not_matter(tokenizer):
    upper, lower = tokenizers.encode(tokenizer, ["A HandWritten SEVEN", "a handwritten seven"])
    np.testing.assert_array_equal(upper, lower)


@pytest.mark.parametrize(
    "text", ["a zebra, by hand!", "Ünïcödé", "漢字 と かな", "🦆\u200d", "½ m²"]
)
def test_no_text_is_unknown(text):
    wide = tokenizers.train(TEXTS, vocab_size=300, max_length=64)
    ids = tokenizers.encode(wide, [text])[0]
    assert wide.decode(list(ids)).strip() == unicodedata.normalize("NFKC", text).lower()


def test_vocabulary_keeps_to_its_size():
    small = tokenizers.train(TEXTS, vocab_size=270, max_length=LENGTH)
    assert small.get_vocab_size() == 270


def test_vocabulary_without_room_for_the_bytes():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=258 must be at least 259"):
        tokenizers.train(TEXTS, vocab_size=258, max_length=LENGTH)
    assert tokenizers.train(TEXTS, vocab_size=259, max_length=LENGTH).get_vocab_size() == 259


@pytest.mark.parametrize("vocab_size", [400, 300])
def test_training_is_deterministic(vocab_size):
    # Every process of a run trains its own, and their ids must agree.
    trained = [tokenizers.train(TEXTS, vocab_size, LENGTH) for _ in range(5)]
    encoded = [tokenizers.encode(tokenizer, TEXTS) for tokenizer in trained]
    for other, found in zip(trained[1:], encoded[1:], strict=True):
        np.testing.assert_array_equal(found, encoded[0])
        assert other.get_vocab() == trained[0].get_vocab()


def test_training_does_not_need_a_list(tokenizer):
    streamed = tokenizers.train(iter(TEXTS), vocab_size=400, max_length=LENGTH)
    assert streamed.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("through_json", [False, True])
def test_round_trip_through_tokenizer_json(tokenizer, through_json):
    text = tokenizer.to_str()
    if through_json:  # as the checkpoints keep it
        text = json.dumps(json.loads(text))
    copy = tokenizers.load(text)
    texts = [*TEXTS, "", "a zebra", "a " * 50]
    np.testing.assert_array_equal(
        tokenizers.encode(copy, texts), tokenizers.encode(tokenizer, texts)
    )
    assert tokenizers.max_length(copy) == LENGTH


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


def test_settings_are_those_of_checkpoints_until_now(tokenizer):
    """The settings of a `tokenizer.json` as checkpoints of tokenizers 0.22 and 0.23 hold them."""
    written = json.loads(tokenizer.to_str())
    assert written["pre_tokenizer"] == {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    assert written["normalizer"] == {
        "type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]
    }  # fmt: skip
    assert written["decoder"] == written["pre_tokenizer"]
    assert {k: v for k, v in written["model"].items() if k not in ("vocab", "merges")} == {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False,
    }  # fmt: skip


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}
COSTLY = {"type": "Replace", "pattern": {"Regex": "(a|a)*$b"}, "content": ""}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a|a)*$b"}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model.vocab.!",
            10**6,
            r"the token '!' has the id 1000000; the ids of 344 tokens are 0 to 343",
        ),
        ("model.vocab.!", 2**33, r"the token '!' has the id 8589934592; the ids of"),
        ("model.vocab.!", -1, r"the token '!' has the id -1; the ids of"),
        ("model.vocab.!", 7.0, r"the token '!' has the id 7\.0; the ids of"),
        ("model.vocab.!", 7, r"the tokens '!' and '%' share the id 7"),
        ("model.vocab", [["!", 0.5]], "it has no vocabulary"),
        ("model.vocab", {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}, "it has no token for the byte"),
        ("model.merges", None, "its model is not as training here writes it"),
        ("model.dropout", 0.5, "its model is not as training here writes it"),
        ("model.unk_token", "!", "its model is not as training here writes it"),
        ("padding.pad_id", 10**6, "its padding is not as"),
        ("padding.direction", "Left", "its padding is not as"),
        ("padding.pad_to_multiple_of", 16, "its padding is not as"),
        ("truncation.stride", 16, "its truncation is not as"),
        ("truncation.direction", "Left", "its truncation is not as"),
        ("truncation.strategy", "OnlySecond", "its truncation is not as"),
        ("post_processor", None, "its post_processor is not as"),
        ("decoder", None, "its decoder is not as"),
        ("pre_tokenizer", SPLIT, "its pre_tokenizer is not as"),
        ("normalizer", COSTLY, "its normalizer is not as"),
        ("normalizer", {"type": "Sequence", "normalizers": 5 * [REPLACE]}, "its normalizer is"),
        ("added_tokens.0.lstrip", True, "its added_tokens is not as"),
    ],
)
def test_what_training_does_not_write_is_refused(tokenizer, path, value, message):
    written = json.loads(tokenizer.to_str())
    part = written
    *parents, last = path.split(".")
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    part[last] = value
    with pytest.raises(UserError, match=rf"^damaged tokenizer\.json: {message}"):
        tokenizers.load(json.dumps(written))


def test_fields_of_other_versions_of_tokenizers(tokenizer):
    written = json.loads(tokenizer.to_str())
    expected = tokenizers.encode(tokenizer, ["a seven"])
    del written["model"]["byte_fallback"], written["added_tokens"][0]["normalized"]
    written["model"]["new"] = written["added_tokens"][0]["new"] = None
    written["model"]["merges"] = [" ".join(pair) for pair in written["model"]["merges"]]
    assert written["model"]["merges"]
    loaded = tokenizers.load(json.dumps(written))
    np.testing.assert_array_equal(tokenizers.encode(loaded, ["a seven"]), expected)


@pytest.mark.parametrize("length", [0, 2, 10**12, True, "10"])
def test_lengths_that_no_text_encoder_has(tokenizer, length):
    written = json.loads(tokenizer.to_str())
    written["truncation"]["max_length"] = length
    written["padding"]["strategy"]["Fixed"] = length
    with pytest.raises(UserError, match=r"pads to \d+ tokens; 3 to 65536|fixed length"):
        tokenizers.load(json.dumps(written))


def test_all_ids_the_same(tokenizer):
    written = json.loads(tokenizer.to_str())
    written["model"]["vocab"] = dict.fromkeys(written["model"]["vocab"], 7)
    with pytest.raises(UserError, match="share the id 7"):
        tokenizers.load(json.dumps(written))


def test_panics_are_errors_and_interrupts_are_not(tokenizer):
    """Rust's panics are BaseExceptions, as what ends a process is."""
    written = json.loads(tokenizer.to_str())
    written["truncation"]["stride"] = 16
    panics = Tokenizer.from_str(json.dumps(written))
    with (
        pytest.raises(UserError, match=r"^damaged: [^\n]+$"),
        tokenizers._errors_told("damaged"),
    ):
        panics.encode("a " * 50)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), tokenizers._errors_told("damaged"):
            raise stop


def test_a_file_that_is_no_text_or_never_ends(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    assert tokenizers.load_trained(tmp_path, max_length=LENGTH).max_length == LENGTH
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"^cannot read the tokenizer .*tokenizer\.json: .*utf-8"):
        tokenizers.load_trained(tmp_path)
    path.write_text("{oops")
    with pytest.raises(UserError, match=rf"^damaged {path}: "):
        tokenizers.load_trained(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        tokenizers.load_trained(tmp_path)
    os.mkfifo(path)
    module = "latent_diffusion_jax.conditioning.tokenizers"
    code = f"import sys, {module} as t; t.load_trained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "it is no ordinary file" in done.stderr
