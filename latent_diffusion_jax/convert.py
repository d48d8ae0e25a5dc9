r"""Converts weights between this package and others.

  python -m latent_diffusion_jax.convert --source=runs/mine --to=diffusers --out=exported/vae
  python -m latent_diffusion_jax.convert --source=model.ckpt --to=diffusers --out=exported/vae
  python -m latent_diffusion_jax.convert --source=vgg16-397923af.pth --source=vgg.pth \
      --to=lpips --out=lpips.safetensors

--to=diffusers and --to=compvis write a first stage or, with --part=model, a whole model: a
pipeline's folder, or one file with all networks. --to=lpips writes the weights of the perceptual
loss.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from latent_diffusion_jax import first_stages, loading, saving
from latent_diffusion_jax.runtime import files, loggers
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import autoencoders, lpips

FLAGS = flags.FLAGS

FORMATS = ("lpips", "diffusers", "compvis")
PARTS = ("first_stage", "model")
USUAL_SIZE = 256  # pixels a side that the published first stages were trained on


def convert(
    sources: Sequence[str],
    to: str,
    out: str,
    num_groups: int | None = None,
    prefix: bool = False,
    part: str = "first_stage",
    **unsaid: Any,
) -> None:
    """Reads `sources` and writes `out`; the arguments are the command's flags.

    `unsaid` is what a single file of a whole model does not say, for `load_model`.

    Raises:
      UserError: a source cannot be read, `out` cannot be written, or the format cannot express it.
    """
    if to == "lpips":
        lpips.convert(sources, out)
        return
    if len(sources) != 1:
        raise UserError(f"a {part.replace('_', ' ')} has one source, got {len(sources)}")
    if part == "model":
        model = loading.load_model(sources[0], **unsaid)
        save = saving.save_diffusers if to == "diffusers" else saving.save_single_file
        save(out, model)
        return
    found, image_size = _open(pathlib.Path(sources[0]).expanduser(), num_groups)
    network = found.kind, found.fields, found.params
    if to == "diffusers":
        autoencoders.save_diffusers(out, *network, found.scaling_factor, image_size)
    else:
        autoencoders.save_compvis(out, *network, prefix, found.scaling_factor)


def _open(source: pathlib.Path, num_groups: int | None) -> tuple[autoencoders.Loaded, int]:
    """A first stage, and the size of the images that it was trained on."""
    if not first_stages.is_workdir(source):
        with files.unusable(source):
            found = autoencoders.load(source, num_groups)
        return found, USUAL_SIZE
    if num_groups is not None:
        raise UserError(f"--num_groups is for CompVis files; the workdir {source} has its own")
    stage = first_stages.open_first_stage(source)
    assert stage.config is not None
    if stage.scale_factor is None:
        logging.warning(
            "%s has no scale of its latents, which is measured at the end of a first stage's "
            "training; what is written says 1, or nothing",
            source,
        )
    found = autoencoders.Loaded(stage.kind, stage.fields, stage.params, stage.scale_factor)
    return found, stage.config.data.image_size


def define_flags() -> None:
    flags.DEFINE_multi_string(
        "source", None, "What to convert. For a first stage a workdir that train wrote, a folder "
        "of diffusers, or a .safetensors or .ckpt of CompVis' code; for lpips torchvision's VGG16 "
        "and the vgg.pth of lpips, each with its own --source, or one file with both.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_enum("to", None, FORMATS, "Format to write.", required=True)
    flags.DEFINE_enum("part", "first_stage", PARTS, "What to convert of the source.")
    loading.define_flags()
    flags.DEFINE_string(
        "out", None, "A folder for diffusers, else a .safetensors file.", required=True
    )
    flags.DEFINE_integer(
        "num_groups", None, "Groups of normalisation in a CompVis file, which does not say; "
        "default 32.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "prefix", False, "For compvis: names begin with first_stage_model., as in a whole model."
    )


def main() -> None:
    loggers.set_up_logging()
    convert(
        FLAGS.source,
        FLAGS.to,
        FLAGS.out,
        FLAGS.num_groups,
        FLAGS.prefix,
        FLAGS.part,
        **loading.flag_values(),
    )
    print(f"{' and '.join(FLAGS.source)} -> {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run(main, alone=True)
