r"""How many images a second the input pipeline gives, alone: JPEG files to batches of uint8.

  python benchmarks/data.py [--size=256] [--images=2000] [--out=benchmarks/results/data.json]

Makes JPEG files of a photograph's crops, a folder as `config.data.name` takes it, and reads it as
training does: shuffled, decoded, cropped, flipped, with a caption. Throughput is said for each
core's second of work, so that it does not matter what else the machine does.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import skimage.data
from PIL import Image
from side_by_side import describe_machine

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import txt2img
from latent_diffusion_jax import build
from latent_diffusion_jax.data import pipeline

BATCH, QUALITY = 64, 90


def write_folder(folder: pathlib.Path, count: int, size: int) -> int:
    """Writes the files; their mean size in bytes."""
    photo = Image.fromarray(skimage.data.astronaut())
    photo = photo.resize((4 * size, 4 * size))
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        left, top = rng.integers(0, 3 * size, 2)
        name = f"{i:06d}.jpg"
        photo.crop((left, top, left + size, top + size)).save(folder / name, quality=QUALITY)
        rows.append(json.dumps({"file_name": name, "text": f"part {i} of a photograph"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return sum(path.stat().st_size for path in folder.glob("*.jpg")) // count


def measure(folder: pathlib.Path, size: int, images: int, threads: int) -> dict[str, float]:
    config = txt2img.get_config("paper")
    config.data.name, config.data.image_size = str(folder), size
    config.data.random_flip, config.data.check_images = True, 1
    config.data.holdout_share = 0.01
    train, _ = build.data_sources(config)
    loader = pipeline.train_loader(
        train,
        build.example_maker(config),
        batch_size=BATCH,
        seed=0,
        rows=range(BATCH),
        num_threads=threads,
    )
    next(loader)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(images // BATCH):
        next(loader)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    loader.close()
    count = images // BATCH * BATCH
    return {"images_per_second": count / seconds, "images_per_core_second": count / worked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        mean = write_folder(pathlib.Path(name), options.files, options.size)
        print(f"{options.size}x{options.size} JPEG files of {mean / 1024:.1f} KiB, {cores} cores")
        rows = []
        for threads in (1, cores, 4 * cores):
            found = measure(pathlib.Path(name), options.size, options.images, threads)
            rows.append({"threads": threads, **found})
            print(
                f"{threads} threads: {found['images_per_second']:.0f} images/s, "
                f"{found['images_per_core_second']:.0f} a core's second"
            )
    if options.out:
        machine = describe_machine(cores)
        report = {"machine": machine, "size": options.size, "file_bytes": mean, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
