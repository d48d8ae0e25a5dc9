"""How whole programs are compiled."""

import contextlib
import functools
import logging
import os
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
_CPU_OPTIONS = {
    # Of what XLA's CPU backend hands to YNNPACK by default, reductions alone.
    _YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE",
    # The default order of operations keeps processors busy, and all that it computes early alive.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
_HALF_OPTIONS = {_YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options(in_half: bool = False) -> dict[str, str]:
    """`compiler_options` for `jax.jit` of a program that is not part of another; {} but on CPUs.

    YNNPACK's convolutions, jax 0.10's choice on CPUs, use one core where channels are few: a train
    step of a small autoencoder takes 15 % longer with them. Its dot products are twice as fast as
    XLA's own in bfloat16, and no faster in float32. By the default schedule, weights are
    rearranged, and those in bfloat16 widened to float32, long before they are used: Stable
    Diffusion's UNet takes 0.6 GiB beside its weights, in bfloat16 3.5 GiB; by this one 0.2 GiB.
    A version of XLA goes without the options that it does not know.

    Args:
      in_half: the program computes in bfloat16.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = _CPU_OPTIONS | (_HALF_OPTIONS if in_half else {})
    return {name: value for name, value in options.items() if _known({name: value})}


def offload_options(platform: str) -> dict[str, int]:
    """Further options of a program that lets activations wait in the host's memory; {} but on TPUs.

    There the compiler takes them away late and fetches them back early as long as it believes that
    there is memory, and then may run out of it. Told that there is none, it does so just in time.
    """
    return {"xla_tpu_scheduler_percent_shared_memory_limit": 1} if platform == "tpu" else {}


def _known(options: dict[str, str]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except RuntimeError:
        return False
    return True


def use_persistent_cache(folder: pathlib.Path | None = None) -> None:
    """Keeps compiled programs on disk from one process to the next, where nothing else is set.

    `JAX_COMPILATION_CACHE_DIR` names another folder.

    Args:
      folder: where. Of several processes the first one alone writes there, so all have to see it;
        default `latent_diffusion_jax` of the user's cache folder.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    if folder is None:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = base / "latent_diffusion_jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _look_again()


@contextlib.contextmanager
def no_persistent_cache() -> Iterator[None]:
    """Neither reads nor keeps what is compiled inside."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    _look_again()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        _look_again()


def _look_again() -> None:
    """JAX asks once, when it first compiles something, whether and where programs are kept."""
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)
    compilation_cache.reset_cache()
