"""What the condition of a second stage needs beside its config: a tokenizer trained on the data's
captions, the names of its labels, or CLIP's text encoder from another model's folder.

A run's workdir holds all of them: the first two in its checkpoints, the text encoder, which is
frozen, once, as `text_encoder/` and `tokenizer/` in diffusers' layout.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.conditioning.base import Conditioning
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.data.patience import RecordError
from latent_diffusion_jax.data.sources import Source
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.runtime import checkpoints
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import clip_text
from latent_diffusion_jax.weights.text_encoders import Loaded

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


class Parts(NamedTuple):
    """What there is for a config's conditioning.

    Attributes:
      tokenizer: with text.
      label_names: of the data's classes, with those.
      clip: the frozen text encoder, with CLIP.
    """

    tokenizer: PromptTokenizer | None = None
    label_names: Sequence[str] = ()
    clip: Loaded | None = None

    def network(self, config: ConfigDict) -> LatentDiffusion:
        """The config's networks, with this condition."""
        text = self.tokenizer
        return build.latent_diffusion(
            config,
            text.vocab_size if text else 0,
            text.max_length if text else 0,
            num_labels=len(self.label_names),
            clip=self.clip.fields if self.clip else None,
        )

    def host_half(self, config: ConfigDict) -> Conditioning:
        """What of a record goes into a batch."""
        return build.make_conditioning(config, self.tokenizer, len(self.label_names))

    def items(self) -> dict[str, Any]:
        """What to keep of it in checkpoints."""
        if self.tokenizer is not None and self.clip is None:
            return {"tokenizer": json.loads(self.tokenizer.backend.to_str())}
        return {"labels": list(self.label_names)} if self.label_names else {}


def make(
    config: ConfigDict,
    workdir: pathlib.Path,
    source: Source,
    tokenizer: PromptTokenizer | None = None,
) -> Parts:
    """What a run needs: of its last checkpoint, or new.

    Args:
      config: of the run.
      workdir: its folder.
      source: the training images.
      tokenizer: of the model that training starts from; None trains one.

    Raises:
      UserError: the data has no labels, or CLIP cannot be read.
    """
    if checkpoints.latest_step(workdir / "diffusion") is not None:
        return restore(config, workdir)
    if config.conditioning == "text":
        if tokenizer is not None:
            return Parts(tokenizer)
        section = config.tokenizer
        count = min(len(source), section.num_examples)
        texts = captions_of(source, count)
        trained = tokenizers.train(texts, section.vocab_size, section.max_length)
        tokenizer = tokenizers.prompt_tokenizer(trained)
        logging.info("diffusion: tokenizer of %d tokens, from the captions", tokenizer.vocab_size)
        return Parts(tokenizer)
    if config.conditioning == "class":
        names = list(source.label_names)
        if not names:
            raise UserError(
                f"conditioning='class' needs labels, and data {config.data.name!r} has none: give "
                "a TFDS dataset with a ClassLabel, or a folder with a subfolder for each class"
            )
        logging.info("diffusion: %d classes, %s to %s", len(names), names[0], names[-1])
        return Parts(label_names=names)
    if config.conditioning == "clip":
        return open_clip(workdir if (workdir / TEXT_ENCODER).is_dir() else config.clip.path)
    return Parts()


def captions_of(source: Source, count: int) -> Iterator[str]:
    """Those of a source's first records, without the damaged ones, which are counted and told."""
    damaged = 0
    for index in range(count):
        try:
            yield from source.captions(index)
        except RecordError as error:
            damaged += 1
            if damaged == 1:
                logging.warning("cannot use the caption of %s: %s", error.name, error)
    if damaged > 1:
        logging.warning("cannot use %d captions of %d", damaged, count)


def restore(config: ConfigDict, workdir: pathlib.Path, step: int | None = None) -> Parts:
    """What a run's workdir holds.

    Args:
      config: of the run.
      workdir: its folder.
      step: of the checkpoint to look into; default the last one.

    Raises:
      UserError: it is not there, or damaged.
    """
    directory = workdir / "diffusion"
    step = checkpoints.latest_step(directory) if step is None else step
    assert step is not None
    if config.conditioning == "text":
        text = json.dumps(checkpoints.read_json(directory, step, "tokenizer"))
        return Parts(tokenizers.prompt_tokenizer(tokenizers.load(text)))
    if config.conditioning == "class":
        return Parts(label_names=checkpoints.read_json(directory, step, "labels"))
    return open_clip(workdir) if config.conditioning == "clip" else Parts()


def open_clip(folder: str | pathlib.Path) -> Parts:
    """The text encoder and the tokenizer in a folder of diffusers, such as Stable Diffusion's.

    Raises:
      UserError: one of them is not there, is damaged, or does not belong to the other.
    """
    folder = pathlib.Path(folder).expanduser()
    for name in (TEXT_ENCODER, TOKENIZER):
        if not (folder / name).is_dir():
            raise UserError(
                f"{folder} has no folder {name}/: CLIP is taken from a folder of diffusers, such "
                f"as Stable Diffusion's, which has {TEXT_ENCODER}/ and {TOKENIZER}/ (clip.path)"
            )
    text = clip_text.load(folder / TEXT_ENCODER)
    sizes = text.fields["vocab_size"], text.fields["max_length"]
    return Parts(tokenizers.load_clip(folder / TOKENIZER, *sizes), clip=text)


def adopt_clip(workdir: pathlib.Path, parts: Parts) -> None:
    """Writes the text encoder into a workdir that has none: whole, or not at all."""
    if (workdir / TEXT_ENCODER).is_dir():
        return
    assert parts.clip is not None and parts.tokenizer is not None
    parts.tokenizer.save(workdir / TOKENIZER)
    partial = workdir / f"{TEXT_ENCODER}.partial"
    clip_text.save_hf(partial, parts.clip.fields, parts.clip.params)
    partial.replace(workdir / TEXT_ENCODER)
