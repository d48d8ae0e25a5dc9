r"""Plans of the shipped configs for TPUs, by the compiler for them: memory, operations, step time.

  python benchmarks/plans.py --out=benchmarks/results/plans [--cases=sd15_train,sd15_sample]

Each case is a call of `python -m latent_diffusion_jax.plan` in its own process, on this machine's
CPU; the full networks take minutes each, so run it on an idle machine. Rows of cases that are not
run again stay as they are in OUT.json; OUT.md is the table of all.

What holds of the figures is tested by `pytest -m slow tests/planning/test_full_size.py`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from side_by_side import describe_machine

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from latent_diffusion_jax.planning.report import markdown  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of a config on a topology.

    Attributes:
      config: below `configs/`, with its variant.
      program: `first_stage`, `diffusion` or `sample`.
      topology: as --topology takes it.
      overrides: of the config.
      dtype: of the sampler.
    """

    config: str
    program: str
    topology: str
    overrides: tuple[str, ...] = ()
    dtype: str = "float32"

    def command(self, json_file: pathlib.Path) -> list[str]:
        return [
            sys.executable, "-m", "latent_diffusion_jax.plan", "--nosearch",
            f"--config=configs/{self.config}", f"--topology={self.topology}",
            f"--programs={self.program}", f"--dtype={self.dtype}", f"--json={json_file}",
            *(f"--config.{override}" for override in self.overrides),
        ]  # fmt: skip


LATENTS = "data.latents=encoded"
AT_ONCE = ("accumulation=1", LATENTS)
CASES = {
    # 16 chips of 16 GiB: the parameters are split over all of them. With fewer than 8 images a chip
    # the compiler cuts images into strips that overlap, and computes an eighth more.
    "sd15_train": Case("stable_diffusion.py", "diffusion", "v5e:4x4", ("batch_size=128", *AT_ONCE)),
    # The config as it is: images, 2,048 of them in 16 parts.
    "sd15_shipped": Case("stable_diffusion.py", "diffusion", "v5e:4x4"),
    "sd21_shipped": Case("stable_diffusion.py:v2", "diffusion", "v5e:4x4"),
    "sd15_sample": Case("stable_diffusion.py", "sample", "v5e:1x1", dtype="bfloat16"),
    # As many images a chip on 16 times as many: whether speed goes along.
    "sd15_train_256": Case(
        "stable_diffusion.py",
        "diffusion",
        "v5e:16x16",
        ("batch_size=2048", "mesh.data=16", "mesh.fsdp=16", *AT_ONCE),
    ),
    "sd2_train": Case(
        "stable_diffusion.py:v2_base", "diffusion", "v5p:2x2x2", ("batch_size=512", *AT_ONCE)
    ),
    # The batch that MaxDiffusion measured: 86.4 images/s/chip.
    "sd2_train_32": Case(
        "stable_diffusion.py:v2_base", "diffusion", "v5p:2x2x2", ("batch_size=256", *AT_ONCE)
    ),
    # How the time to compile grows with the network: half as wide, and half as many blocks a level.
    "sd15_train_narrow": Case(
        "stable_diffusion.py",
        "diffusion",
        "v5e:4x4",
        ("batch_size=128", "unet.channels=160", *AT_ONCE),
    ),
    "sd15_train_shallow": Case(
        "stable_diffusion.py",
        "diffusion",
        "v5e:4x4",
        ("batch_size=128", "unet.num_res_blocks=1", *AT_ONCE),
    ),
    "kl_f8": Case("autoencoder_kl.py:f8", "first_stage", "v5e:2x2"),
    "vq_f4": Case("autoencoder_vq.py:f4", "first_stage", "v5e:2x2"),
    "txt2img": Case("txt2img.py:paper", "diffusion", "v5e:4x4", (LATENTS,)),
    "txt2img_sample": Case("txt2img.py:paper", "sample", "v5e:1x1", dtype="bfloat16"),
}


def run(case: Case) -> dict:
    """The case's row, as the command writes it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        done = subprocess.run(case.command(path), cwd=ROOT, env=environment, check=False)
        if not path.exists():
            raise SystemExit(f"error: the plan failed with exit status {done.returncode}")
        (row,) = json.loads(path.read_text("utf-8"))
    return row | {"config": case.config, "overrides": list(case.overrides)}


def table(rows: dict[str, dict]) -> str:
    known = {name: rows[name] for name in CASES if name in rows}
    head, line, *body = markdown(list(known.values())).splitlines()
    named = [
        f"| {name} | {row['config']} {cells}"
        for (name, row), cells in zip(known.items(), body, strict=True)
    ]
    return "\n".join([f"| case | config {head}", f"|---|---{line}", *named])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    for name in (names := options.cases.split(",")):
        if name not in CASES:
            parser.error(f"no case {name}; known: {', '.join(CASES)}")
    path = options.out.with_suffix(".json")
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    machine = describe_machine(len(os.sched_getaffinity(0)))
    for name in names:
        rows[name] = run(CASES[name])
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", "utf-8")
        options.out.with_suffix(".md").write_text(report(machine, rows), "utf-8")
    print(report(machine, rows))


def report(machine: dict, rows: dict[str, dict]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"# Plans of the shipped configs\n\nCompiled on {described}.\n\n{table(rows)}\n\n{NOTE}"


NOTE = """\
HBM is what a chip needs beside what its programs may have; step s, images/s and MFU are rooflines
(see the README), images/s of all chips; FLOP/model are the compiled program's operations to the
model's. Overrides and all figures (memory by kind, collectives, seconds by bound) are in the JSON.
"""

if __name__ == "__main__":
    main()
