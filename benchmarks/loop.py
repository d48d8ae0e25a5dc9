r"""What the training loop costs beside its train steps, and how long it waits for data.

  python benchmarks/loop.py [--steps=400] [--rounds=3] [--out=benchmarks/results/loop.json]

Both stages of configs/txt2img.py's digits. On one side the program as `train` runs it: steps that
are not finite are kept out, figures looked at and logged, signals and other processes asked,
checkpoints written, every 200 steps, with the digests of all arrays. On the other the bare step:
the same function, compiled alone, on the same batches, and nothing else. They take turns, a round
each, in one process.
"""

import argparse
import itertools
import json
import logging
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
from side_by_side import describe_machine

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import txt2img
from latent_diffusion_jax import build, conditions, first_stages
from latent_diffusion_jax.data import pipeline
from latent_diffusion_jax.runtime import checkpoints, sharding
from latent_diffusion_jax.runtime.compilation import compiler_options, use_persistent_cache
from latent_diffusion_jax.runtime.memory import keep_freed_memory
from latent_diffusion_jax.train import train

STAGES = ("first_stage", "diffusion")


def section(config: Any, name: str) -> Any:
    return config.first_stage if name == "first_stage" else config


def bare_steps(config: Any, name: str, workdir: pathlib.Path) -> Any:
    """(number of steps) -> seconds of each, by the stage's own step alone."""
    mesh = sharding.make_mesh(dict(config.mesh))
    train_source, _ = build.data_sources(config)
    frozen, host_half = None, None
    if name == "first_stage":
        stage = build.first_stage(config)
    else:
        parts = conditions.restore(config, workdir)
        host_half = parts.host_half(config)
        stage = build.second_stage(config, parts.network(config), host_half)
        frozen = first_stages.load_frozen(config, workdir, mesh)
    batch_size = section(config, name).batch_size
    loader = pipeline.train_loader(
        train_source,
        build.example_maker(config, host_half) if host_half else build.example_maker(config),
        batch_size=batch_size,
        seed=1,
        rows=range(batch_size),
        num_threads=config.data.num_threads,
    )
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        state = jax.jit(stage.init)(key).replace(frozen=frozen)
    shardings = sharding.state_sharding(state, mesh)
    everywhere = sharding.replicated(mesh)
    step = jax.jit(
        stage.train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    kept = [jax.device_put(state, shardings)]

    def run(count: int) -> list[float]:
        state, metrics, times = kept.pop(), None, []
        batch = sharding.put_batch(next(loader), mesh, batch_size)
        with jax.set_mesh(mesh):
            for _ in range(count):
                start = time.perf_counter()
                before = metrics
                state, metrics = step(state, batch, key)
                batch = sharding.put_batch(next(loader), mesh, batch_size)
                jax.block_until_ready(before)  # as the loop: one step is always on its way
                times.append(time.perf_counter() - start)
        jax.block_until_ready(state)
        kept.append(state)
        return times

    run(3)  # compiles
    return run


def loop_steps(config: Any, name: str, workdir: pathlib.Path, steps: int) -> tuple[float, float]:
    """Goes on with `train` for so many steps; (seconds of a step, share that waited for data)."""
    last = checkpoints.latest_step(workdir / name) or 0
    config = config.copy_and_resolve_references()
    config.stages = (name,)
    asked = itertools.count()  # before the stage, then after each step
    assert not train(config, workdir, lambda: next(asked) >= steps)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found = [
        row for row in rows if row["stage"] == name and row["step"] > last and "train/loss" in row
    ]
    seconds = [row["train/seconds_per_step"] for row in found][1:]  # the first has the start in it
    return statistics.mean(seconds), statistics.mean(row["train/waiting_for_data"] for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep_freed_memory()
    use_persistent_cache()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        for stage in STAGES:
            workdir = pathlib.Path(name) / stage
            config = txt2img.get_config("digits")
            config.log_every, config.eval_every = 20, 10**6
            config.first_stage.num_steps = 10**6 if stage == "first_stage" else 2
            config.num_steps = 10**6
            if stage == "diffusion":
                first = config.copy_and_resolve_references()
                first.stages = ("first_stage",)
                assert train(first, workdir)
            loop_steps(config, stage, workdir, 40)
            bare = bare_steps(config, stage, workdir)
            pairs, waits = [], []
            for _ in range(options.rounds):
                alone = statistics.mean(bare(options.steps))
                seconds, waited = loop_steps(config, stage, workdir, options.steps)
                pairs.append((seconds, alone))
                waits.append(waited)
            ratios = [seconds / alone for seconds, alone in pairs]
            rows[stage] = {
                "loop_seconds": [seconds for seconds, _ in pairs],
                "bare_seconds": [alone for _, alone in pairs],
                "ratio": statistics.median(ratios),
                "waiting_for_data": max(waits),
            }
            print(
                f"{stage}: a step of the loop takes {statistics.median(ratios):.3f} of the bare "
                f"one's {statistics.median(a for _, a in pairs):.4f} s "
                f"({', '.join(f'{ratio:.3f}' for ratio in ratios)}), and waits for data "
                f"{max(waits):.2%} of the time at most",
                flush=True,
            )
    if options.out:
        machine = describe_machine(len(os.sched_getaffinity(0)))
        report = {"machine": machine, "steps": options.steps, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
