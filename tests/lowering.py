"""Programs as they are lowered for one platform, on a machine without it."""

import jax


def lowered(function, platform: str, *arguments) -> str:
    """Its StableHLO text for `cpu`, `cuda` or `tpu`."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
