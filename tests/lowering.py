"""Programs as they are lowered for one platform, on a machine without it."""

import re

import jax


def lowered(function, platform: str, *arguments) -> str:
    """Its StableHLO text for `cpu`, `cuda` or `tpu`."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def precisions(text: str) -> set[str]:
    """Those that the products of matrices and the convolutions of a program ask for."""
    found = set()
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            names = re.findall(r"precision (\w+)>", line)
            names += re.findall(r"precision = \[(\w+), (\w+)\]", line)[0:1]
            flat = {n for name in names for n in ((name,) if isinstance(name, str) else name)}
            found |= flat or {"DEFAULT"}
    return found
