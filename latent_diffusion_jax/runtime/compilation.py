"""How whole programs are compiled."""

import functools

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
