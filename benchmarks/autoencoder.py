r"""The first stage side by side with PyTorch: encode, decode, and the adversarial train step.

  python benchmarks/autoencoder.py --out=benchmarks/results/autoencoder

Both sides have the same weights, inputs and processors and take turns, each in its own process, so
that whatever else the machine does meets both. PyTorch is `diffusers.AutoencoderKL` with a patch
discriminator and LPIPS in plain PyTorch, in three ways: eager, channels last, and torch.compile.
Needs PyTorch and diffusers beside this package. On a GPU that both find, both use it.

Prints a table, and writes it to OUT.md with the machine's description and all times to OUT.json.
Exits with 1 where the two sides do not agree on the results.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
from cases import CASES, DEFAULT_CASES
from child import Child

VARIANTS = ("eager", "channels_last", "compile")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")


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


def measure(name: str, runs: int, threads: int, variants: list[str]) -> dict[str, Any]:
    """Times, peak memory and disagreement of one case: {variant: {...}}, `ours` among them."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder = pathlib.Path(folder_name)

        def start(script: str, variant: str) -> Child:
            arguments = [name, folder_name, variant, str(threads)]
            return Child(script, arguments, folder / f"{variant}.log")

        start("torch_side.py", "shared").close()
        if CASES[name].task == "train":
            start("jax_side.py", "noise").close()
        sides, results = {}, {}
        for variant in ("ours", *variants):
            script = "jax_side.py" if variant == "ours" else "torch_side.py"
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
                    folder / "ours.npz", folder / f"{variant}.npz", CASES[name].task
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--runs", type=int, default=5, help="turns of each side after warming up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="file to write, without its suffix; default: only print")
    arguments = parser.parse_args()

    results, wrong = {}, []
    for case in arguments.cases:
        results[case] = measure(case, arguments.runs, arguments.threads, list(arguments.variants))
        print(table({case: results[case]}), flush=True)
        for variant, found in results[case].items():
            if found.get("error", 0.0) > CASES[case].tolerance:
                wrong.append(f"{case}: ours and PyTorch ({variant}) differ by {found['error']:.1e}")
    machine = describe_machine(arguments.threads)
    if arguments.out:
        out = pathlib.Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine, "results": results}
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        described = ", ".join(f"{key} {value}" for key, value in machine.items())
        out.with_suffix(".md").write_text(
            f"# First stage against PyTorch\n\n{described}.\n\n{table(results)}\n\n"
            "float32; the sides take turns; ratios below 1 are where ours is faster. CPU seconds "
            "are those of all processors together. Peak memory is that of the process, with "
            "compiling, or of the accelerator where there is one.\n",
            "utf-8",
        )
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
