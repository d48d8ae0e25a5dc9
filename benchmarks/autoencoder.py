r"""The first stage side by side with PyTorch: encode, decode, and the adversarial train step.

  python benchmarks/autoencoder.py --out=benchmarks/results/autoencoder

Both sides have the same weights, inputs and processors and take turns, each in its own process, so
that whatever else the machine does meets both. PyTorch is `diffusers.AutoencoderKL` with a patch
discriminator and LPIPS in plain PyTorch, in three ways: eager, channels last, and torch.compile.
Needs PyTorch and diffusers beside this package. On a GPU that both find, both use it.

Prints a table, and writes it to OUT.md with the machine's description and all times to OUT.json.
Exits with 1 where the two sides do not agree on the results.
"""

import sys

from cases import CASES, DEFAULT_CASES
from side_by_side import Benchmark, main

BENCHMARK = Benchmark(
    title="First stage against PyTorch",
    note="float32",
    cases=CASES,
    default_cases=DEFAULT_CASES,
    ours="jax_side.py",
    theirs="torch_side.py",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, __doc__))
