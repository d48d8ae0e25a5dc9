"""TPUs that programs are compiled for without having one, by name: `v5e:4x4`, `v5p:2x2x1*2`."""

import importlib.util
import os
import re
from typing import Any

from jax.experimental import topologies

from latent_diffusion_jax.planning.links import Slices
from latent_diffusion_jax.runtime.chips import find_chip
from latent_diffusion_jax.runtime.errors import UserError

GENERATIONS = ("v4", "v5e", "v5p", "v6e")

# Unless told, libtpu asks the cloud what machine this is, keeps others out and writes logs.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def open_topology(name: str) -> tuple[list[Any], Slices]:
    """The devices of a topology, to compile for, and what they are.

    Args:
      name: generation, chips along each axis of a slice, and where there are several slices their
        number: `v5e:4x4`, `v5p:2x2x1`, `v6e:16x16*2`.

    Raises:
      UserError: there is no such topology, or no compiler for TPUs.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", name)
    if not match or match[1] not in GENERATIONS:
        raise UserError(
            f"--topology={name}: must be a generation ({', '.join(GENERATIONS)}) and the chips "
            "along each axis, such as v5e:4x4, v5p:2x2x1, or v5e:16x16*2 for two slices"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning needs the compiler for TPUs, which runs on any Linux x86-64 machine: "
            "pip install libtpu"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    shape, count = tuple(int(n) for n in match[2].split("x")), int(match[3] or 1)
    options: dict = {"num_slices": count} if count > 1 else {}
    if match[1] == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        found = topologies.get_topology_desc(f"{match[1]}:{match[2]}", platform="tpu", **options)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={name}: the compiler has no such slice ({reason})") from error
    devices: list[Any] = list(found.devices)
    chip = find_chip(devices[0].device_kind)
    assert chip is not None, devices[0].device_kind
    return devices, Slices(chip, shape, count)
