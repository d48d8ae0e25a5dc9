"""Tokenizers: captions to fixed-length token ids. The work is done by `tokenizers`."""

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from latent_diffusion_jax.runtime.errors import UserError

PAD, START, END = "[PAD]", "[CLS]", "[SEP]"


def train(captions: Iterable[str], vocab_size: int, max_length: int) -> tokenizers.Tokenizer:
    """A lower-casing byte-level BPE tokenizer, trained on captions.

    It knows every text, since all 256 bytes are tokens. It pads and cuts to `max_length` tokens;
    both are part of its `tokenizer.json`. The paper has BERT's WordPiece; the same captions give
    other token ids in every run of WordPiece's trainer, and of this one the same ones.

    Raises:
      UserError: the vocabulary has no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 3:
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least {len(alphabet) + 3}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
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
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    if not padding.get("length") or padding["length"] != truncation.get("max_length"):
        raise UserError("tokenizer.json does not pad and cut to a fixed length")
    return tokenizer


def max_length(tokenizer: tokenizers.Tokenizer) -> int:
    """Length in tokens of every encoded caption."""
    assert tokenizer.padding is not None  # `train` and `load` see to it
    return tokenizer.padding["length"]


def encode(tokenizer: tokenizers.Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> token ids, int32 [N, max_length]."""
    return np.array([e.ids for e in tokenizer.encode_batch(list(captions))], np.int32)


def cut_off(tokenizer: tokenizers.Tokenizer, caption: str) -> str:
    """The end of a caption that does not fit into the tokenizer's length, "" where all fits."""
    overflowing = tokenizer.encode(caption).overflowing
    if not overflowing:
        return ""
    starts = [start for start, end in overflowing[0].offsets if end > start]
    return caption[starts[0] :].strip() if starts else ""
