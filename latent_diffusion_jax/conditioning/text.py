"""Text conditions, the host half: captions of a record to token ids. The network half is
`models/text_transformer.py` or `models/clip_text.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_diffusion_jax.conditioning.base import Conditioning
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer


def caption_conditioning(tokenizer: PromptTokenizer, prompts: Sequence[str]) -> Conditioning:
    """Inputs `tokens` [L]: of one of a record's captions; a random one, or the first.

    Args:
      tokenizer: of the text encoder.
      prompts: to draw at previews.
    """

    def prepare(record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        captions = record["captions"]
        index = 0 if rng is None else rng.integers(len(captions))
        return {"tokens": tokenizer.encode([captions[index]])[0]}

    null = {"tokens": tokenizer.null}
    return Conditioning(prepare, null, {"tokens": tokenizer.encode(prompts)})
