r"""The second stage side by side with PyTorch: UNets, text to image, the train step, DDIM.

  python benchmarks/diffusion.py --out=benchmarks/results/diffusion

Both sides have the same weights, inputs and processors and take turns, each in its own process, so
that whatever else the machine does meets both. PyTorch is `diffusers`, in up to three ways: eager,
channels last, and torch.compile. Needs PyTorch, diffusers and transformers beside this package. On
a GPU that both find, both use it. All weights are random.

  sd15_unet_f32, sd15_unet_bf16   Stable Diffusion 1.5's UNet: two latents of 64x64, context 77x768
  sd15_txt2img                    all of Stable Diffusion 1.5 with a small vocabulary: a 512x512
                                  image from its prompt by DDIM in 4 steps, guidance scale 7.5
  digits_unet                     the UNet of configs/txt2img.py:digits, 64 latents
  digits_train                    its train step with the text transformer, from 64 stored moments:
                                  AdamW, clipping of gradients, moving average
  digits_ddim50_b64, ..._b1       50 steps of DDIM with that UNet, 64 samples and one

Those of Stable Diffusion need 5 GiB of disk in $TMPDIR, and most of the memory and of the time;
`tiny_*` are small ones of each kind to see that all runs. Run it on an idle machine: where others
keep the processors busy, PyTorch's threads spin for one another, milliseconds for each layer.

Prints a table, and writes it to OUT.md with the machine's description and all times to OUT.json.
Exits with 1 where the two sides do not agree on the results.
"""

import sys

from diffusion_cases import CASES, DEFAULT_CASES
from side_by_side import Benchmark, main

BENCHMARK = Benchmark(
    title="Second stage against PyTorch",
    note="float32 but for bf16",
    cases=CASES,
    default_cases=DEFAULT_CASES,
    ours="diffusion_jax_side.py",
    theirs="diffusion_torch_side.py",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, __doc__))
