"""Sampling from Python: load a model, then draw images from prompts.

pipe = latent_diffusion_jax.load("runs/digits")
images = pipe("a handwritten seven", num_images=4, seed=0)  # uint8 [4, H, W, 3]
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_diffusion_jax import draw_requests, loading
from latent_diffusion_jax.conditioning import prompts as weighted_prompts
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.diffusion.plan import Plan
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.loaded_model import Model, with_settings
from latent_diffusion_jax.runtime import images as pictures
from latent_diffusion_jax.runtime import processes, sharding
from latent_diffusion_jax.runtime.compilation import compiler_options, use_persistent_cache
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import Picture
from latent_diffusion_jax.sampling import Request, make_draw, make_plan, to_pictures


class Pipeline:
    """A trained model, ready to draw.

    Attributes:
      model: networks, parameters, tokenizer and usual settings.
    """

    def __init__(self, model: Model):
        devices = jax.devices()
        self._mesh = sharding.make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices)
        placed = processes.put(model.params, sharding.replicated(self._mesh))
        self.model = dataclasses.replace(model, params=placed)
        self._programs: dict[tuple[int, int, int], Any] = {}
        self._compiled: set[Any] = set()

    @property
    def ldm(self) -> LatentDiffusion:
        return self.model.ldm

    @property
    def tokenizer(self) -> PromptTokenizer | None:
        return self.model.tokenizer

    @property
    def config(self) -> ConfigDict:
        """The config that it was trained with.

        Raises:
          UserError: it was not trained here.
        """
        if self.model.config is None:
            raise UserError("this model comes from elsewhere and has no config")
        return self.model.config

    @property
    def params(self) -> Any:
        return self.model.params

    def program(self, height: int, width: int, num_previews: int = 0) -> Any:
        """The jitted sampling function for a size, made once; see `sampling.make_draw`."""
        key = (height, width, num_previews)
        if key not in self._programs:
            try:
                draw = make_draw(
                    self.ldm,
                    height,
                    width,
                    num_previews=num_previews,
                    masked=self.model.sees_mask,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
            options = compiler_options(in_half=self.ldm.unet.dtype == jnp.bfloat16)
            self._programs[key] = jax.jit(draw, compiler_options=options)
        return self._programs[key]

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        label: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        sigmas: str | None = None,
        spacing: str | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Picture | None = None,
        mask: Picture | None = None,
        strength: float = 0.8,
        latents: np.ndarray | None = None,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        max_chunks: int = 4,
        batch_size: int | None = None,
        previews: int = 0,
    ) -> Any:
        """Draws images; what is None is the model's usual value.

        Only the size, the batch size, the number of chunks of a prompt and what kinds of arguments
        there are (a prompt, an image, a mask) make a new program; all else, sampler and number of
        steps too, are numbers in its arguments.

        Args:
          prompt: one or several. `(word:1.3)` weighs a word, see `conditioning.prompts`.
          label: for a model of classes: one or several, by number or name.
          negative_prompt: what guidance leads away from; one, or one for each prompt.
          num_images: images of each prompt, or label.
          seed: of the first image, the next ones count up from it; or one for each image. An
            image is the same for the same prompt and seed, whatever else is drawn beside it.
          steps: sampling steps, 1 to the schedule's timesteps.
          guidance_scale: 1 is no guidance; more follows the prompt more closely.
          guidance_rescale: 0 .. 1 against overexposure by large scales.
          guidance_interval: (low, high) in [0, 1] of the timesteps; no guidance outside.
          sampler: one of `diffusion.samplers.SAMPLERS`.
          eta: DDIM's noise, 0 for none.
          sigmas: `schedule` or `karras`.
          spacing: of timesteps, see `diffusion.noise_levels`.
          height, width: pixels; also larger than in training.
          image: a file or picture to start from; resized to height x width.
          mask: a file or picture, white where `image` is to be painted anew.
          strength: how much of `image` is redrawn, 0 .. 1.
          latents: starting noise [N, h, w, c], in place of what the seeds give.
          variation_seed: of other noise that each start is turned towards.
          variation_strength: how far, 0 .. 1.
          max_chunks: chunks of tokens that a prompt may fill; what is beyond is cut off, with a
            warning.
          batch_size: images drawn at once.
          previews: also return how the image comes about, at so many steps.

        Returns:
          uint8 [N, H, W, C]; with `previews`, that and uint8 [previews, N, H, W, C].

        Raises:
          UserError: an argument is out of its range, or does not fit the model.
        """
        chosen: dict[str, Any] = {
            "sampler": sampler,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "eta": eta,
            "sigmas": sigmas,
            "spacing": spacing,
        }
        settings = with_settings(self.model, **chosen).settings
        guided = settings.guidance_scale != 1.0
        inputs, null, count = draw_requests.make_condition(
            self.model, prompt, negative_prompt, label, num_images, guided, max_chunks
        )
        size = self._size(height, width)
        seeds = draw_requests.seeds_of(seed, count)
        if variation_strength and variation_seed is None:
            raise UserError("variation_strength needs a variation_seed")
        if mask is not None and image is None:
            raise UserError("a mask needs an image to paint into")
        if self.model.sees_mask and mask is None:
            raise UserError("this model paints into images: give image and mask")
        if previews < 0:
            raise UserError(f"previews must not be negative, got {previews}")
        starts = image is not None and not (mask is not None and strength == 1.0)
        try:
            plan = make_plan(
                self.ldm.schedule,
                self.ldm.prediction_type,
                settings,
                strength if starts else None,
                previews,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        program = self.program(*size, previews)
        rows = {"seeds": np.array(seeds, np.uint32), "inputs": inputs, "null_inputs": null}
        shape = (count, *self.ldm.shape_of(*size))
        if latents is not None:
            if variation_seed is not None:
                raise UserError("give either latents or variation_seed")
            rows["noise"] = draw_requests.noise_of(latents, shape)
        shared: dict[str, Any] = {}
        if variation_seed is not None:
            rows["variation_seeds"] = draw_requests.variation_seeds_of(variation_seed, count)
            if not 0.0 <= variation_strength <= 1.0:
                raise UserError(f"variation_strength must be in [0, 1], got {variation_strength}")
            shared["variation_strength"] = np.float32(variation_strength)
        if image is not None:
            pixels = pictures.of_size(image, size, self.ldm.image_channels)
            shared["image"] = pictures.to_float(pixels)
        if mask is not None:
            shared["mask"] = (pictures.of_size(mask, size, 1) / 255.0).astype(np.float32)
        # Prompts of other lengths are other shapes: an image does not depend on its neighbours'.
        lengths = np.ones(count, int)
        if self.tokenizer is not None:
            lengths = weighted_prompts.filled_chunks(self.tokenizer, inputs, null)
        images = np.zeros((count, *size, self.ldm.image_channels), np.uint8)
        shown = np.zeros((previews, *images.shape), np.uint8)
        for length in np.unique(lengths):
            members = np.flatnonzero(lengths == length)
            group = _rows(rows, members)
            if self.tokenizer is not None:
                for name in ("inputs", "null_inputs"):
                    group[name] = weighted_prompts.first_chunks(group[name], length)
            images[members], shown[:, members] = self._draw(
                program, plan, group, shared, size, batch_size
            )
        return (images, shown) if previews else images

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = self.ldm.image_size
        return (size if height is None else height), (size if width is None else width)

    def _draw(
        self,
        program: Any,
        plan: Plan,
        rows: dict[str, Any],
        shared: dict[str, np.ndarray],
        size: tuple[int, int],
        batch_size: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        count, devices = len(rows["seeds"]), self._mesh.size
        most = self.model.batch_size * devices if batch_size is None else batch_size
        if most < 1:
            raise UserError(f"batch_size must be at least 1, got {most}")
        most = min(most, count) if batch_size is None else most
        if most > 1:
            most = math.ceil(most / devices) * devices
        split = sharding.batch_sharding(self._mesh) if most % devices == 0 else None
        split = split or sharding.replicated(self._mesh)
        same = sharding.replicated(self._mesh)
        drawn, shown = [], []
        for start in range(0, count, most):
            # The last batch is filled up, so that all run the one program.
            chosen = np.minimum(np.arange(start, start + most), count - 1)
            batch = processes.put(_rows(rows, chosen), split)
            for name, value in shared.items():
                if name in ("image", "mask"):
                    value = processes.put(np.repeat(value[None], most, axis=0), split)
                batch[name] = value
            request = Request(**batch)
            found, steps = self._run(program, request, processes.put(plan, same), size)
            images = to_pictures(processes.fetch(found), "what the model drew", self.ldm.unet.dtype)
            drawn.append(images[: count - start])
            shown.append(pictures.to_uint8(processes.fetch(steps))[:, : count - start])
        return np.concatenate(drawn), np.concatenate(shown, axis=1)

    def _run(self, program: Any, request: Request, plan: Plan, size: tuple[int, int]) -> Any:
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), request)
        kind = (id(program), str(shapes))
        if kind in self._compiled:
            return sharding.over(self._mesh, program)(self.params, request, plan)
        _tell(
            f"compiling the sampler for {len(request.seeds)} image(s) of {size[0]}x{size[1]}; this "
            "is done once for each kind of call ..."
        )
        start = time.perf_counter()
        drawn = sharding.over(self._mesh, program)(self.params, request, plan)
        compiled = jax.block_until_ready(drawn)
        _tell(f"compiled and drew in {time.perf_counter() - start:.1f} s")
        self._compiled.add(kind)
        return compiled


def _tell(text: str) -> None:
    if processes.process_index() == 0:
        print(text, file=sys.stderr)


def _rows(arrays: Any, members: np.ndarray) -> Any:
    """Some rows of a tree of arrays."""
    return jax.tree.map(lambda array: array[members], arrays)


def load(
    path: str | pathlib.Path,
    *,
    dtype: str = "float32",
    tokenizer: str | pathlib.Path | None = None,
    ema: bool = True,
    num_heads: int | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """Loads a model to draw with.

    Args:
      path: a workdir of `train` (its last checkpoint), one checkpoint in it
        (`<workdir>/diffusion/<step>`), a folder of diffusers (Stable Diffusion 1.x and 2.x, LDM),
        or a single file of CompVis' layout (.safetensors or .ckpt).
      dtype: of parameters and computation, `float32` or `bfloat16`.
      tokenizer: folder of the tokenizer, for single files that were not written here.
      ema: the moving average of the weights where a file holds both.
      num_heads: of the UNet's attention, for single files, which do not say; see
        `weights.unet_compvis`.
      prediction_type: `epsilon`, `v` or `z_0`, for single files, which do not say: Stable Diffusion
        2's are taken for v, its models for 512x512 pixels predict epsilon.

    Raises:
      UserError: nothing is there, or it is damaged, incomplete or of another kind.
    """
    if processes.num_processes() == 1:  # several need a folder that all of them see
        use_persistent_cache()
    return Pipeline(
        loading.load_model(
            path,
            dtype=dtype,
            tokenizer=tokenizer,
            ema=ema,
            num_heads=num_heads,
            prediction_type=prediction_type,
        )
    )
