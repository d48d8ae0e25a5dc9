"""What a user asks for, in words and numbers, as the arrays that a sampling program takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_diffusion_jax.conditioning.class_label import guided_labels
from latent_diffusion_jax.conditioning.prompts import guided_tokens
from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import check_text

MAX_SEED = 2**32 - 1

Arrays = dict[str, np.ndarray]


def make_condition(
    model: Model,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    label: int | str | Sequence[int | str] | None,
    num_images: int,
    guided: bool,
    max_chunks: int,
) -> tuple[Arrays, Arrays | None, int]:
    """Inputs of the condition, those that guidance leads away from, and the images' number.

    Args:
      model: that draws; what it is told decides which of the next three arguments it takes.
      prompt, negative_prompt: one or several; of the latter one, or as many.
      label: one or several, by number or name.
      num_images: of each prompt or label.
      guided: whether the guidance scale is not 1.
      max_chunks: of tokens in a prompt.

    Raises:
      UserError: the model does not take what is given, or does not get what it needs.
    """
    negatives = _listed(negative_prompt)
    for text in (*_listed(prompt), *negatives):
        check_text(str(text), f"the prompt {str(text)[:40]!r}")
    if model.tokenizer is None and any((*_listed(prompt), *negatives)):
        raise UserError("this model takes no prompt")
    if (label is None) == bool(model.ldm.num_labels):
        asks = "this model draws classes: give a label"
        raise UserError(asks if label is None else "this model takes no label")
    if model.tokenizer is not None:
        prompts = _repeated(_listed(prompt), num_images)
        negatives = _repeated(negatives, len(prompts) if len(negatives) == 1 else num_images)
        given = negatives if guided else None
        texts = guided_tokens(model.tokenizer, prompts, given, max_chunks)
        return *texts, len(prompts)
    if label is not None:
        labels = _repeated(_listed(label), num_images)
        null = model.null_label if guided else None
        if guided and null is None:
            raise UserError("this model knows no label for guidance: guidance_scale must be 1")
        known = model.ldm.num_labels - (model.null_label is not None)
        return *guided_labels(labels, model.label_names, known, null), len(labels)
    if guided:
        raise UserError("this model is unconditional: guidance_scale must be 1")
    return {}, None, len(_repeated(_listed(prompt), num_images))


def _listed(given: Any) -> list[Any]:
    """Prompts or labels: one as a list of one."""
    if isinstance(given, str | int | np.integer):
        return [given]
    if not (found := list(given)):
        raise UserError("no prompts or labels to draw")
    return found


def _repeated(given: list[Any], count: int) -> list[Any]:
    if count < 1:
        raise UserError(f"num_images must be at least 1, got {count}")
    return [one for one in given for _ in range(count)]


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(count)]
    else:
        seeds = [int(s) for s in seed]
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} images")
    if not all(0 <= s <= MAX_SEED for s in seeds):
        raise UserError(f"seeds must be in 0..{MAX_SEED}, got {min(seeds)}..{max(seeds)}")
    return seeds


def variation_seeds_of(seed: int, count: int) -> np.ndarray:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"variation_seed must be in 0..{MAX_SEED}, got {seed}")
    return ((seed + np.arange(count)) % (MAX_SEED + 1)).astype(np.uint32)


def noise_of(latents: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if np.shape(latents) not in (shape, (1, *shape[1:])):
        raise UserError(f"latents must be {list(shape)}, got {np.shape(latents)}")
    return np.broadcast_to(np.asarray(latents, np.float32), shape)
