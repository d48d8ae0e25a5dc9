r"""Says of a config, before any TPU is paid for, whether it fits one and how fast it will be.

  python -m latent_diffusion_jax.plan --config=configs/stable_diffusion.py --topology=v5e:4x4

compiles the train steps and the sampler with the compiler for TPUs, which runs on any Linux x86-64
machine (pip install libtpu), without weights or data, and prints for each: memory of a chip by
kind, floating-point operations against the model's own, collectives, a roofline of the step time,
images a second, and the largest batch of a chip that fits. Several topologies make a table:
--topology=v5e:4x4,v5p:2x2x1,v6e:2x4 (`*2` behind one: two slices). config.data.latents=X plans
for latents that are encoded before; X need not exist.

Exits with 1 where a program does not fit, and says what would make it fit.
"""

import itertools
import json
import pathlib
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from latent_diffusion_jax import build
from latent_diffusion_jax.config_checks import check_config
from latent_diffusion_jax.models.clip_text import PUBLISHED
from latent_diffusion_jax.planning import programs, report, search
from latent_diffusion_jax.planning.compiled import Compiled, compile_program
from latent_diffusion_jax.planning.topologies import open_topology
from latent_diffusion_jax.runtime import files, saved_programs, sharding
from latent_diffusion_jax.runtime.commands import run
from latent_diffusion_jax.runtime.errors import UserError, as_user_error

FLAGS = flags.FLAGS


def plan(
    config: ConfigDict,
    topology: str,
    name: str,
    *,
    num_labels: int = 1_000,
    dtype: str = "float32",
    searched: bool = True,
    save: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Plans one program of a config on one topology, and prints what there is to say.

    Args:
      config: of a run.
      topology: see `topologies.open_topology`.
      name: `first_stage`, `diffusion` or `sample`.
      num_labels: of the data, with conditioning "class".
      dtype: of `sample`, as its --dtype.
      searched: look for the largest batch, or for what would make it fit.
      save: folder that the compiled program is written to.

    Returns:
      The figures, see `report.as_row`.

    Raises:
      UserError: there is no such topology, or the config does not go with it.
    """
    devices, slices = open_topology(topology)

    def parts(config: ConfigDict) -> int:
        mesh = make_mesh(config, name, devices)
        return mesh.shape["data"] * mesh.shape["fsdp"]

    def compiled(config: ConfigDict, images: int, **options: bool) -> Compiled:
        mesh = make_mesh(config, name, devices)
        batch_size = images * mesh.shape["data"] * mesh.shape["fsdp"]
        with as_user_error("the config's parts do not fit together"):
            program = programs.make(config, name, mesh, batch_size, num_labels, dtype)
        return compile_program(program, slices, **options)

    def attempt(config: ConfigDict, images: int) -> Compiled:
        return compiled(config, images, with_cost=False)

    images = images_of_chip(config, name, make_mesh(config, name, devices))
    found = compiled(config, images, to_run=save is not None)
    print(report.describe(topology, found), flush=True)
    whole = None
    if searched and found.memory.fits:
        count = 1 if name == programs.SAMPLE else _section(config, name).accumulation
        largest = search.largest_batch(config, images, found, attempt, count)
        more = " or more" if largest + count > search.MOST else ""
        whole = largest * parts(config)
        each = f"{whole / slices.num_chips:g} a chip"
        print(f"  the largest batch that fits: {whole} images, {each}{more}", flush=True)
    elif searched:
        change = search.changes_that_fit(config, name, images, slices, attempt, parts)
        if change is None:
            tried = "fewer images"
            if name != programs.SAMPLE:
                tried = f"mesh.fsdp, accumulation, remat={'/'.join(search.STRONGER)}, {tried}"
            print(f"  nothing that was tried makes it fit: {tried}", flush=True)
        else:
            total = change[1].total / report.GIB
            print(f"  it fits with {change[0]} ({total:.2f} GiB)", flush=True)
    if save is not None and found.executable is not None:
        _save(found, save / topology.replace(":", "_").replace("*", "_") / name)
    return report.as_row(topology, found, whole)


def make_mesh(config: ConfigDict, name: str, devices: list[Any]) -> Mesh:
    """The mesh that a program runs on; UserError where it does not go with the devices."""
    if name == programs.SAMPLE:
        return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
    return sharding.make_mesh(dict(config.mesh), devices)


def check_topology(config: ConfigDict, topology: str, names: list[str]) -> None:
    """Raises UserError where a topology does not go with a config, before anything is compiled."""
    devices, _ = open_topology(topology)
    for name in names:
        images_of_chip(config, name, make_mesh(config, name, devices))


def images_of_chip(config: ConfigDict, name: str, mesh: Mesh) -> int:
    """How many images of a call a chip has; those along the axis `tensor` have the same ones.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    if name == programs.SAMPLE:
        return config.sample.batch_size
    section = _section(config, name)
    key = "first_stage.batch_size" if name == "first_stage" else "batch_size"
    if section.accumulation > 1:
        key += " / accumulation"
    sharding.check_batch_size(section.batch_size // section.accumulation, mesh, key)
    return section.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])


