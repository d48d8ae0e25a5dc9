"""The training loop, the same for every stage."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.data.latents import LatentSource
from latent_diffusion_jax.runtime import (
    images,
    loggers,
    processes,
    saved_programs,
    sharding,
)
from latent_diffusion_jax.runtime.compilation import compiler_options, offload_options
from latent_diffusion_jax.runtime.errors import DataError, UserError
from latent_diffusion_jax.runtime.flops import traced_flops
from latent_diffusion_jax.runtime.stopping import Stopped
from latent_diffusion_jax.training import batches
from latent_diffusion_jax.training.alarms import Alarms
from latent_diffusion_jax.training.keeper import Keeping, open_keeper
from latent_diffusion_jax.training.skipped import SkippedSteps, finite
from latent_diffusion_jax.training.speed import Profile, Speed
from latent_diffusion_jax.training.state import Stage, State, jit_train_step

PREVIEW_IMAGES, PREVIEW_COLUMNS = 32, 8


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of a run share.

    Attributes:
      workdir: folder of checkpoints and logs.
      mesh: the devices.
      train_source: what to train on.
      test_source: what is held out.
      config: the whole config as JSON values, kept in checkpoints.
      should_stop: asked after every step.
      check_claim: raises StorageError where the workdir is not this run's any more.
      seed: of weights, noise and the data's order.
      num_threads: that read and decode images.
      log_every: steps.
      eval_every: steps between figures and pictures of held-out data.
      eval_examples: held-out examples to use.
      checkpoint_every: steps.
      keeping: which checkpoints of each stage stay.
      max_skipped_steps: in a row; one more stops the run.
      profile: steps of a trace for XProf: the first after the start of a run, and their number.
      compiled: folder of train steps that were compiled elsewhere, by the stages' names.
    """

    workdir: pathlib.Path
    mesh: Mesh
    train_source: pipeline.Examples
    test_source: pipeline.Examples
    config: dict[str, Any]
    should_stop: Callable[[], bool]
    check_claim: Callable[[], None]
    seed: int
    num_threads: int
    log_every: int
    eval_every: int
    eval_examples: int
    checkpoint_every: int
    keeping: Keeping = dataclasses.field(default_factory=Keeping)
    max_skipped_steps: int = 0
    profile: tuple[int, int] = (0, 0)
    compiled: pathlib.Path | None = None


