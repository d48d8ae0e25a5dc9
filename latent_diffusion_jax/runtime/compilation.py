"""How whole programs are compiled."""

import functools
import os
import pathlib

import jax

# Of what XLA's CPU backend hands to YNNPACK by default, reductions alone.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options() -> dict[str, str]:
    """`compiler_options` for `jax.jit` of a program that is not part of another; {} but on CPUs.

    YNNPACK's convolutions, jax 0.10's choice on CPUs, use one core where channels are few: a train
    step of a small autoencoder takes 15 % longer with them. A version of XLA that does not know the
    option goes without.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except RuntimeError:
        return {}
    return _CPU_OPTIONS


def use_persistent_cache() -> None:
    """Keeps compiled programs on disk from one process to the next, where nothing else is set.

    In `latent_diffusion_jax` of the user's cache folder; `JAX_COMPILATION_CACHE_DIR` names another.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(base / "latent_diffusion_jax"))
