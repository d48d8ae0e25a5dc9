"""Text conditions, the host half: captions of a record to token ids. The network half is
`models/text_transformer.py`."""

from typing import Any

import numpy as np
import tokenizers

from latent_diffusion_jax.conditioning.tokenizers import encode


def caption_tokens(
    record: dict[str, Any], rng: np.random.Generator | None, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
    """Token ids [L] of one of a record's captions: a random one, or the first without `rng`."""
    captions = record["captions"]
    index = 0 if rng is None else rng.integers(len(captions))
    return encode(tokenizer, [captions[index]])[0]


def null_tokens(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Token ids [L] of the empty caption, which stands for "no condition"."""
    return encode(tokenizer, [""])[0]
