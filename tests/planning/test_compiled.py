"""What the compiler says of programs that need too much."""

import pytest

from latent_diffusion_jax.planning.compiled import _needed


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the program's requirement "
            "(17.25G) exceeds available HBM (15.75G)",
            17.25 * 2**30,
        ),
        ("allocations (1.34T) exceeds available HBM (95.7G)", 1.34 * 2**40),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
            21.95 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.5M of 16M", None),
        ("INTERNAL: something else", None),
    ],
)
def test_how_much_would_do(message, expected):
    assert _needed(message) == expected
