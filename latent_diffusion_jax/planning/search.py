"""What would make a program fit, and how large its batch may be: found by compiling."""

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from latent_diffusion_jax.planning.compiled import Compiled

MOST = 1024  # images of a chip that are tried

# (config, images of a chip) -> the program compiled in the fast way
Attempt = Callable[[ConfigDict, int], Compiled]


def largest_batch(config: ConfigDict, found: Compiled, attempt: Attempt) -> int:
    """The most images of a chip, up to `MOST`, with which a program that fits goes on fitting.

    Temporaries grow about linearly: two compilations tell where to look, others make sure.

    Args:
      config: of the run.
      found: compiled with the config's batch.
      attempt: compiles with another.
    """
    fitting = max(found.program.images // found.slices.num_chips, 1)
    known = {fitting: found.memory.total}
    failed: int | None = None
    while fitting < MOST and (failed is None or failed - fitting > max(1, fitting // 8)):
        if failed is not None:
            trial = (fitting + failed) // 2
        elif len(known) == 1:
            trial = 2 * fitting
        else:
            (a, low), (b, high) = sorted(known.items())[-2:]
            of_image = max((high - low) / (b - a), 1.0)
            room = found.memory.available - high
            trial = b + max(int(room / of_image), 1)
        trial = min(trial, MOST)
        memory = attempt(config, trial).memory
        if memory.fits:
            fitting = trial
            known[trial] = memory.total
        else:
            failed = trial
    return fitting


def changes_that_fit(
    config: ConfigDict, name: str, images: int, num_chips: int, attempt: Attempt
) -> tuple[str, Compiled] | None:
    """The first change of a config, from the cheapest on, with which its program fits.

    Args:
      config: of the run, which does not fit.
      name: of the program.
      images: of a chip.
      num_chips: that there are.
      attempt: compiles a changed config.

    Returns:
      (the change, as flags of the command; the program compiled with it), or None.
    """
    for changed, batch, said in _changes(config, name, images, num_chips):
        found = attempt(changed, batch)
        if found.memory.fits:
            return said, found
    return None


def _changes(
    config: ConfigDict, name: str, images: int, num_chips: int
) -> Iterator[tuple[ConfigDict, int, str]]:
    """(changed config, images of a chip, the change): parameters are split first, as that costs
    least; then micro-batches; then computing anew; last come smaller batches."""
    if name == "sample":
        batch = images
        while batch > 1:
            batch //= 2
            yield config, batch, f"--config.sample.batch_size={batch}"
        return
    section, prefix, network = (
        (config.first_stage, "first_stage.", "autoencoder")
        if name == "first_stage"
        else (config, "", "unet")
    )
    del section
    base = config.copy_and_resolve_references()
    flags: list[str] = []

    def target(changed: ConfigDict) -> ConfigDict:
        return changed.first_stage if prefix else changed

    if base.mesh.fsdp != num_chips and num_chips > 1:
        base.mesh.data, base.mesh.fsdp, base.mesh.tensor = 1, num_chips, 1
        flags = [f"--config.mesh.data=1 --config.mesh.fsdp={num_chips}"]
        yield base, images, flags[0]
    for policy in (target(base)[network].remat, "blocks", "full"):
        changed = base.copy_and_resolve_references()
        target(changed)[network].remat = policy
        said = list(flags)
        if policy != target(base)[network].remat:
            said.append(f"--config.{prefix}{network}.remat={policy}")
        count = target(base).accumulation
        if said != flags:
            yield changed, images, " ".join(said)
        while images // (count * 2) >= 1 and images % (count * 2) == 0:
            count *= 2
            split = changed.copy_and_resolve_references()
            target(split).accumulation = count
            yield split, images, " ".join([*said, f"--config.{prefix}accumulation={count}"])
    batch = images
    while batch > 1:
        batch //= 2
        size = batch * num_chips
        target(changed).accumulation = 1
        yield changed, batch, " ".join([*said, f"--config.{prefix}batch_size={size}"])
