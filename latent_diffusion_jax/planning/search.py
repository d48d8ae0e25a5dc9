"""What would make a program fit, and how large its batch may be: found by compiling."""

from collections.abc import Callable, Iterator

from absl import logging
from ml_collections import ConfigDict

from latent_diffusion_jax.models.remat import POLICIES
from latent_diffusion_jax.planning.compiled import Compiled, CompilerError, Memory
from latent_diffusion_jax.planning.links import Slices

MOST = 1024  # images of a chip that are tried
STRONGER = ("blocks", "full", "offload")  # policies to try, the cheapest first

# Chips with the same images, those along the axis `tensor`, count as one here.
# (config, images of a chip) -> the compiled program; nobody asks for its cost
Attempt = Callable[[ConfigDict, int], Compiled]
# config -> how many chips have images of their own
Parts = Callable[[ConfigDict], int]


def largest_batch(
    config: ConfigDict, images: int, found: Compiled, attempt: Attempt, multiple: int = 1
) -> int:
    """The most images of a chip, up to `MOST`, with which a program that fits goes on fitting.

    Temporaries grow about linearly: two compilations tell where to look, two more that it is there.

    Args:
      config: of the run.
      images: of a chip by the config.
      found: compiled with them.
      attempt: compiles with others.
      multiple: that images have to be of, the number of micro-batches.

    Returns:
      That number; `multiple` more do not fit.
    """
    fitting, most = images, MOST // multiple * multiple
    known = {fitting: found.memory.total}
    failed: int | None = None
    narrowed = True  # the last trial has halved what is left, or there is no end of that yet
    while fitting < most and (failed is None or failed - fitting > multiple):
        end = most if failed is None else failed - multiple
        if len(known) == 1:
            trial = 2 * fitting
        elif not narrowed:
            trial = (fitting + end) // 2
        else:
            other = failed
            if other is None or other not in known:
                other = min(known.keys() - {fitting}, key=lambda at: abs(at - fitting))
            of_image = max((known[other] - known[fitting]) / (other - fitting), 1.0)
            trial = fitting + int((found.memory.available - known[fitting]) / of_image)
            trial = min(trial, 8 * fitting)  # far away, all may be different
        trial = min(max(trial // multiple * multiple, fitting + multiple), end)
        left = end - fitting
        memory = _memory(attempt, config, trial)
        if memory is not None and memory.counted:
            known[trial] = memory.total
        if memory is not None and memory.fits:
            fitting = trial
        else:
            failed = trial
        narrowed = failed is None or failed - multiple - fitting <= left // 2
    return fitting


def _memory(attempt: Attempt, config: ConfigDict, images: int) -> Memory | None:
    """None where it cannot be compiled, as some kernel does not fit, say."""
    try:
        return attempt(config, images).memory
    except CompilerError as error:
        logging.warning("%s", error)
        return None


def changes_that_fit(
    config: ConfigDict, name: str, images: int, slices: Slices, attempt: Attempt, parts: Parts
) -> tuple[str, Memory] | None:
    """The first change of a config, from the cheapest on, with which its program fits.

    Args:
      config: of the run, which does not fit.
      name: of the program.
      images: of a chip.
      slices: that it is for.
      attempt: compiles a changed config.
      parts: chips with images of their own, by a config.

    Returns:
      (the change, as flags of the command; the program's memory with it), or None.
    """
    for changed, batch, said in _changes(config, name, images, slices, parts):
        memory = _memory(attempt, changed, batch)
        if memory is not None and memory.fits:
            return said, memory
    return None


def _changes(
    config: ConfigDict, name: str, images: int, slices: Slices, parts: Parts
) -> Iterator[tuple[ConfigDict, int, str]]:
    """(changed config, images of a chip, the change): parameters are split first, as that costs
    least; then micro-batches; then computing anew; last come smaller batches."""
    if name == "sample":
        while images > 1:
            images //= 2
            yield config, images, f"--config.sample.batch_size={images}"
        return
    of_first = name == "first_stage"
    prefix = "first_stage." if of_first else ""
    network = "autoencoder" if of_first else "unet"

    def section(changed: ConfigDict) -> ConfigDict:
        return changed.first_stage if of_first else changed

    base = config.copy_and_resolve_references()
    flags: list[str] = []
    fsdp, mesh = slices.chips_of_slice, base.mesh
    split = mesh.fsdp == fsdp or (mesh.fsdp == -1 and mesh.data == mesh.tensor == 1)
    if not split and fsdp > 1:
        batch_size = images * parts(base)
        wide = base.copy_and_resolve_references()
        wide.mesh.data, wide.mesh.fsdp, wide.mesh.tensor = 1, fsdp, 1
        if batch_size % (parts(wide) * section(wide).accumulation) == 0:
            base, images = wide, batch_size // parts(wide)
            flags = [f"--config.mesh.data=1 --config.mesh.fsdp={fsdp} --config.mesh.tensor=1"]
            yield base, images, flags[0]
    own_policy, own_count = section(base)[network].remat, section(base).accumulation
    weaker = POLICIES[: POLICIES.index(own_policy) + 1]
    for policy in (own_policy, *(policy for policy in STRONGER if policy not in weaker)):
        changed = base.copy_and_resolve_references()
        section(changed)[network].remat = policy
        said = list(flags)
        if policy != own_policy:
            said.append(f"--config.{prefix}{network}.remat={policy}")
            yield changed, images, " ".join(said)
        count = own_count
        while images % (count * 2) == 0:
            count *= 2
            split = changed.copy_and_resolve_references()
            section(split).accumulation = count
            yield split, images, " ".join([*said, f"--config.{prefix}accumulation={count}"])
    if own_count > 1:
        section(changed).accumulation = 1
        said.append(f"--config.{prefix}accumulation=1")
    while images > 1:
        images //= 2
        size = images * parts(changed)
        yield changed, images, " ".join([*said, f"--config.{prefix}batch_size={size}"])