def train_stage(
    run: Run,
    name: str,
    stage: Stage,
    prepare: pipeline.Prepare,
    *,
    batch_size: int,
    num_steps: int,
    frozen: Any = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
    depends_on: Mapping[str, Any] = MappingProxyType({}),
    at_start: Callable[[State], State] = lambda state: state,
    notes: Mapping[str, Any] = MappingProxyType({}),
    at_end: Callable[[State, Mapping[str, Any]], dict[str, Any]] = lambda state, notes: {},
    keep_best: str = "",
    offloads: bool = False,
) -> bool:
    """Trains one stage to its end, from its last checkpoint where there is one.

    Args:
      run: what all stages share.
      name: of the stage: its folder of checkpoints and its name in the logs.
      stage: its functions.
      prepare: record -> example.
      batch_size: of the global batch.
      num_steps: updates in all.
      frozen: parameters that the step reads and does not train.
      kept: JSON items to keep in every checkpoint, such as its `tokenizer`.
      depends_on: JSON values that checkpoints are refused by where they were others.
      at_start: fresh state -> the state to start from, of the same shapes and shardings; not
        asked where there is a checkpoint.
      notes: JSON values of the start, which checkpoints keep.
      at_end: (final state, notes) -> what to keep in the last checkpoint's `info`; may raise
        Stopped.
      keep_best: see `Keeping.best`.
      offloads: whether its train step lets activations wait in the host's memory.

    Returns:
      Whether it reached its end; False where `run.should_stop` ended it, with everything saved.

    Raises:
      UserError: a checkpoint does not fit, or too many steps were skipped.
      DataError: examples cannot be read any more; what was learned is saved.
      StorageError: a checkpoint could not be saved.
    """
    mesh = run.mesh
    init_key, train_key, eval_key, preview_key = jax.random.split(jax.random.key(run.seed), 4)

    # The state as shapes, then where each leaf lies, then the arrays.
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(stage.init, init_key)
    shardings = sharding.state_sharding(shapes, mesh)
    loader = pipeline.train_loader(
        run.train_source,
        prepare,
        batch_size=batch_size,
        seed=run.seed,
        rows=sharding.own_rows(batch_size, mesh),
        num_threads=run.num_threads,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        stack.enter_context(jax.set_mesh(mesh))  # that constraints inside the step are meant for
        keeping = dataclasses.replace(run.keeping, best=keep_best, regular=run.checkpoint_every)
        keeper = stack.enter_context(open_keeper(run.workdir / name, keeping))
        start_step = keeper.last()
        processes.agreed({f"the last checkpoint of {name}": start_step})
        info: dict[str, Any] = {}
        if start_step:
            state, position, info = keeper.restore(shapes, shardings)
            check_same_data(info.get("source", {}), run.train_source, run.workdir / name)
            check_same_parts(info.get("depends_on", {}), depends_on, run.workdir / name)
            loader.set_state(position)
            notes = info.get("notes", {})
            logging.info("%s: goes on from step %d", name, start_step)
        else:
            # In a function of its own, as the compiled program lives as long as that; what it calls
            # was traced for the shapes already.
            init = jax.jit(lambda key: jax.jit(stage.init)(key), out_shardings=shardings)
            state = at_start(init(init_key))
            del init
        state = dataclasses.replace(state, frozen=frozen)

        everywhere, options = sharding.replicated(mesh), compiler_options()
        state_shardings = jax.tree.map(lambda x: x.sharding, state)
        further = offload_options(jax.default_backend()) if offloads else {}
        train_step = jit_train_step(stage, state_shardings, mesh, options | further)
        eval_step, preview = (
            jax.jit(function, out_shardings=everywhere, compiler_options=options)
            for function in (stage.eval_step, stage.preview)
        )

        is_main = jax.process_index() == 0
        writer = loggers.RunWriter(run.workdir, name, start_step, is_main)
        stack.callback(writer.close)
        progress = loggers.Progress(name, start_step, num_steps, is_main)
        stack.callback(progress.close)

        def evaluate(step: int) -> bool:
            """Figures and pictures of held-out data; whether it came to its end."""
            totals: dict[str, float] = {}
            first, count = None, 0
            try:
                for batch, valid in batches.in_order(
                    *(run.test_source, prepare, mesh, batch_size, run.eval_examples),
                    run.should_stop,
                ):
                    first = batch if first is None else first
                    for metric, values in eval_step(state, batch, eval_key).items():
                        total = float(np.asarray(values)[:valid].sum())
                        totals[metric] = totals.get(metric, 0.0) + total
                    count += valid
            except Stopped:
                return False
            figures = {metric: total / count for metric, total in totals.items()}
            writer.scalars(step, finite(figures), "test")
            keeper.evaluated(step, figures)
            shown = ", ".join(f"{metric} {value:.4g}" for metric, value in figures.items())
            logging.info("%s: step %d, held out: %s", name, step, shown)
            if processes.highest(run.should_stop()):  # pictures may take long
                return True
            pictures = images.to_uint8(np.asarray(preview(state, first, preview_key)))
            grid = images.grid(pictures[:PREVIEW_IMAGES], PREVIEW_COLUMNS)
            writer.image(step, "preview", grid)
            return True

        def save(step: int, info: dict[str, Any]) -> None:
            info |= {
                "source": described(run.train_source),
                "depends_on": dict(depends_on),
                "notes": dict(notes),
                "skipped_since": skipped.since,
            }
            items = {"data": ahead.position, "config": run.config, "info": info, **kept}
            run.check_claim()
            keeper.save(step, state, items)

        def with_the_way_on(error: UserError) -> UserError:
            keeper.wait()
            return type(error)(f"{error}; the same command goes on from step {keeper.last()}")

        @contextlib.contextmanager
        def reading() -> Iterator[None]:
            """Examples that cannot be read end the run when what was saved is whole."""
            try:
                yield
            except UserError as error:
                raise with_the_way_on(error) from error

        ahead = batches.Ahead(
            loader,
            lambda rows: sharding.put_batch(rows, mesh, batch_size),
            count=num_steps - start_step,
            spare=0 if processes.num_processes() == 1 else processes.STEPS_TO_STOP,
        )
        traced = train_step.trace(state, ahead.batch, train_key)
        speed = Speed(batch_size, traced_flops(traced.jaxpr), mesh)
        lowered = traced.lower()
        if run.compiled is None:
            logging.info("%s: compiling the train step", name)
            compiled = lowered.compile()
        else:
            path, devices = run.compiled / name, list(mesh.devices.flat)
            compiled = saved_programs.load(path, lowered, devices)
            logging.info("%s: the train step is that of %s", name, path)
        del traced, lowered
        profile = Profile(run.workdir / "profile" / name, run.profile, start_step)
        stack.callback(profile.close)
        step, stopped = start_step, False
        length, seed = len(run.train_source), run.seed
        skipped = SkippedSteps(
            *(name, batch_size, run.max_skipped_steps),
            lambda samples: pipeline.records_of(samples, length, seed),
            info.get("skipped_since"),
        )
        alarms = Alarms(name)
        unread: list[tuple[int, dict[str, jax.Array]]] = []  # figures of the last steps

        def read() -> None:
            figures = jax.device_get(unread)
            unread.clear()
            skipped.look(figures)
            alarms.look(figures)

        def finish(step: int, metrics: dict[str, jax.Array]) -> None:
            """Waits for a step, whose figures are logged when it is their turn."""
            jax.block_until_ready(metrics)
            unread.append((step, metrics))
            if step % run.log_every and step != num_steps:
                return
            read()
            figures = finite({key: float(value) for key, value in metrics.items()})
            figures["skipped"], skipped.count = float(skipped.count), 0
            measured = speed.measure(step)
            writer.scalars(step, figures | measured, "train")
            rate, seconds = measured["images_per_second"], measured["seconds_per_step"]
            progress.figures(step, figures.get("loss", math.nan), rate, seconds)

        running: list[tuple[int, dict[str, jax.Array]]] = []  # steps that devices work on

        def finish_steps(but: int = 0) -> None:
            while len(running) > but:
                finish(*running.pop(0))

        if 0 < step < num_steps and step % run.eval_every == 0:
            # A run that was ended between a checkpoint and its evaluation does it now.
            known = keeper.has_score(step) if keep_best else writer.has(step, "test")
            if processes.highest(is_main and not known):
                with reading():
                    stopped = not evaluate(step)
        speed.restart(step)
        while step < num_steps and not stopped:
            with profile.step(step, running[-1] if running else None):
                state, metrics = compiled(state, ahead.batch, train_key)
            step += 1
            running.append((step, metrics))
            speed.waited += ahead.advance()
            keeper.check()
            finish_steps(but=1)
            progress.step(step)
            stopped = agree_to_stop(run.should_stop() or ahead.error is not None, name, step)
            evaluates = (step == num_steps or step % run.eval_every == 0) and not stopped
            # What takes long comes after a save. The last step's own is its evaluation's, and the
            # end of the stage's; a run that is ended there makes it again.
            saves = step < num_steps and (
                stopped or evaluates or step % run.checkpoint_every == 0 or step == num_steps - 1
            )
            if saves or evaluates:
                finish_steps()
            if saves:
                read()
                save(step, {})
            if evaluates:
                with reading():
                    stopped = not evaluate(step)
                speed.restart(step)
        if not stopped:
            try:
                with reading():
                    info = at_end(state, notes)
                save(step, info)
            except Stopped:
                stopped = True
        keeper.wait()
        if ahead.error is not None:
            if isinstance(ahead.error, DataError) and run.should_stop():
                logging.warning("%s: %s", name, ahead.error)
            elif isinstance(ahead.error, UserError):
                raise with_the_way_on(ahead.error) from ahead.error
            else:
                raise ahead.error
        if stopped:
            logging.info(
                "%s: stopped and saved at step %d of %d; the same command goes on from there",
                *(name, keeper.last(), num_steps),
            )
    return not stopped


def agree_to_stop(wanted: bool, name: str, step: int) -> bool:
    """Whether to stop stage `name` after this step; all processes stop after the same one."""
    if processes.num_processes() == 1:
        return wanted
    return processes.agree_to_stop(name, wanted, step)


def described(source: pipeline.Examples) -> dict[str, Any]:
    """What of a source the order of a run's samples depends on, as JSON values."""
    kind = "latents" if isinstance(source, LatentSource) else "images"
    return {"kind": kind, "records": len(source), "identity": source.identity}


def check_same_data(theirs: Mapping[str, Any], source: pipeline.Examples, folder: Any) -> None:
    """Raises UserError where a run would go on with other data than it began with.

    The order of samples goes by the number of records: others would come twice, or not at all.
    Images and the latents made of them have the same order, and identities of their own.

    Args:
      theirs: what `described` gave when the checkpoint was written; nothing in old ones.
      source: the data now.
      folder: of the checkpoints.
    """
    ours = described(source)
    compared = ["records", *(["identity"] if theirs.get("kind") == ours["kind"] else [])]
    different = [
        f"{key}: {theirs[key]} then, {ours[key]} now"
        for key in compared
        if key in theirs and theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"the data are not those that the run in {folder} began with ({'; '.join(different)}): "
            "give it those, or begin another run with these (--workdir, init_from)"
        )


def check_same_parts(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Any) -> None:
    """Raises UserError where a stage would go on with other parts than it was trained with.

    Args:
      theirs: what it depended on when the checkpoint was written; nothing in old ones.
      ours: now.
      folder: of the checkpoints.
    """
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            raise UserError(
                f"the checkpoints in {folder} were trained with another {key} "
                f"({str(theirs[key])[:12]}) than this run has ({str(value)[:12]}): give it that "
                "one back, or begin another run with this one (--workdir, init_from)"
            )
