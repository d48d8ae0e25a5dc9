"""Programs compiled ahead of time: do they fit, what do they cost, how fast will they be."""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from latent_diffusion_jax.planning import costs, hlo
from latent_diffusion_jax.planning.costs import Cost
from latent_diffusion_jax.planning.links import Slices
from latent_diffusion_jax.planning.programs import Program
from latent_diffusion_jax.runtime.compilation import no_persistent_cache
from latent_diffusion_jax.runtime.errors import UserError

# The search for the best windows of convolutions takes more than half of the compiler's time, and
# changes a program's code by megabytes, and neither what it computes nor what it moves.
NO_SEARCH = {"xla_jf_convolution_performance_target": 0}
_SIZES = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40, "P": 2.0**50}
# Of the versions of the compiler, what it says of a program that needs too much.
_TOO_MUCH = (
    r"\(([\d.]+)([KMGTP]?)\) exceeds available HBM",
    r"memory space hbm\. Used ([\d.]+)([KMGTP]?)i?B? of",
)


class CompilerError(UserError):
    """The compiler gave up on a program, and not because its arrays need too much memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one chip, in bytes.

    Attributes:
      resident: what lies there while the program runs, by kind.
      temporaries: what the program allocates for itself, its results and code included.
      available: to programs.
      counted: the compiler laid it out; otherwise it gave up, and the sum is what it says.
      host: what the program allocates of the host's memory, for each chip.
    """

    resident: dict[str, float]
    temporaries: float
    available: float
    counted: bool = True
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.resident.values()) + self.temporaries

    @property
    def fits(self) -> bool:
        return self.counted and self.total <= self.available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What there is to say of a program.

    Attributes:
      program: it.
      slices: that it was compiled for.
      memory: of a chip.
      seconds: that compiling took, tracing included.
      model_flops: in one call, on all chips (see `runtime.flops`).
      cost: on each chip; None where the program does not fit or nobody asked.
      executable: None where it does not fit.
      text: of the compiled program.
      lowered: what it was compiled from.
    """

    program: Program
    slices: Slices
    memory: Memory
    seconds: float
    model_flops: float
    cost: Cost | None
    executable: Any
    text: str = ""
    lowered: Any = None

    @property
    def images_per_second(self) -> float:
        """On all chips."""
        assert self.cost is not None
        return self.program.images / self.cost.seconds

    @property
    def mfu(self) -> float:
        """The model's operations as a share of what the chips could do in that time."""
        assert self.cost is not None
        peak = self.slices.chip.flops * self.slices.num_chips
        return self.model_flops / self.cost.seconds / peak

    @property
    def compiled_to_model(self) -> float:
        """Operations of the compiled program to the model's: what is recomputed shows here."""
        assert self.cost is not None
        return self.cost.flops * self.slices.num_chips / self.model_flops


def compile_program(
    program: Program, slices: Slices, *, with_cost: bool = True, to_run: bool = False
) -> Compiled:
    """Compiles a program.

    Args:
      program: it.
      slices: that it is for.
      with_cost: whether to estimate it.
      to_run: as for running it, with the best windows of convolutions.

    Raises:
      CompilerError: the compiler cannot do it.
    """
    start = time.perf_counter()
    order = (getattr(device, "slice_index", None) or 0 for device in program.mesh.devices.flat)
    slices = dataclasses.replace(slices, slice_of=tuple(order))
    traced = program.trace()
    flops = program.model_flops(traced)
    with jax.set_mesh(program.mesh):
        lowered = traced.lower()
    try:
        executable, text = _compile(lowered, {} if to_run else NO_SEARCH)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            reason = " ".join(str(error).split())[:300]
            raise CompilerError(
                f"{program.name} cannot be compiled for {program.images} images: {reason}"
            ) from error
        seconds = time.perf_counter() - start
        own = max(needed - program.argument_bytes, 0.0)
        memory = Memory(program.resident, own, slices.chip.memory, counted=False)
        return Compiled(program, slices, memory, seconds, flops, None, None)
    seconds = time.perf_counter() - start
    found = executable.memory_analysis()
    own = (
        found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
        + max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    )
    host = float(found.host_temp_size_in_bytes)
    memory = Memory(program.resident, float(own), slices.chip.memory, host=host)
    cost = costs.estimate(hlo.parse(text), slices, program.rounds) if with_cost else None
    return Compiled(program, slices, memory, seconds, flops, cost, executable, text, lowered)


def _compile(lowered: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """The program and its text, which JAX's own way fails to print for some operations."""
    # Programs for devices that are not there cannot be read from the cache.
    with no_persistent_cache(), tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        executable = lowered.compile(compiler_options=options | dump)
        (path,) = pathlib.Path(folder).glob("*after_codegen.txt")
        return executable, path.read_text()


def _needed(message: str) -> float | None:
    """Bytes that the compiler ran out of memory for, arguments included; None for other errors."""
    for pattern in _TOO_MUCH:
        if found := re.search(pattern, message):
            return float(found[1]) * _SIZES[found[2]]
    return None
