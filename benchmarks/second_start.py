r"""How long a run takes from the first import to the program that the compile cache is asked for.

  python benchmarks/second_start.py [--config=stable_diffusion] [--topology=v5e:4x4]
      [--out=benchmarks/results/second_start.json]

That is what a second start does before it has its train step, whatever the devices are: shapes of
the state, tracing, lowering, and the hash by which a compiled program is looked up. Each round is a
process of its own. What TPUs take to load a program that was found cannot be measured without them.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROUND = "--one-round"


def one_round(config_name: str, topology: str) -> dict[str, float]:
    """Seconds of each part, from the start of this process on."""
    marks = [("imports", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    import gc

    import jax

    from latent_diffusion_jax import plan, train
    from latent_diffusion_jax.planning import programs
    from latent_diffusion_jax.planning.topologies import open_topology

    gc.set_threshold(50_000, 20, 20)  # as all commands do
    jax.config.update("jax_platforms", "cpu")
    config = __import__(f"configs.{config_name}", fromlist=["x"]).get_config()
    if "clip" in config:
        config.clip.path = "not needed"
    mark("shapes of the state")
    devices, _ = open_topology(topology)
    mesh = plan.make_mesh(config, "diffusion", devices)
    program = programs.make(config, "diffusion", mesh, config.batch_size, num_labels=1000)
    mark("tracing")
    traced = program.trace()
    program.model_flops(traced)  # which the loop logs
    mark("lowering")
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    mark("hash")
    hash(lowered.compiler_ir("stablehlo").operation.get_asm(enable_debug_info=False))
    end = time.perf_counter()
    assert train  # its imports are part of a start
    ends = [at for _, at in marks[1:]] + [end]
    return {name: after - at for (name, at), after in zip(marks, ends, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="stable_diffusion")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument(ROUND, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = pathlib.Path(__file__).parents[1]
    if options.one_round:
        sys.path.insert(0, str(root))
        print(json.dumps(one_round(options.config, options.topology)))
        return
    rounds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, ROUND, f"--config={options.config}",
             f"--topology={options.topology}"],
            stdout=subprocess.PIPE, text=True, check=True, cwd=root,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
        rounds[-1]["all, Python's own start and end too"] = time.perf_counter() - start
    for name in rounds[0]:
        times = [found[name] for found in rounds]
        print(f"{name}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")
    if options.out:
        from side_by_side import describe_machine

        report = {"machine": describe_machine(len(os.sched_getaffinity(0)))}
        report |= {"config": options.config, "topology": options.topology, "rounds": rounds}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
