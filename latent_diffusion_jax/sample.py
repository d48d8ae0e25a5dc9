r"""Draws images with a trained model: from prompts, or labels, or neither.

  python -m latent_diffusion_jax.sample --workdir=runs/digits --prompt="a handwritten seven" \
      --num_images=16 --out=grid.png

--workdir, or --model, is a workdir of train, one of its checkpoints (runs/digits/diffusion/4000), a
folder of diffusers or a single file of CompVis' layout. --image starts from a picture, and --mask
paints into its white parts.

Many at once: --prompts_file=FILE (one a line) and --out=DIR/ (one PNG an image, and a
metadata.jsonl with the prompt and the seed of each).
"""

import json
import pathlib

import numpy as np
from absl import flags

from latent_diffusion_jax import build, loading, pipelines
from latent_diffusion_jax.diffusion.noise_levels import SIGMAS
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.runtime import files, images, loggers
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import StorageError, UserError
from latent_diffusion_jax.runtime.texts import check_text

FLAGS = flags.FLAGS

GRID_COLUMNS = 4
MAX_PROMPTS_FILE = 64 << 20  # bytes; larger ones are no prompts


def read_prompts(prompt: str | None, prompts_file: str | None) -> list[str]:
    """The prompt of a flag or the lines of a file; [""] where there are neither."""
    if prompt is not None and prompts_file is not None:
        raise UserError("give either --prompt or --prompts_file")
    if prompts_file is None:
        return [prompt or ""]
    try:
        path = pathlib.Path(prompts_file).expanduser()
        lines = files.read_text(path, MAX_PROMPTS_FILE).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read prompts file {prompts_file}: {reason}") from error
    for number, line in enumerate(lines, 1):
        check_text(line, f"line {number} of prompts file {prompts_file}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts file {prompts_file} has no prompts")
    return prompts


def write_folder(
    folder: pathlib.Path, drawn: np.ndarray, texts: list[str], seeds: list[int]
) -> None:
    """One PNG an image and a metadata.jsonl, the layout that `data.name` reads.

    Args:
      folder: to write to.
      drawn: uint8 [N, H, W, C].
      texts: prompts, or labels, N.
      seeds: N.

    Raises:
      StorageError: a file cannot be written.
    """
    rows = []
    for i, (image, prompt, seed) in enumerate(zip(drawn, texts, seeds, strict=True)):
        name = f"{i:05d}.png"
        images.save_png(folder / name, image)
        rows.append(json.dumps({"file_name": name, "text": prompt, "seed": seed}) + "\n")
    path = folder / "metadata.jsonl"
    try:
        path.write_text("".join(rows), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", None, "Folder that train wrote, a checkpoint in it (WORKDIR/diffusion/STEP), "
        "folder of diffusers, or file of CompVis' layout.", required=True,
    )  # fmt: skip
    flags.DEFINE_alias("model", "workdir")
    flags.DEFINE_enum("dtype", "float32", sorted(build.DTYPES), "Of the computation.")
    loading.define_flags()
    flags.DEFINE_string("prompt", None, "What to draw.")
    flags.DEFINE_list("label", None, "Classes to draw, by number or name, with a comma between.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
    flags.DEFINE_string(
        "prompts_file", None, "File with a prompt on each line, instead of --prompt."
    )
    flags.DEFINE_integer("num_images", 1, "Images for each prompt or label.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the first image; the next ones count up from it.")
    flags.DEFINE_integer("steps", None, "Sampling steps; default from the config.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance; default from the config.")
    flags.DEFINE_enum("sampler", None, sorted(SAMPLERS), "Default from the config.")
    flags.DEFINE_enum("sigmas", None, SIGMAS, "Noise levels; default from the config.")
    flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1; default from the config.")
    flags.DEFINE_integer(
        "batch_size", None, "Images drawn at once; default from the config.", lower_bound=1
    )
    flags.DEFINE_integer("height", None, "Pixels; default as in training.", lower_bound=1)
    flags.DEFINE_integer("width", None, "Pixels; default as in training.", lower_bound=1)
    flags.DEFINE_string("image", None, "Picture to start from.")
    flags.DEFINE_string("mask", None, "Picture, white where --image is painted anew.")
    flags.DEFINE_float("strength", 0.8, "How much of --image is redrawn, 0 to 1.")
    flags.DEFINE_integer(
        "max_chunks", 4, "Chunks of tokens that a prompt may fill, the rest is cut off.",
        lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_string("out", "grid.png", "A .png for one grid; a folder, with a / at its end or "
                        "already there, for one PNG an image.")  # fmt: skip


def main() -> None:
    loggers.set_up_logging()
    out = pathlib.Path(FLAGS.out).expanduser()
    to_folder = FLAGS.out.endswith("/") or out.is_dir()
    if not to_folder and out.suffix.lower() != ".png":
        raise UserError(f"--out={FLAGS.out} must be a .png file, or a folder with a / at its end")
    prompts = read_prompts(FLAGS.prompt, FLAGS.prompts_file)
    (files.check_folder if to_folder else files.check_file)(out, f"--out={FLAGS.out}")
    pipe = pipelines.load(FLAGS.workdir, dtype=FLAGS.dtype, **loading.flag_values())
    if pipe.tokenizer is not None and FLAGS.prompt is None and FLAGS.prompts_file is None:
        raise UserError("give --prompt or --prompts_file: this model draws what they say")
    texts = [text for text in FLAGS.label or prompts for _ in range(FLAGS.num_images)]
    seeds = [FLAGS.seed + i for i in range(len(texts))]
    drawn = pipe(
        "" if FLAGS.label else prompts,
        label=FLAGS.label,
        num_images=FLAGS.num_images,
        negative_prompt=FLAGS.negative_prompt,
        seed=seeds,
        steps=FLAGS.steps,
        guidance_scale=FLAGS.guidance_scale,
        sampler=FLAGS.sampler,
        sigmas=FLAGS.sigmas,
        eta=FLAGS.eta,
        height=FLAGS.height,
        width=FLAGS.width,
        image=FLAGS.image,
        mask=FLAGS.mask,
        strength=FLAGS.strength,
        max_chunks=FLAGS.max_chunks,
        batch_size=FLAGS.batch_size,
    )
    if to_folder:
        write_folder(out, drawn, texts, seeds)
    else:
        images.save_png(out, images.grid(drawn, GRID_COLUMNS))
    print(f"{len(drawn)} image(s) -> {out}")


if __name__ == "__main__":
    define_flags()
    run(main, alone=True)