def _section(config: ConfigDict, name: str) -> ConfigDict:
    return config.first_stage if name == "first_stage" else config


def _save(found: Compiled, path: pathlib.Path) -> None:
    """Writes a compiled program, and its text for whoever wants to know more."""
    size = saved_programs.save(path, found.lowered, found.executable)
    try:
        path.with_suffix(".txt").write_text(found.text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(f"  compiled program: {path}, {size / report.GIB * 1024:.1f} MiB", flush=True)


def _write(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check(config: ConfigDict) -> None:
    """Raises UserError where the config contradicts itself; no weights or data are needed."""
    config = config.copy_and_resolve_references()
    with as_user_error("the config does not fit the networks"):
        if "clip" in config and not config.clip.path:
            config.clip.path = "not needed for plans"
        check_config(config)
    if "clip" in config and config.clip.model not in PUBLISHED:
        raise UserError(f"unknown clip.model {config.clip.model!r}; known: {', '.join(PUBLISHED)}")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, then overrides.")
    flags.DEFINE_list("topology", None, "TPUs to plan for, such as v5e:4x4,v5p:2x2x1.")
    flags.DEFINE_list("programs", None, "Of first_stage, diffusion, sample; default all there are.")
    flags.DEFINE_integer("num_labels", 1_000, "Of the data, with conditioning 'class'.")
    flags.DEFINE_enum("dtype", "float32", sorted(build.DTYPES), "Of sample, as its --dtype.")
    flags.DEFINE_bool("search", True, "Look for the largest batch, or for what makes it fit.")
    flags.DEFINE_string("save", None, "Folder for compiled programs, TOPOLOGY/PROGRAM.")
    flags.DEFINE_string("json", None, "File that all figures are written to.")
    flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # the compiler alone is asked for TPUs
    config = FLAGS.config
    check(config)
    known = [*config.stages, *([programs.SAMPLE] if "diffusion" in config.stages else [])]
    names = FLAGS.programs or known
    for name in names:
        if name not in known:
            raise UserError(f"--programs={name}: this config has {', '.join(known)}")
    for topology in FLAGS.topology:
        check_topology(config, topology, names)
    save = pathlib.Path(FLAGS.save).expanduser() if FLAGS.save else None
    if save is not None:
        files.check_folder(save, f"--save={FLAGS.save}")
    if FLAGS.json:
        files.check_file(pathlib.Path(FLAGS.json).expanduser(), f"--json={FLAGS.json}")
    rows: list[dict[str, Any]] = []
    for topology, name in itertools.product(FLAGS.topology, names):
        row = plan(
            config,
            topology,
            name,
            num_labels=FLAGS.num_labels,
            dtype=FLAGS.dtype,
            searched=FLAGS.search,
            save=save,
        )
        rows.append(row)
        if FLAGS.json:  # after each one, as they may take an hour
            _write(rows, pathlib.Path(FLAGS.json).expanduser())
    if len(rows) > 1:
        print("\n" + report.markdown(rows))
    if not all(row["fits"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    define_flags()
    run(main, alone=True)
