r"""Exports the whole sampler, from token ids to pixels, as one program that needs JAX alone.

  python -m latent_diffusion_jax.export --model=runs/digits --out=exported \
      --prompt="a handwritten seven" --steps=50
  python exported/draw.py --seed=3 --out=image.npy

Writes to --out: program.stablehlo, for CPUs, GPUs and TPUs; weights.safetensors, which it takes as
arguments; inputs.npz with the prompt's tokens and the sampler's plan, also arguments; and draw.py,
which runs all of it. Other prompts, seeds, samplers and numbers of steps are other inputs of the
same program: export again with --inputs_only.
"""

import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from absl import flags

from latent_diffusion_jax import build, draw_requests, loading
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.loaded_model import Model, with_settings
from latent_diffusion_jax.models.attention_kernels import no_kernels
from latent_diffusion_jax.runtime import loggers
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.runtime.files import check_folder, check_ordinary
from latent_diffusion_jax.runtime.texts import first_line
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.sampling import Request, make_draw, make_plan
from latent_diffusion_jax.weights import files

FLAGS = flags.FLAGS

PLATFORMS = ("cpu", "cuda", "tpu")
# Names of arrays begin with what they belong to.
PLAN, CONDITION, NULL = "plan/", "condition/", "null_condition/"
PROGRAM, WEIGHTS, INPUTS = "program.stablehlo", "weights.safetensors", "inputs.npz"
LOADER = pathlib.Path(__file__).parent / "exported_draw.py"  # is copied beside the program
LOADER_COPY = "draw.py"


