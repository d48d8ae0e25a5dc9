r"""Measures a trained model: reconstructions, and samples against real images.

  python -m latent_diffusion_jax.evaluate --workdir=runs/digits

prints and writes to WORKDIR/evaluation.json:
  psnr               of the first stage on the held-out images, in dB
  prompt_accuracy    share of samples that a classifier, fitted on the real training images, reads
                     as what their prompt or label names (data with class labels only), beside
  reader_accuracy    the same classifier's accuracy on held-out real images
  precision, recall  k-nearest-neighbour precision (samples among the training images) and recall
                     (held-out images among the samples), on grey pixels
and the first samples to WORKDIR/evaluation.png.

Where the workdir has a first stage alone, that is measured on the held-out images; and so is any
autoencoder, ours, diffusers' or CompVis', with

  python -m latent_diffusion_jax.evaluate --first_stage=PATH --data_name=FOLDER --image_size=256 \
      --lpips_weights=FILE --inception_weights=FILE --out=FOLDER

  psnr, ssim, lpips  of its reconstructions: mean over the images, and standard deviation (*_std)
  rfid               Frechet Inception distance of reconstructions and originals; it falls with
                     the number of images (the literature has 50,000)
  codebook_usage, codebook_perplexity    of a VQ autoencoder, over all images
and evaluation.png has originals beside their reconstructions.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from latent_diffusion_jax import build, first_stages, pipelines
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.evaluation import reconstruction
from latent_diffusion_jax.evaluation.measured_data import data_to_measure, open_images
from latent_diffusion_jax.evaluation.precision_recall import precision_recall
from latent_diffusion_jax.evaluation.prompt_accuracy import balanced_prompts, fit_reader
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.evaluation.real_images import grey_features, read_split
from latent_diffusion_jax.runtime import checkpoints, files, images, loggers, processes, sharding
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.sampling import bounded, to_pictures
from latent_diffusion_jax.weights import inception as inception_weights
from latent_diffusion_jax.weights import lpips as lpips_weights

FLAGS = flags.FLAGS

NEIGHBOURS = 3
MAX_REAL = 10_000  # real images of each split that samples are compared with
BATCH_PER_DEVICE = 8  # images that a device reconstructs at once
SAMPLING = ("num_samples", "seed", "steps", "guidance_scale", "sampler")  # flags for both stages
FIRST_STAGE = (  # flags for a first stage alone
    "data_name",
    "data_dir",
    "image_key",
    "split",
    "image_size",
    "batch_size",
    "lpips_weights",
    "inception_weights",
)


def reconstruct(pipe: pipelines.Pipeline, pixels: np.ndarray) -> np.ndarray:
    """The first stage's reconstructions from the posterior's mean, uint8 as its input."""
    shape = (pipe.config.sample.batch_size, *pipe.ldm.latent_shape)

    @jax.jit
    def there_and_back(params: Any, batch: jax.Array) -> jax.Array:
        z = pipe.ldm.encode(params, to_float(batch), jnp.zeros(shape))
        return bounded(pipe.ldm.decode(params, z))

    found = []
    for start in range(0, len(pixels), shape[0]):
        rows = np.minimum(np.arange(start, start + shape[0]), len(pixels) - 1)
        batch = processes.fetch(there_and_back(pipe.params, pixels[rows]))
        pictures = to_pictures(batch, "what the first stage decoded", pipe.ldm.unet.dtype)
        found.append(pictures[: len(pixels) - start])
    return np.concatenate(found)


def what_to_draw(
    conditioning: str,
    num_classes: int,
    captions: list[list[str]],
    labels: np.ndarray,
    num_samples: int,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Samples to compare with the held-out images.

    Args:
      conditioning: of the model, one of `build.CONDITIONINGS`.
      num_classes: of the data; 0 where it has no labels.
      captions: of each held-out image.
      labels: of each held-out image [N].
      num_samples: images to draw; with classes, the same number for each.

    Returns:
      Arguments of `Pipeline.__call__`, and the class that each sample should show.

    Raises:
      UserError: the number does not fit.
      ValueError: a class has no image.
    """
    if conditioning == "none":
        return {"num_images": num_samples}, None
    if not num_classes:
        return {"prompt": [captions[i % len(captions)][0] for i in range(num_samples)]}, None
    if num_samples % num_classes:
        raise UserError(f"--num_samples={num_samples} must be a multiple of {num_classes}")
    prompts, wanted = balanced_prompts(captions, labels, num_classes, num_samples // num_classes)
    return ({"label": wanted} if conditioning == "class" else {"prompt": prompts}), wanted


def evaluate(
    workdir: pathlib.Path, num_samples: int, max_real: int, seed: int, **sampling: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """Both stages' figures, as the module's docstring lists them, and the samples.

    Args:
      workdir: folder that `train` wrote.
      num_samples: images to draw; with class labels, the same number for each.
      max_real: real images of each split to use.
      seed: of the first sample.
      **sampling: passed on to `Pipeline.__call__`.

    Returns:
      Figures, and samples uint8 [N, H, W, C].
    """
    pipe = pipelines.load(workdir)
    channels = build.image_channels(pipe.config)
    if channels not in images.MODES:
        raise UserError(f"samples of {channels} channels are no pictures, which have 1, 3 or 4")
    train_source, test_source = build.data_sources(pipe.config)
    data = pipe.config.data
    sizes = data.image_size, data.resize
    train_pixels, _, train_labels = read_split(train_source, *sizes, max_real)
    test_pixels, test_captions, test_labels = read_split(test_source, *sizes, max_real)
    train_features, test_features = grey_features(train_pixels), grey_features(test_pixels)

    if len(train_pixels) <= NEIGHBOURS:
        raise UserError(f"{len(train_pixels)} training images are too few to compare with")

    classes = train_source.records.label_names
    try:
        drawn, labels = what_to_draw(
            pipe.config.conditioning, len(classes), test_captions, test_labels, num_samples
        )
    except ValueError as error:
        raise UserError(f"held-out split of {pipe.config.data.name!r}: {error}") from error
    samples = pipe(seed=seed, **drawn, **sampling)
    features = grey_features(samples)

    figures: dict[str, Any] = {}
    if pipe.ldm.autoencoder is not None:
        figures["psnr"] = float(psnr(test_pixels, reconstruct(pipe, test_pixels)).mean())
    if labels is not None:
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


def evaluate_first_stage(
    path: pathlib.Path,
    data: dict[str, Any],
    *,
    max_real: int | None = None,
    batch_size: int | None = None,
    lpips_file: str | None = None,
    inception_file: str | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """A first stage's figures, as the module's docstring lists them, and reconstructions.

    Args:
      path: a workdir, or a foreign checkpoint, see `first_stages.open_first_stage`.
      data: the keys `name`, `data_dir`, `image_key`, `test_split` (which is measured) and
        `image_size` of a config's `data`; None is the config's, or a default. Captions are not
        needed, and a folder that is not the config's is used whole.
      max_real: images to use; None is all.
      batch_size: images reconstructed at once.
      lpips_file: see `weights.lpips`; None is the config's, "" leaves LPIPS out.
      inception_file: see `weights.inception`; None or "" leaves rFID out.

    Returns:
      Figures, and pairs of original and reconstruction uint8 [2 * N, H, W, C].

    Raises:
      UserError: what is needed is not given, not there or damaged.
    """
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    stage = first_stages.open_first_stage(path, mesh)
    own = None if stage.config is None else stage.config.data
    data = data_to_measure(own, data, str(path))
    if lpips_file is None and stage.config is not None:
        lpips_file = stage.config.first_stage.loss.lpips_weights
    # Before anything large is read.
    reconstruction.check(
        stage.network, data["image_size"], lpips=bool(lpips_file), inception=bool(inception_file)
    )
    source = open_images(data, stage.network.image_channels)
    num_images = min(len(source), max_real or len(source))
    figures, pairs = reconstruction.measure_reconstructions(
        stage.network,
        stage.params,
        source,
        mesh,
        image_size=data["image_size"],
        resize=data["resize"],
        num_images=num_images,
        batch_size=batch_size or BATCH_PER_DEVICE * mesh.size,
        lpips_params=lpips_weights.load(lpips_file) if lpips_file else None,
        inception_params=inception_weights.load(inception_file) if inception_file else None,
    )
    settings = {
        "first_stage": str(path),
        "data_name": data["name"],
        "split": data["test_split"],
        "image_size": data["image_size"],
        "images": num_images,
        "damaged_images": len(source.damaged),
    }
    return {**figures, "settings": settings}, pairs


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder that train wrote, or a checkpoint in it.")
    flags.DEFINE_string("first_stage", None, "Measure an autoencoder: a workdir, or a checkpoint.")
    flags.DEFINE_string("out", None, "Folder for the results; default the workdir.")
    flags.DEFINE_integer("max_real", None, "Real images of each split to use.", lower_bound=10)
    flags.DEFINE_integer("num_samples", 500, "Images to draw.", lower_bound=10)
    flags.DEFINE_integer("seed", 0, "Seed of the first sample; the next ones count up from it.")
    flags.DEFINE_integer("steps", None, "Sampling steps; default from the config.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance; default from the config.")
    flags.DEFINE_enum("sampler", None, sorted(SAMPLERS), "Default from the config.")
    flags.DEFINE_string("data_name", None, "Folder or TFDS dataset; default the config's.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps its datasets.")
    flags.DEFINE_string("image_key", None, "TFDS feature with the image.")
    flags.DEFINE_string("split", None, "Split of the data; default the held-out one.")
    flags.DEFINE_integer("image_size", None, "Pixels; default the config's.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Images reconstructed at once.", lower_bound=1)
    flags.DEFINE_string("lpips_weights", None, "LPIPS weights; default the config's, '' for none.")
    flags.DEFINE_string("inception_weights", None, "pt_inception-2015-12-05-6726825d.pth, for rFID")


def what_to_measure(
    workdir: str | None, first_stage: str | None, out: str | None, given: list[str]
) -> tuple[pathlib.Path, pathlib.Path, bool]:
    """What the flags ask for.

    Args:
      workdir: value of the flag.
      first_stage: value of the flag.
      out: value of the flag.
      given: names of all flags that are set.

    Returns:
      What is measured, the folder for the results, whether a first stage alone is meant.

    Raises:
      UserError: the flags do not go together.
    """
    if bool(workdir) == bool(first_stage):
        raise UserError("give one of --workdir=FOLDER and --first_stage=PATH")
    path = pathlib.Path(workdir or first_stage or "").expanduser().absolute()
    of_model, step = checkpoints.workdir_and_step(path, "diffusion")
    of_first, first_step = checkpoints.workdir_and_step(path, "first_stage")
    has_both, has_first = step is not None, first_step is not None
    alone = bool(first_stage) or (has_first and not has_both)
    for name in given:
        if alone and name in SAMPLING:
            raise UserError(f"--{name} is about samples, which a first stage does not draw")
        if not alone and name in FIRST_STAGE:
            raise UserError(
                f"--{name} is for measuring a first stage alone; for that of this workdir, give "
                f"--first_stage={of_model}"
            )
    if first_stage and not out and (has_both or not has_first):
        raise UserError(
            f"the results of --first_stage={path} need a place of their own, as it is no workdir "
            "with a first stage alone; give --out=FOLDER"
        )
    if not out and not of_model == of_first == path:
        raise UserError(f"the results of one checkpoint, {path}, need --out=FOLDER")
    return path, pathlib.Path(out).expanduser().absolute() if out else path, alone


def main() -> None:
    loggers.set_up_logging()
    given = [name for name in (*SAMPLING, *FIRST_STAGE) if FLAGS[name].present]
    path, out, alone = what_to_measure(FLAGS.workdir, FLAGS.first_stage, FLAGS.out, given)
    if processes.process_index() == 0 and (FLAGS.out or path.is_dir()):
        files.check_folder(out, f"--out={FLAGS.out}" if FLAGS.out else f"workdir {out}")
    if alone:
        figures, shown = evaluate_first_stage(
            path,
            {
                "name": FLAGS.data_name,
                "data_dir": FLAGS.data_dir,
                "image_key": FLAGS.image_key,
                "test_split": FLAGS.split,
                "image_size": FLAGS.image_size,
            },
            max_real=FLAGS.max_real,
            batch_size=FLAGS.batch_size,
            lpips_file=FLAGS.lpips_weights,
            inception_file=FLAGS.inception_weights,
        )
        picture = images.grid(shown, columns=8)
    else:
        figures, samples = evaluate(
            path,
            FLAGS.num_samples,
            FLAGS.max_real or MAX_REAL,
            FLAGS.seed,
            steps=FLAGS.steps,
            guidance_scale=FLAGS.guidance_scale,
            sampler=FLAGS.sampler,
        )
        chosen = np.linspace(0, len(samples) - 1, min(100, len(samples)), dtype=int)
        picture = images.grid(samples[chosen], columns=10)
    if jax.process_index() != 0:
        return
    for name, value in figures.items():
        print(f"{name:16}", f"{value:.4f}" if isinstance(value, float) else value, flush=True)
    images.save_png(out / "evaluation.png", picture)
    checkpoints.write_json(out / "evaluation.json", figures)
    print(f"-> {out / 'evaluation.json'}, evaluation.png")


if __name__ == "__main__":
    define_flags()
    run(main)
