r"""Measures a trained model: reconstructions, and samples against real images.

  python -m latent_diffusion_jax.evaluate --workdir=runs/digits

Prints and writes to WORKDIR/evaluation.json:
  psnr               of the first stage on the held-out images, in dB
  prompt_accuracy    share of samples that a classifier, fitted on the real training images, reads
                     as what their prompt names (data with class labels only), beside
  reader_accuracy    the same classifier's accuracy on held-out real images
  precision, recall  k-nearest-neighbour precision (samples among the training images) and recall
                     (held-out images among the samples), on grey pixels
and the first samples to WORKDIR/evaluation.png.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from latent_diffusion_jax import build, pipelines
from latent_diffusion_jax.data.pipeline import DecodedSource, image_example
from latent_diffusion_jax.evaluation.precision_recall import precision_recall
from latent_diffusion_jax.evaluation.prompt_accuracy import balanced_prompts, fit_reader
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.runtime import checkpoints, images, loggers
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training.state import to_float

FLAGS = flags.FLAGS

FEATURE_SIZE = 32  # pixels: side of the grey images that are compared
NEIGHBOURS = 3


def read_split(source: DecodedSource, size: int, limit: int) -> tuple[np.ndarray, list, np.ndarray]:
    """Images uint8 [N, size, size, 3], captions and labels (-1: none) of a split's first images."""
    pixels, captions, labels = [], [], []
    for i in range(min(len(source), limit)):
        record = source[i]
        pixels.append(image_example(record, None, size, random_flip=False))
        captions.append(record["captions"])
        labels.append(-1 if record["label"] is None else record["label"])
    return np.stack(pixels), captions, np.array(labels)


def grey_features(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> grey levels in [0, 1] at 32x32, float64 [N, 1024]."""
    size = (FEATURE_SIZE, FEATURE_SIZE)
    grey = [Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX)
            for image in pixels]  # fmt: skip
    return np.stack([np.asarray(image, np.float64).ravel() for image in grey]) / 255.0


def reconstruct(pipe: pipelines.Pipeline, pixels: np.ndarray) -> np.ndarray:
    """The first stage's reconstructions from the posterior's mean, uint8 as its input."""
    shape = (pipe.config.sample.batch_size, *pipe.ldm.latent_shape)

    @jax.jit
    def there_and_back(params: Any, batch: jax.Array) -> jax.Array:
        z = pipe.ldm.encode(params, to_float(batch), jnp.zeros(shape))
        return jnp.clip(pipe.ldm.decode(params, z), -1.0, 1.0)

    found = []
    for start in range(0, len(pixels), shape[0]):
        rows = np.minimum(np.arange(start, start + shape[0]), len(pixels) - 1)
        batch = images.to_uint8(np.asarray(there_and_back(pipe.params, pixels[rows])))
        found.append(batch[: len(pixels) - start])
    return np.concatenate(found)


def evaluate(
    workdir: pathlib.Path, num_samples: int, max_real: int, seed: int, **sampling: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The figures that the module's docstring lists, and the samples, uint8 [N, H, W, 3].

    Args:
      workdir: folder that `train` wrote.
      num_samples: images to draw; with class labels, the same number for each.
      max_real: real images of each split to use.
      seed: of the first sample.
      **sampling: passed on to `Pipeline.__call__`.
    """
    pipe = pipelines.load(workdir)
    train_source, test_source = build.data_sources(pipe.config)
    size = pipe.config.data.image_size
    train_pixels, _, train_labels = read_split(train_source, size, max_real)
    test_pixels, test_captions, test_labels = read_split(test_source, size, max_real)
    train_features, test_features = grey_features(train_pixels), grey_features(test_pixels)

    if len(train_pixels) <= NEIGHBOURS:
        raise UserError(f"{len(train_pixels)} training images are too few to compare with")

    classes = train_source.records.label_names
    if classes:
        if num_samples % len(classes):
            raise UserError(f"--num_samples={num_samples} must be a multiple of {len(classes)}")
        try:
            prompts, labels = balanced_prompts(
                test_captions, test_labels, len(classes), num_samples // len(classes)
            )
        except ValueError as error:
            raise UserError(f"held-out split of {pipe.config.data.name!r}: {error}") from error
    else:
        prompts = [test_captions[i % len(test_captions)][0] for i in range(num_samples)]
    samples = pipe(prompts, seed=seed, **sampling)
    features = grey_features(samples)

    figures: dict[str, Any] = {
        "psnr": float(psnr(test_pixels, reconstruct(pipe, test_pixels)).mean())
    }
    if classes:
        reader = fit_reader(train_features, train_labels, test_features, test_labels)
        figures["prompt_accuracy"] = reader.accuracy(features, labels)
        figures["reader_accuracy"] = reader.held_out_accuracy
    figures["precision"], figures["recall"] = precision_recall(
        train_features, test_features, features, NEIGHBOURS
    )
    defaults = pipe.config.sample
    figures["settings"] = {
        "num_samples": num_samples,
        "train_images": len(train_pixels),
        "test_images": len(test_pixels),
        "seed": seed,
        **{key: defaults[key] if given is None else given for key, given in sampling.items()},
    }
    return figures, samples


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder that train wrote.", required=True)
    flags.DEFINE_integer("num_samples", 500, "Images to draw.", lower_bound=10)
    flags.DEFINE_integer("max_real", 10_000, "Real images of each split to use.", lower_bound=10)
    flags.DEFINE_integer("seed", 0, "Seed of the first sample; the next ones count up from it.")
    flags.DEFINE_integer("steps", None, "Sampling steps; default from the config.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance; default from the config.")
    flags.DEFINE_string("sampler", None, "ddim or ddpm; default from the config.")


def main() -> None:
    loggers.set_up_logging()
    workdir = pathlib.Path(FLAGS.workdir).expanduser().absolute()
    figures, samples = evaluate(
        workdir,
        FLAGS.num_samples,
        FLAGS.max_real,
        FLAGS.seed,
        steps=FLAGS.steps,
        guidance_scale=FLAGS.guidance_scale,
        sampler=FLAGS.sampler,
    )
    checkpoints.write_json(workdir / "evaluation.json", figures)
    shown = np.linspace(0, len(samples) - 1, min(100, len(samples)), dtype=int)
    images.save_png(workdir / "evaluation.png", images.grid(samples[shown], columns=10))
    for name, value in figures.items():
        print(f"{name:16}", f"{value:.4f}" if isinstance(value, float) else value)
    print(f"-> {workdir / 'evaluation.json'}, evaluation.png")


if __name__ == "__main__":
    define_flags()
    run(main)