def program_of(model: Model, height: int, width: int) -> Any:
    """The sampler as a function of flat dictionaries, so that its loader needs no classes.

    (weights {name: array}, inputs {name: array}, seeds uint32 [B])
      -> (uint8 [B, H, W, C], whether each image is finite [B])
    """
    draw = make_draw(model.ldm, height, width)
    plan = make_plan(model.ldm.schedule, model.ldm.prediction_type, model.settings)

    def filled(tree: Any, values: dict[str, jax.Array], prefix: str = "") -> Any:
        leaves = [values[prefix + name] for name in flatten_names(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def program(
        weights: dict[str, jax.Array], inputs: dict[str, jax.Array], seeds: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def condition(prefix: str) -> dict[str, jax.Array]:
            return {
                name.removeprefix(prefix): jax.numpy.broadcast_to(
                    value, (len(seeds), *value.shape[1:])
                )
                for name, value in inputs.items()
                if name.startswith(prefix)
            }

        request = Request(seeds, condition(CONDITION), condition(NULL) or None)
        images, _ = draw(filled(model.params, weights), request, filled(plan, inputs, PLAN))
        finite = jax.numpy.isfinite(images).all(axis=(1, 2, 3))  # levels cannot show it
        return jax.numpy.round((images + 1.0) * 127.5).astype(jax.numpy.uint8), finite

    return program


def inputs_of(
    model: Model,
    prompt: str,
    negative_prompt: str,
    max_chunks: int,
    label: str | None = None,
) -> dict[str, np.ndarray]:
    """What the program takes beside weights and seeds: the condition and the sampler's plan."""
    inputs, null, _ = draw_requests.make_condition(
        model,
        prompt,
        negative_prompt,
        label,
        num_images=1,
        guided=model.settings.guidance_scale != 1.0,
        max_chunks=max_chunks,
    )
    with as_user_error("the sampler"):
        plan = make_plan(model.ldm.schedule, model.ldm.prediction_type, model.settings)
    arrays = {CONDITION: inputs, NULL: null or {}, PLAN: flatten_names(plan)}
    return {
        prefix + name: np.asarray(leaf)
        for prefix, part in arrays.items()
        for name, leaf in part.items()
    }


def export(
    model: Model,
    out: pathlib.Path,
    *,
    prompt: str,
    negative_prompt: str,
    batch_size: int,
    height: int,
    width: int,
    max_chunks: int,
    label: str | None = None,
    inputs_only: bool = False,
) -> None:
    """Writes the files that the module's docstring lists; arguments are the command's flags.

    Raises:
      UserError: the model or an argument does not fit, or a file cannot be written.
    """
    if model.sees_mask:
        raise UserError("models that paint into images are not exported: they need an image")
    inputs = inputs_of(model, prompt, negative_prompt, max_chunks, label)
    if inputs_only:
        _check_same_shapes(inputs, out / INPUTS)
        _write(out, inputs)
        return
    check_folder(out, str(out))
    weights = {name: np.asarray(leaf) for name, leaf in flatten_names(model.params).items()}
    with as_user_error("the program"):
        program = program_of(model, height, width)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, inputs))
    seeds = jax.ShapeDtypeStruct((batch_size,), np.uint32)
    with no_kernels():
        exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(*shapes, seeds)
    _write(out, inputs, weights, bytes(exported.serialize()))


def _write(
    out: pathlib.Path,
    inputs: dict[str, np.ndarray],
    weights: dict[str, np.ndarray] | None = None,
    program: bytes | None = None,
) -> None:
    """Puts files in their places once all of them are written: an older program that is there
    must not be left with this one's inputs."""
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as place:
            partial = pathlib.Path(place)
            if weights is not None and program is not None:
                files.write(partial / WEIGHTS, weights)
                (partial / PROGRAM).write_bytes(program)
                shutil.copyfile(LOADER, partial / LOADER_COPY)
            np.savez(partial / INPUTS, allow_pickle=False, **inputs)
            for path in sorted(partial.iterdir()):
                path.replace(out / path.name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def _check_same_shapes(inputs: dict[str, np.ndarray], path: pathlib.Path) -> None:
    try:
        check_ordinary(path)
        with np.load(path, allow_pickle=False) as found:
            theirs = {name: found[name].shape for name in found.files}
    except Exception as error:  # a damaged archive raises anything
        reason = first_line(error)
        raise UserError(
            f"cannot read the inputs of an exported program, {path}: {reason}"
        ) from error
    ours = {name: value.shape for name, value in inputs.items()}
    if ours != theirs:
        raise UserError(
            f"these inputs have other shapes than the program in {path.parent} takes: a prompt of "
            f"other length, guidance where there was none, or none where there was; export anew"
        )


def define_flags() -> None:
    flags.DEFINE_string(
        "model", None, "A workdir of train, a folder of diffusers or a single file.", required=True
    )
    loading.define_flags()
    flags.DEFINE_enum("dtype", "float32", sorted(build.DTYPES), "Of weights and computation.")
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    flags.DEFINE_string("prompt", "", "What to draw.")
    flags.DEFINE_string("label", None, "Class to draw, by number or name, for models of classes.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
    flags.DEFINE_enum("sampler", None, sorted(SAMPLERS), "Default: the model's.")
    flags.DEFINE_integer("steps", None, "Sampling steps; default: the model's.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance; default: the model's.")
    flags.DEFINE_integer("batch_size", 1, "Images that the program draws at once.", lower_bound=1)
    flags.DEFINE_integer("height", None, "Pixels; default as in training.", lower_bound=1)
    flags.DEFINE_integer("width", None, "Pixels; default as in training.", lower_bound=1)
    flags.DEFINE_integer("max_chunks", 1, "Chunks of tokens of a prompt.", lower_bound=1)
    flags.DEFINE_boolean("inputs_only", False, "Write only what a new prompt or sampler changes.")


def main() -> None:
    loggers.set_up_logging()
    model = loading.load_model(FLAGS.model, dtype=FLAGS.dtype, **loading.flag_values())
    chosen = {name: FLAGS[name].value for name in ("sampler", "steps", "guidance_scale")}
    model = with_settings(model, **chosen)
    out = pathlib.Path(FLAGS.out).expanduser()
    export(
        model,
        out,
        prompt=FLAGS.prompt,
        negative_prompt=FLAGS.negative_prompt,
        batch_size=FLAGS.batch_size,
        height=FLAGS.height or model.ldm.image_size,
        width=FLAGS.width or model.ldm.image_size,
        max_chunks=FLAGS.max_chunks,
        label=FLAGS.label,
        inputs_only=FLAGS.inputs_only,
    )
    print(f"{FLAGS.model} -> {out}")


if __name__ == "__main__":
    define_flags()
    run(main, alone=True)
