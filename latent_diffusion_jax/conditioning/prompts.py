"""Prompts with emphasis, and prompts longer than the text encoder takes.

Both conventions are those of AUTOMATIC1111's Stable Diffusion web UI, which prompts are commonly
written for.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.runtime.errors import UserError

Texts = dict[str, np.ndarray]  # tokens and their weights, [N, chunks, L]
EMPHASIS = 1.1  # of one pair of parentheses
MAX_WEIGHT = 100.0  # far above what prompts have, and far below where vectors overflow

_SYMBOL = re.compile(
    r"""(?P<escaped>\\[()\[\]\\])
    |(?P<weighted>:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\))
    |(?P<open>[(\[])
    |(?P<close>[)\]])
    |(?P<text>[^\\()\[\]:]+|.)""",
    re.VERBOSE | re.DOTALL,
)

Pieces = list[tuple[str, float]]


def parse(prompt: str) -> Pieces:
    r"""A prompt's pieces of text with their weights, in order.

    `(word)` weighs 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3; nested weights multiply. `\(`, `\)`,
    `\[`, `\]` and `\\` stand for the characters themselves. Brackets without a partner are text, as
    is a number in square brackets.

    Raises:
      UserError: a bracket's text weighs more than MAX_WEIGHT.
    """
    texts: list[str] = []  # of the symbols
    starts: list[int] = []  # of the symbols in the prompt
    opened: list[int] = []  # symbols that are brackets still without a partner
    weights: dict[int, float] = {}  # of the opening brackets that have one
    closing: set[int] = set()  # their partners
    for i, symbol in enumerate(_SYMBOL.finditer(prompt)):
        found, bracket = symbol[0], texts[opened[-1]] if opened else ""
        weight = None
        if symbol["open"]:
            opened.append(i)
        elif symbol["weighted"] and bracket == "(":
            weight = float(symbol["number"])
        elif found == ")" and bracket == "(":
            weight = EMPHASIS
        elif found == "]" and bracket == "[":
            weight = 1 / EMPHASIS
        if weight is not None:
            weights[opened.pop()] = weight
            closing.add(i)
        texts.append(found[1] if symbol["escaped"] else found)
        starts.append(symbol.start())
    # Weights are known once brackets are closed, so they are multiplied in a pass of their own.
    around: list[tuple[float, int]] = [(1.0, 0)]  # weights within the brackets, and the brackets
    merged: list[tuple[list[str], float]] = []
    for i, text in enumerate(texts):
        weight, bracket_at = around[-1]
        if i in weights:
            around.append((weight * weights[i], i))
        elif i in closing:
            around.pop()
        elif merged and merged[-1][1] == weight:
            merged[-1][0].append(text)
        elif abs(weight) <= MAX_WEIGHT:
            merged.append(([text], weight))
        else:
            bracket, place = texts[bracket_at], starts[bracket_at] + 1
            raise UserError(
                f"the bracket {bracket!r} at place {place} of the prompt {prompt[:40]!r} gives its "
                f"text the weight {weight:g}; weights must be from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}"
            )
    return [("".join(parts), weight) for parts, weight in merged]


class _Token(NamedTuple):
    id: int
    weight: float
    piece: int  # of the prompt
    character: int  # of the piece, at which the token begins


def tokenize_weighted(
    tokenizer: PromptTokenizer, prompts: Sequence[str], max_chunks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with emphasis to token ids and weights, in chunks of the encoder's length.

    Each chunk has its own start and end and is padded. A word goes to the next chunk whole where
    it fits there. All prompts get as many chunks as the longest needs; the others' are empty. What
    even `max_chunks` cannot take is cut off with a warning that names it.

    Args:
      tokenizer: any.
      prompts: N of them; give those that are used together, such as a prompt and its negative one,
        in one call.
      max_chunks: at least 1, which cuts where the tokenizer itself does.

    Returns:
      Token ids, int32 [N, chunks, L], and weights, float32 [N, chunks, L]: 1 for start, end and
      padding.

    Raises:
      UserError: `max_chunks` is below 1, or a weight is too large.
    """
    if max_chunks < 1:
        raise UserError(f"max_chunks={max_chunks} must be at least 1")
    room = tokenizer.max_length - 2  # between start and end
    packed = []
    for prompt in prompts:
        pieces = parse(prompt)
        if len(pieces) > 1:  # a space at a seam may be a token, and is none of the prompt's
            pieces = [(piece.strip(), weight) for piece, weight in pieces]
        words = [
            [_Token(token, weight, i, character) for token, character in word]
            for i, (piece, weight) in enumerate(pieces)
            for word in tokenizer.words(piece)
        ]
        chunks, lost = _pack(words, room, max_chunks)
        if lost is not None:
            rest = [pieces[lost.piece][0][lost.character :]]
            rest += [piece for piece, _ in pieces[lost.piece + 1 :]]
            logging.warning(
                "the prompt %r does not fit into %d x %d tokens; this is cut off: %r",
                prompt, max_chunks, room, " ".join(rest).strip(),
            )  # fmt: skip
        packed.append(chunks)
    count = max(map(len, packed), default=1)
    tokens = np.tile(tokenizer.null, (len(packed), count, 1))
    weights = np.ones(tokens.shape, np.float32)
    end = tokenizer.null[1]
    for row, chunks in enumerate(packed):
        for i, chunk in enumerate(chunks):
            tokens[row, i, 1 : len(chunk) + 1] = [token.id for token in chunk]
            weights[row, i, 1 : len(chunk) + 1] = [token.weight for token in chunk]
            tokens[row, i, len(chunk) + 1] = end
    return tokens, weights


