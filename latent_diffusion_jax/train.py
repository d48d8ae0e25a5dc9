"""Trains the stages that a config names, in order, in one workdir.

  python -m latent_diffusion_jax.train --config=configs/txt2img.py --workdir=runs/digits

A stage whose last checkpoint is complete is skipped, one that was interrupted goes on where it
was. Overrides: --config.optimizer.learning_rate=1e-4; variants: --config=configs/txt2img.py:smoke.

Ctrl-C or SIGTERM finishes the step, saves, says how to go on and exits with 130 or 143.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from latent_diffusion_jax import (
    build,
    conditions,
    first_stages,
    starting_points,
    workdirs,
)
from latent_diffusion_jax.config_checks import STAGES, check_config
from latent_diffusion_jax.data.latents import LatentSource
from latent_diffusion_jax.data.pipeline import Examples
from latent_diffusion_jax.first_stages import FirstStage
from latent_diffusion_jax.models.autoencoder import ENCODER
from latent_diffusion_jax.runtime import (
    checkpoints,
    distributed,
    locks,
    loggers,
    processes,
    saved_programs,
    sharding,
    trees,
)
from latent_diffusion_jax.runtime.commands import StopRequest, run
from latent_diffusion_jax.runtime.compilation import use_persistent_cache
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.runtime.memory import keep_freed_memory
from latent_diffusion_jax.runtime.stopping import Stopped
from latent_diffusion_jax.training import autoencoder_stage, diffusion_stage, loop
from latent_diffusion_jax.training.keeper import Keeping
from latent_diffusion_jax.training.state import Stage, State

FLAGS = flags.FLAGS


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    should_stop: Callable[[], bool] = lambda: False,
    compiled: pathlib.Path | None = None,
) -> bool:
    """Trains all stages; False where `should_stop` ended it early, with everything saved.

    `compiled` is a folder of train steps that `plan --save` has written.

    Raises:
      UserError: the config, the data, the devices or the workdir do not fit, found before the
        first step; or training itself fails for a reason that can be put right.
    """
    if "://" in str(workdir):
        raise UserError(
            f"--workdir={workdir} is an address; give a folder. A bucket becomes one when it is "
            "mounted, see launch/README.md"
        )
    workdir = pathlib.Path(workdir).expanduser().absolute()
    for name in STAGES:
        if checkpoints.workdir_and_step(workdir, name)[0] != workdir:
            raise UserError(f"--workdir={workdir} is a checkpoint; give the folder of its run")
    with as_user_error("the config does not fit the networks"):
        check_config(config)
    mesh = sharding.make_mesh(dict(config.mesh))
    check_batch_sizes(config, mesh)
    distributed.meet(mesh)
    if not workdirs.stages_to_do(config, workdir)[1]:
        logging.info("all of %s is complete, nothing to do", workdir)  # also where it is read-only
        return True
    try:
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from error
    with locks.claimed(workdir) as check_claim:
        return _train(config, workdir, mesh, should_stop, compiled, check_claim)


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    should_stop: Callable[[], bool],
    compiled: pathlib.Path | None,
    check_claim: Callable[[], None],
) -> bool:
    as_json = json.loads(config.to_json())
    workdirs.check_first_stage(as_json, workdir)
    last, unfinished = workdirs.stages_to_do(config, workdir)
    for name in config.stages:
        if name not in unfinished:
            logging.info("%s: complete at step %d, nothing to do", name, last[name])
    if not unfinished:
        return True
    if compiled is not None:
        for name in unfinished:
            saved_programs.check(compiled / name)
    start = starting_points.autoencoder(config, workdir, unfinished, mesh)
    sources = open_sources(config, unfinished, start)
    if last.get("first_stage") and unfinished == ["diffusion"]:
        folder, ours = workdir / "first_stage", sources["diffusion"][0]
        theirs = checkpoints.read_json(folder, last["first_stage"], "info").get("source", {})
        if theirs.get("kind") == loop.described(ours)["kind"]:
            loop.check_same_data(theirs, ours, folder)

    # All stages are built, as shapes, before the first one is trained.
    stages: dict[str, Stage] = {}
    perceptual, parts, model, given = None, None, None, None
    with as_user_error("the config's parts do not fit together"):
        if "first_stage" in unfinished:
            perceptual = build.perceptual_params(config)
            stages["first_stage"] = build.first_stage(config)
        if "diffusion" in unfinished:
            model = starting_points.model(config, workdir)
            source = sources["diffusion"][0].records
            parts = conditions.make(config, workdir, source, model.tokenizer if model else None)
            stages["diffusion"] = build.second_stage(
                config, parts.network(config), parts.host_half(config)
            )
        root = jax.random.key(0)
        with jax.set_mesh(mesh):
            shapes = {name: jax.eval_shape(stage.init, root) for name, stage in stages.items()}
    if model is not None:
        trained = shapes["diffusion"].params
        given = starting_points.trained_params(trained, model, config.init_from)
        del model  # its other parts take memory

    if jax.process_index() == 0:
        checkpoints.write_json(workdir / "config.json", as_json)
    if processes.num_processes() > 1:
        use_persistent_cache(workdir / "compiled")  # which all of them see
    shared = loop.Run(
        workdir=workdir,
        mesh=mesh,
        train_source=sources[unfinished[0]][0],
        test_source=sources[unfinished[0]][1],
        config=as_json,
        should_stop=should_stop,
        check_claim=check_claim,
        seed=config.seed,
        num_threads=config.data.num_threads,
        log_every=config.log_every,
        eval_every=config.eval_every,
        eval_examples=config.eval_examples,
        checkpoint_every=config.checkpoint_every,
        keeping=Keeping(config.keep_checkpoints, config.keep_every),
        max_skipped_steps=config.max_skipped_steps,
        profile=(config.profile.after, config.profile.steps),
        compiled=compiled,
    )
    log_summary(shared, config, shapes)
    with contextlib.suppress(Stopped):  # which is said below
        if start is not None and "first_stage" not in unfinished:
            adopt_first_stage(shared, config, start)
    for name in unfinished:
        if processes.highest(should_stop()):
            logging.info("stopped before the stage %s; the same command goes on from there", name)
            return False
        if name == "first_stage":
            finished = train_first_stage(shared, config, stages[name], perceptual, start)
        else:
            assert parts is not None
            train_source, test_source = sources[name]
            shared = dataclasses.replace(shared, train_source=train_source, test_source=test_source)
            finished = train_diffusion(shared, config, stages[name], parts, given)
        if not finished:
            return False
    logging.info("done: checkpoints and config in %s, scalars in metrics.jsonl there,", workdir)
    logging.info("scalars and pictures: tensorboard --logdir=%s/tensorboard", workdir)
    return True


def check_batch_sizes(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where the mesh does not divide a stage's batch."""
    if "first_stage" in config.stages:
        first, key = config.first_stage, "first_stage.batch_size"
        if first.accumulation > 1:
            key += " / first_stage.accumulation"
        sharding.check_batch_size(first.batch_size // first.accumulation, mesh, key)
    if "diffusion" in config.stages:
        key = "batch_size / accumulation" if config.accumulation > 1 else "batch_size"
        sharding.check_batch_size(config.batch_size // config.accumulation, mesh, key)


def log_summary(shared: loop.Run, config: ConfigDict, shapes: dict[str, State]) -> None:
    devices = jax.devices()
    axes = ", ".join(f"{axis} {size}" for axis, size in shared.mesh.shape.items())
    logging.info("workdir: %s; stages: %s", shared.workdir, ", ".join(config.stages))
    logging.info(
        "devices: %d x %s, %d process(es); mesh: %s",
        *(len(devices), devices[0].device_kind, jax.process_count(), axes),
    )
    encoded = isinstance(shared.train_source, LatentSource)
    data_name = f"latents in {config.data.latents}" if encoded else config.data.name
    logging.info(
        "data: %s, %dx%d pixels; %d images to train on, %d held out, %d found damaged",
        *(data_name, config.data.image_size, config.data.image_size),
        *(len(shared.train_source), len(shared.test_source)),
        len(shared.train_source.damaged) + len(shared.test_source.damaged),
    )
    for name, state in shapes.items():
        batch = (config.first_stage if name == "first_stage" else config).batch_size
        counts = ", ".join(f"{key} {trees.count(part):,}" for key, part in state.params.items())
        logging.info("%s: batch %d; parameters: %s", name, batch, counts)


def open_sources(
    config: ConfigDict, unfinished: list[str], start: FirstStage | None
) -> dict[str, tuple[Examples, Examples]]:
    """The training and the held-out examples of each stage that is not complete.

    Args:
      config: of the run.
      unfinished: those stages.
      start: what `starting_points.autoencoder` gave.

    Raises:
      UserError: they cannot be read, or `data.latents` cannot be this run's first stage's.
    """
    sources: dict[str, tuple[Examples, Examples]] = {}
    folder = config.data.latents
    if folder and "diffusion" in unfinished:
        if "first_stage" in unfinished and config.first_stage.trained == "all":
            raise UserError(
                f"data.latents={folder!r} are of a first stage that is trained already, this "
                "run's is not: train it alone (stages=('first_stage',)) and encode with it, or "
                "let first_stage.init_from name the one that encoded, with stages=('diffusion',)"
            )
        latents = build.latent_sources(config)
        if start is not None:
            first_stages.check_encoded_by(start.params, latents[0].index, folder)
        sources["diffusion"] = latents
    missing = [name for name in unfinished if name not in sources]
    return sources | (dict.fromkeys(missing, build.data_sources(config)) if missing else {})


def adopt_first_stage(shared: loop.Run, config: ConfigDict, start: FirstStage) -> None:
    """Puts a first stage from elsewhere into the workdir, with the scale of its latents."""
    scale = start.scale_factor
    if scale is None:
        source, mesh = shared.train_source, shared.mesh
        scale = first_stages.measure_scale(
            config, source, mesh, start.network, start.params, shared.should_stop
        )
    first_stages.adopt(config, shared.workdir, start.params, scale)


def train_first_stage(
    shared: loop.Run, config: ConfigDict, stage: Stage, perceptual: Any, start: FirstStage | None
) -> bool:
    """Trains the autoencoder, then measures the scale of its latents.

    `perceptual` is what `build.perceptual_params` gave, `start` is where it starts from.
    """
    section, network = config.first_stage, build.autoencoder(config)
    notes = {}
    if start is not None and section.trained == "decoder" and start.scale_factor is not None:
        notes["scale_factor"] = start.scale_factor  # the latents are the same
    depends_on = {}
    if perceptual is not None:
        depends_on["set of LPIPS weights"] = first_stages.fingerprint({"lpips": perceptual})

    def at_start(state: State) -> State:
        return state if start is None else autoencoder_stage.start_from(state, start.params)

    def at_end(state: State, notes: Mapping[str, Any]) -> dict[str, Any]:
        if "scale_factor" in notes:
            return {"scale_factor": notes["scale_factor"]}
        params = (state.ema or state.params)["autoencoder"]
        scale = first_stages.measure_scale(
            config, shared.train_source, shared.mesh, network, params, shared.should_stop
        )
        return {"scale_factor": scale}

    return loop.train_stage(
        shared,
        "first_stage",
        stage,
        build.example_maker(config),
        batch_size=section.batch_size,
        num_steps=section.num_steps,
        frozen=processes.put(perceptual, sharding.replicated(shared.mesh)),
        depends_on=depends_on,
        at_start=at_start,
        notes=notes,
        at_end=at_end,
        keep_best=section.keep_best,
        offloads=section.autoencoder.remat == "offload",
    )


def train_diffusion(
    shared: loop.Run,
    config: ConfigDict,
    stage: Stage,
    parts: conditions.Parts,
    given: dict[str, Any] | None,
) -> bool:
    """Trains the UNet, and the conditioner where that is not frozen.

    Where `data.latents` has the images encoded, the encoder's parameters are not kept in memory.

    Args:
      shared: what all stages share.
      config: of the run.
      stage: what `build.second_stage` gave.
      parts: of the condition.
      given: what `starting_points.trained_params` gave, where there is a model to start from.
    """
    frozen: dict[str, Any] = {}
    depends_on: dict[str, Any] = {}
    if "first_stage" in config:
        frozen = first_stages.load_frozen(config, shared.workdir, shared.mesh)
        depends_on = {
            "first stage's encoder": first_stages.encoder_fingerprint(frozen["autoencoder"]),
            "scale_factor": float(processes.fetch(frozen["scale_factor"])),
        }
    if isinstance(shared.train_source, LatentSource):
        index = shared.train_source.index
        first_stages.check_encoded_by(frozen["autoencoder"], index, config.data.latents)
        decoder = frozen["autoencoder"].items()
        frozen["autoencoder"] = {k: v for k, v in decoder if k not in ENCODER}
    if parts.clip is not None:
        if jax.process_index() == 0:
            conditions.adopt_clip(shared.workdir, parts)
        shardings = sharding.state_sharding(parts.clip.params, shared.mesh)
        frozen["conditioner"] = processes.put(parts.clip.params, shardings)

    def at_start(state: State) -> State:
        if given is None:
            return state
        started = diffusion_stage.start_from(state, given)
        given.clear()  # takes memory
        return started

    return loop.train_stage(
        shared,
        "diffusion",
        stage,
        build.example_maker(config, parts.host_half(config)),
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        frozen=frozen,
        kept=parts.items(),
        depends_on=depends_on,
        at_start=at_start,
        keep_best=config.keep_best,
        offloads=config.unet.remat == "offload",
    )


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, then overrides.")
    flags.DEFINE_string("workdir", None, "Folder of checkpoints and logs.")
    flags.DEFINE_string("compiled", None, "Folder of train steps compiled by `plan --save`.")
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    keep_freed_memory()
    loggers.set_up_logging()
    with StopRequest(FLAGS.config.get("grace_seconds", 0.0)) as stop:
        compiled = pathlib.Path(FLAGS.compiled).expanduser() if FLAGS.compiled else None
        finished = train(FLAGS.config, FLAGS.workdir, stop, compiled)
    status = processes.highest(stop.exit_status)  # a signal may have reached one process
    sys.exit(0 if finished else status)


if __name__ == "__main__":
    define_flags()
    run(main)
