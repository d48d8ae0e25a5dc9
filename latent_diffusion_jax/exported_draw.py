"""Draws with an exported sampler; needs JAX alone. python draw.py --seed=0 --out=images.npy"""

import argparse
import json
import pathlib

import jax
import jax.export
import numpy as np


def main(here: pathlib.Path, seed: int, out: str) -> None:
    data = np.memmap(here / "weights.safetensors", np.uint8, "r")
    end = 8 + int(data[:8].view("<u8")[0])
    dtypes = {"F32": np.float32, "BF16": jax.numpy.bfloat16}
    weights = {
        name: data[end + x["data_offsets"][0] : end + x["data_offsets"][1]]
        .view(dtypes[x["dtype"]]).reshape(x["shape"])
        for name, x in json.loads(data[8:end].tobytes()).items() if name != "__metadata__"
    }  # fmt: skip
    program = jax.export.deserialize(bytearray((here / "program.stablehlo").read_bytes()))
    seeds = np.arange(seed, seed + program.in_avals[-1].shape[0], dtype=np.uint32)
    inputs = dict(np.load(here / "inputs.npz"))
    images, finite = jax.jit(program.call)(weights, inputs, seeds)
    if not finite.all():
        raise SystemExit(
            "draw.py: what the model drew is no picture, but not finite: its weights are damaged, "
            "or too large for their dtype"
        )
    np.save(out, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="images.npy", help="uint8 [N, H, W, C]")
    main(pathlib.Path(__file__).parent, **vars(parser.parse_args()))