def guided_tokens(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    max_chunks: int,
) -> tuple[Texts, Texts | None]:
    """What a program that samples takes of prompts and of negative ones.

    Args:
      tokenizer: of the text encoder.
      prompts: of N images.
      negatives: what guidance leads away from, N too; None without guidance.
      max_chunks: see `tokenize_weighted`.

    Returns:
      `tokens` and `weights` [N, chunks, L] of the prompts; the same of the negative ones, or None.

    Raises:
      UserError: there is not a negative prompt for each image, or a weight is too large.
    """
    count, others = len(prompts), list(negatives or ())
    if negatives is not None and len(others) != count:
        raise UserError(f"{len(others)} negative prompts for {count} images")
    tokens, weights = tokenize_weighted(tokenizer, [*prompts, *others], max_chunks)
    ours = {"tokens": tokens[:count], "weights": weights[:count]}
    return ours, {"tokens": tokens[count:], "weights": weights[count:]} if others else None


def filled_chunks(tokenizer: PromptTokenizer, *texts: Texts | None) -> np.ndarray:
    """How many chunks each image's prompts fill together, at least 1: [N]."""
    counts = []
    for text in texts:
        if text is not None:
            filled = (text["tokens"] != tokenizer.null).any(-1)
            counts.append((filled * np.arange(1, filled.shape[1] + 1)).max(-1))
    return np.maximum(np.max(counts, axis=0), 1)


def first_chunks(texts: Texts | None, count: int) -> Texts | None:
    """Texts without the chunks after the first `count`."""
    return texts and {name: array[:, :count] for name, array in texts.items()}


def _pack(
    words: list[list[_Token]], room: int, max_chunks: int
) -> tuple[list[list[_Token]], _Token | None]:
    """Words into chunks of at most `room` tokens, and the first token that finds no place."""
    chunks: list[list[_Token]] = [[]]
    for word in words:
        if len(chunks[-1]) + len(word) > room >= len(word) and len(chunks) < max_chunks:
            chunks.append([])
        for token in word:
            if len(chunks[-1]) == room:
                if len(chunks) == max_chunks:
                    return chunks, token
                chunks.append([])
            chunks[-1].append(token)
    return chunks, None


def encode_chunks(
    encode: Callable[[jax.Array], jax.Array], tokens: jax.Array, weights: jax.Array
) -> jax.Array:
    """Context of chunked, weighted prompts.

    Each chunk is encoded by itself. Each token's vector is multiplied by its weight, and then all
    of a prompt's vectors by the one number that restores the mean of their elements (the web UI
    takes that mean over a batch's chunks, here it is over a prompt, so that prompts stay
    independent). Where all weights are 1, the context is exactly the encoder's.

    Args:
      encode: token ids [N, L] -> vectors [N, L, D].
      tokens: token ids [B, chunks, L].
      weights: of the tokens [B, chunks, L].

    Returns:
      Context [B, chunks * L, D], in the dtype of the encoder's vectors.
    """
    batch, chunks, length = tokens.shape
    encoded = encode(tokens.reshape(batch * chunks, length))
    context = encoded.reshape(batch, chunks * length, -1)
    factors = weights.reshape(batch, chunks * length, 1).astype(jnp.float32)
    plain = context.astype(jnp.float32)
    scaled = plain * factors
    mean, scaled_mean = (jnp.mean(x, axis=(1, 2), keepdims=True) for x in (plain, scaled))
    nonzero = jnp.where(scaled_mean == 0, 1.0, scaled_mean)
    scaled = scaled * jnp.where(scaled_mean == 0, 1.0, mean / nonzero)
    unweighted = jnp.all(factors == 1, axis=(1, 2), keepdims=True)
    return jnp.where(unweighted, context, scaled.astype(context.dtype))
