"""Sampling from Python: load a trained workdir, then draw images from prompts.

pipe = pipelines.load("runs/digits")
images = pipe(["a handwritten seven"] * 4, seed=0)  # uint8 [4, H, W, 3]
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

from latent_diffusion_jax import build, first_stages
from latent_diffusion_jax.conditioning import text
from latent_diffusion_jax.conditioning import tokenizers as captions
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.runtime import checkpoints, images, sharding
from latent_diffusion_jax.runtime.compilation import compiler_options
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sampling import Draw, make_txt2img

MAX_SEED = 2**32 - 1


class Pipeline:
    """A trained text-to-image model, ready to draw.

    Attributes:
      config: the config that it was trained with.
      ldm: its networks.
      params: its parameters (the moving average's).
      tokenizer: its tokenizer.
    """

    def __init__(
        self, config: ConfigDict, ldm: LatentDiffusion, params: Any, tokenizer: tokenizers.Tokenizer
    ):
        self.config, self.ldm, self.params, self.tokenizer = config, ldm, params, tokenizer
        self._programs: dict[tuple[str, int], Draw] = {}

    def program(self, sampler: str, steps: int) -> Draw:
        """The jitted sampling function for a sampler and a number of steps, made once."""
        if (sampler, steps) not in self._programs:
            try:
                self._programs[sampler, steps] = jax.jit(
                    make_txt2img(self.ldm, sampler, steps), compiler_options=compiler_options()
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        return self._programs[sampler, steps]

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws one image for each prompt; what is None comes from the config's `sample`.

        Args:
          prompts: one prompt or several.
          seed: of the first image, the next ones count up from it; or one for each image. An
            image is the same for the same prompt and seed, whatever else is drawn beside it.
          steps: sampling steps, 1 to the schedule's timesteps.
          guidance_scale: 1 is no guidance; more follows the prompt more closely.
          sampler: `ddim` or `ddpm`.
          eta: DDIM's noise, 0 for none.
          batch_size: images drawn at once; a new value compiles a new program.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          UserError: an argument is out of its range.
        """
        defaults = self.config.sample
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(len(prompts))]
        else:
            seeds = [int(s) for s in seed]
        if not prompts:
            raise UserError("no prompts to draw")
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        if not all(0 <= s <= MAX_SEED for s in seeds):
            raise UserError(f"seeds must be in 0..{MAX_SEED}, got {min(seeds)}..{max(seeds)}")
        sampler = defaults.sampler if sampler is None else sampler
        steps = defaults.steps if steps is None else steps
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        eta = defaults.eta if eta is None else eta
        size = defaults.batch_size if batch_size is None else batch_size
        if size < 1:
            raise UserError(f"batch_size must be at least 1, got {size}")
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta must be in [0, 1], got {eta}")
        program = self.program(sampler, steps)
        tokens = captions.encode(self.tokenizer, prompts)
        null = text.null_tokens(self.tokenizer)
        drawn = []
        for start in range(0, len(prompts), size):
            # The last batch is filled up, so that all run the one program.
            rows = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            batch = program(
                self.params,
                tokens[rows],
                null,
                np.array(seeds, np.uint32)[rows],
                np.float32(scale),
                np.float32(eta),
            )
            drawn.append(images.to_uint8(np.asarray(batch))[: len(prompts) - start])
        return np.concatenate(drawn)


def load(workdir: str | pathlib.Path) -> Pipeline:
    """Loads what `train` left in a workdir: the moving average of the second stage, the decoder.

    Raises:
      UserError: the workdir has no trained second stage, or a checkpoint is damaged.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    if not workdir.is_dir():
        raise UserError(f"workdir {workdir} does not exist")
    directory = workdir / "diffusion"
    step = checkpoints.latest_step(directory)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint of the diffusion stage; train it first")
    config = ConfigDict(checkpoints.read_json(directory, step, "config"))
    tokenizer = captions.load(json.dumps(checkpoints.read_json(directory, step, "tokenizer")))
    ldm = build.latent_diffusion(config, tokenizer.get_vocab_size(), captions.max_length(tokenizer))
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    length = captions.max_length(tokenizer)
    shapes = {"ema": jax.eval_shape(lambda key: ldm.init_trained(key, length), jax.random.key(0))}
    average = checkpoints.restore_part(
        directory, step, checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))
    )["ema"]
    frozen = first_stages.load_frozen(config, workdir, mesh)
    return Pipeline(config, ldm, frozen | average, tokenizer)
