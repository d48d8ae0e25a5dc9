"""Floating-point operations of a model, counted from what JAX traced and not from what it compiled.

Counted are products of matrices and convolutions, a multiplication and an addition as two
operations; nothing else, as is usual where utilisation is reported (PaLM, appendix B). What is
recomputed in a backward pass to save memory does not count: it is not the model's work.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

RECOMPUTED = "rematted_computation"  # how JAX names what `jax.checkpoint` computes again
PASSED_ON = ("clamp", "convert_element_type")  # between the platform's index and its use


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of a function of arrays or `jax.ShapeDtypeStruct`s, without running it."""
    return traced_flops(jax.make_jaxpr(function)(*arguments))


def traced_flops(jaxpr: core.ClosedJaxpr, rounds: int = 1) -> float:
    """Operations of a traced function, such as `jax.jit(f).trace(...).jaxpr`.

    Of `jax.lax.platform_dependent` the default counts, which is written with plain products. What
    no result depends on does not count.

    Args:
      jaxpr: of the function.
      rounds: of loops whose length is not known when they are traced.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(used, rounds)


def _count(jaxpr: core.Jaxpr, rounds: int) -> float:
    platform_indices: set[core.Var] = set()
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = {x for x in eqn.invars if isinstance(x, core.Var)}
        if name == "platform_index" or (name in PASSED_ON and inputs & platform_indices):
            platform_indices.add(eqn.outvars[0])
        if RECOMPUTED in str(eqn.source_info.name_stack):
            continue
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "cond":
            found = [_count(branch.jaxpr, rounds) for branch in eqn.params["branches"]]
            total += found[-1] if eqn.invars[0] in platform_indices else max(found)
        else:
            times = eqn.params["length"] if name == "scan" else rounds if name == "while" else 1
            total += times * sum(_count(inner, rounds) for inner in _inner(eqn))
    return total


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn: core.JaxprEqn) -> float:
    """Products with padding, and with the zeros that dilation puts in, are not counted."""
    params, (lhs, rhs) = eqn.params, map(_shape, eqn.invars[:2])
    numbers = params["dimension_numbers"]
    out = _shape(eqn.outvars[0])
    places = 1
    for i, axis in enumerate(numbers.lhs_spec[2:]):
        places *= valid_products(
            lhs[axis],
            rhs[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            stride=params["window_strides"][i],
            padding=params["padding"][i][0],
            lhs_dilation=params["lhs_dilation"][i],
            rhs_dilation=params["rhs_dilation"][i],
        )
    features = rhs[numbers.rhs_spec[1]]  # of the input that one of the output sees
    return (
        2.0
        * places
        * features
        * out[numbers.out_spec[0]]
        * out[numbers.out_spec[1]]
        / (params["batch_group_count"])
    )


def valid_products(
    size: int,
    window: int,
    out: int,
    *,
    stride: int = 1,
    padding: int = 0,
    lhs_dilation: int = 1,
    rhs_dilation: int = 1,
) -> int:
    """Pairs (place of the output, place in the window) along one axis that meet an input.

    Args:
      size: of the input.
      window: of the kernel.
      out: of the output.
      stride: of the window.
      padding: before the input.
      lhs_dilation: distance of the input's entries.
      rhs_dilation: distance of the window's entries.
    """
    last = (size - 1) * lhs_dilation
    count = 0
    for place in range(window):
        start = place * rhs_dilation - padding
        if lhs_dilation == 1:  # outputs o with 0 <= start + o * stride <= last
            low = max(0, -(start // stride))
            high = min(out - 1, (last - start) // stride)
            count += max(0, high - low + 1)
        else:
            places: Sequence[int] = range(start, start + out * stride, stride)
            count += sum(0 <= x <= last and x % lhs_dilation == 0 for x in places)
    return count
