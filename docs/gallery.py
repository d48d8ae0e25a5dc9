"""Makes the README's pictures of first stages that were trained on the bundled photographs.

  python docs/gallery.py runs/kl_photos runs/vq_photos     (needs matplotlib)

docs/photos.png: held-out crops and each workdir's reconstructions below them;
docs/losses.png: the terms of the loss over the steps, with the start of the adversarial term.
"""

import json
import pathlib
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np

from latent_diffusion_jax import build, first_stages
from latent_diffusion_jax.runtime import images

DOCS = pathlib.Path(__file__).parent
COLUMNS = 10
TERMS = (("l1", "L1 per pixel"), ("g_loss", "generator's term"), ("d_loss", "discriminator's loss"),
         ("d_weight", "weight of the adversarial term"))  # fmt: skip


def reconstructions(workdir: str, pixels: np.ndarray) -> np.ndarray:
    """uint8 images -> what a workdir's first stage makes of them."""
    stage = first_stages.open_first_stage(workdir)
    run = jax.jit(lambda params, x: stage.network.apply({"params": params}, images.to_float(x)))
    return images.to_uint8(np.clip(np.asarray(run(stage.params, pixels)), -1.0, 1.0))


def held_out(workdir: str) -> np.ndarray:
    """Some held-out images, spread evenly."""
    config = first_stages.open_first_stage(workdir).config
    source, prepare = build.data_sources(config)[1], build.example_maker(config)
    rows = np.linspace(0, len(source) - 1, COLUMNS, dtype=int)
    return np.stack([prepare(source[int(row)], None)["image"] for row in rows])


def plot(workdirs: list[str], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    for workdir in workdirs:
        config = first_stages.open_first_stage(workdir).config
        assert config is not None
        name = f"{config.first_stage.kind.upper()} f4"
        rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").open()]
        for axis, (term, title) in zip(axes.flat, TERMS, strict=True):
            key = f"train/{term}"
            points = [(row["step"], row[key]) for row in rows if key in row]
            line = axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
            axis.axvline(config.first_stage.loss.disc_start, color=line[0].get_color(), alpha=0.3)
            axis.set_title(title, fontsize=10)
    axes[0, 0].set_yscale("log")
    axes[1, 1].set_yscale("symlog")
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(workdirs: list[str]) -> None:
    pixels = held_out(workdirs[0])
    rows = [pixels, *(reconstructions(workdir, pixels) for workdir in workdirs)]
    images.save_png(DOCS / "photos.png", images.grid(np.concatenate(rows), COLUMNS))
    plot(workdirs, DOCS / "losses.png")


if __name__ == "__main__":
    main(sys.argv[1:])
