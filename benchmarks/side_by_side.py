"""Both sides of a benchmark in turns: measuring, comparing, and the table of what was found."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cases import VARIANTS
from child import Child

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is measured, and by which scripts.

    Attributes:
      title: of the table.
      note: begins the explanation below the table.
      cases: by name; each has `task`, `tolerance` and `variants`, PyTorch's ways to run it.
      default_cases: names of those that run where none are asked for.
      ours, theirs: scripts of the sides. `theirs` also writes what both share, as the variant
        `shared`, and `ours` the random numbers of a train step, as `noise`.
    """

    title: str
    note: str
    cases: Mapping[str, Any]
    default_cases: Sequence[str]
    ours: str
    theirs: str


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, memory and versions; nothing that names the machine."""
    processor = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text("utf-8").splitlines())
        named = [value.strip() for key, _, value in lines if key.strip() == "model name"]
        processor = named[0] if named else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def disagreement(a: pathlib.Path, b: pathlib.Path, task: str) -> dict[str, float]:
    """Largest difference of the saved results, relative to the largest value.

    Of a train step's losses the first ones tell whether both sides compute the same; after a few
    updates by Adam, which makes steps of one size of gradients of any, rounding has grown: `drift`.
    """
    ours, theirs = (np.load(path)["outputs"] for path in (a, b))
    if task != "train":
        return {"error": float(np.abs(ours - theirs).max() / np.abs(theirs).max())}
    by_step = (np.abs(ours - theirs) / np.abs(theirs)).max(axis=1)
    return {"error": float(by_step[0]), "drift": float(by_step[-1])}


def measure(
    benchmark: Benchmark, name: str, runs: int, threads: int, variants: Sequence[str]
) -> dict[str, Any]:
    """Times, peak memory and disagreement of one case: {variant: {...}}, `ours` among them."""
    case = benchmark.cases[name]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = pathlib.Path(folder_name)

        def start(script: str, variant: str) -> Child:
            arguments = [name, folder_name, variant, str(threads)]
            return Child(script, arguments, folder / f"{variant}.log")

        start(benchmark.theirs, "shared").close()
        if case.task == "train":
            start(benchmark.ours, "noise").close()
        sides, results = {}, {}
        for variant in ("ours", *(variant for variant in variants if variant in case.variants)):
            script = benchmark.ours if variant == "ours" else benchmark.theirs
            try:
                sides[variant] = start(script, variant)
            except RuntimeError as error:
                if variant != "compile":  # which needs a C++ compiler
                    raise
                results[variant] = {"failed": str(error)}
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in sides}
        for _ in range(runs):
            for variant, side in sides.items():
                times[variant].append(side.run())
        for variant, side in sides.items():
            seconds, cpu_seconds = zip(*times[variant], strict=True)
            results[variant] = {
                "seconds": seconds,
                "min": min(seconds),
                "median": statistics.median(seconds),
                "cpu_seconds": cpu_seconds,
                "cpu_min": min(cpu_seconds),
                **side.facts,
            }
            side.close()
            if variant != "ours":
                results[variant] |= disagreement(
                    folder / "ours.npz", folder / f"{variant}.npz", case.task
                )
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each case and side; ratios are our time to theirs."""
    rows = [
        "| case | side | s, min | s, median | CPU s, min | ours/theirs: min | median | CPU "
        "| peak memory, MiB | relative error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, sides in results.items():
        ours = sides["ours"]
        for side, found in sides.items():
            if "failed" in found:
                rows.append(f"| {case} | {side} | failed | | | | | | | |")
                continue
            peak = found["device_peak_mib"] or found["peak_rss_mib"]
            keys = ("min", "median", "cpu_min")
            times = " | ".join(f"{found[key]:.3f}" for key in keys)
            ratios, error = " | | ", ""
            if side != "ours":
                ratios = " | ".join(f"{ours[key] / found[key]:.2f}" for key in keys)
                error = f"{found['error']:.0e}"
            rows.append(f"| {case} | {side} | {times} | {ratios} | {peak:.0f} | {error} |")
    return "\n".join(rows)


def main(benchmark: Benchmark, description: str) -> int:
    """The command line; the status to exit with."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = benchmark.cases
    parser.add_argument("--cases", nargs="+", choices=cases, default=benchmark.default_cases)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--runs", type=int, default=5, help="turns of each side after warming up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="file to write, without its suffix; default: only print")
    arguments = parser.parse_args()

    results, wrong = {}, []
    for name in arguments.cases:
        results[name] = measure(
            benchmark, name, arguments.runs, arguments.threads, arguments.variants
        )
        print(table({name: results[name]}), flush=True)
        for variant, found in results[name].items():
            if not found.get("error", 0.0) <= cases[name].tolerance:  # NaN too
                wrong.append(f"{name}: ours and PyTorch ({variant}) differ by {found['error']:.1e}")
    machine = describe_machine(arguments.threads)
    if arguments.out:
        out = pathlib.Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine, "results": results}
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        described = ", ".join(f"{key} {value}" for key, value in machine.items())
        out.with_suffix(".md").write_text(
            f"# {benchmark.title}\n\n{described}.\n\n{table(results)}\n\n"
            f"{benchmark.note}; the sides take turns; ratios below 1 are where ours is faster. CPU "
            "seconds are those of all processors together. Peak memory is that of the process, "
            "with compiling, or of the accelerator where there is one.\n",
            "utf-8",
        )
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0
