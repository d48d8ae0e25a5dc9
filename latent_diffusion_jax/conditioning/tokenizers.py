"""Tokenizers: captions to fixed-length token ids. The work is done by `tokenizers`."""

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from latent_diffusion_jax.runtime.errors import UserError

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def train(captions: Iterable[str], vocab_size: int, max_length: int) -> tokenizers.Tokenizer:
    """A lower-casing WordPiece tokenizer, BERT's kind as in the paper, trained on captions.

    It pads and cuts to `max_length` tokens; both are part of its `tokenizer.json`.
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN, START, END], show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ids
    )
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD, length=max_length)
    return tokenizer


def load(text: str) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`, given its contents.

    Raises:
      UserError: it is not one, or it does not pad to a fixed length.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"damaged tokenizer.json: {error}") from error
    if not tokenizer.padding or not tokenizer.padding.get("length") or not tokenizer.truncation:
        raise UserError("tokenizer.json does not pad and cut to a fixed length")
    return tokenizer


def max_length(tokenizer: tokenizers.Tokenizer) -> int:
    """Length in tokens of every encoded caption."""
    assert tokenizer.padding is not None  # `train` and `load` see to it
    return tokenizer.padding["length"]


def encode(tokenizer: tokenizers.Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> token ids, int32 [N, max_length]."""
    return np.array([e.ids for e in tokenizer.encode_batch(list(captions))], np.int32)


def complaints(tokenizer: tokenizers.Tokenizer, caption: str) -> list[str]:
    """What encoding a prompt loses: words that training never saw, and what is cut off."""
    encoding = tokenizer.encode(caption)
    found = []
    unknown = [
        caption[start:end]
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)
        if token == UNKNOWN
    ]
    if unknown:
        found.append(f"words that no training caption had: {', '.join(unknown)}")
    if encoding.overflowing:
        cut = encoding.overflowing[0].offsets
        start = next((s for s, e in cut if e > s), len(caption))
        found.append(f"cut off after {max_length(tokenizer)} tokens: {caption[start:]!r}")
    return found
