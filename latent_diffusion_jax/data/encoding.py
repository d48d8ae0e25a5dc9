"""The host's half of encoding a dataset: images read ahead, latents written file by file."""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Generator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from latent_diffusion_jax.data.latents import ShardWriter, shard_path
from latent_diffusion_jax.data.pipeline import DecodedSource
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError

LOG_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, and how it is encoded.

    Attributes:
      name: `train` or `test`.
      source: its images.
      crops: of each image.
      flips: 2: mirrored too.
      shard_size: images in a file.
    """

    name: str
    source: DecodedSource
    crops: int
    flips: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.shard_size)

    def shard(self, index: int) -> range:
        """The images of a file."""
        start = index * self.shard_size
        return range(start, min(start + self.shard_size, len(self.source)))


class View(NamedTuple):
    """An image, ready to be encoded.

    Attributes:
      record: `captions`, `label` and `name`.
      pixels: uint8 [crops, flips, H, W, C].
    """

    record: dict[str, Any]
    pixels: np.ndarray


def views(split: Split, index: int, *, image_size: int, resize: int, seed: int) -> View | None:
    """An image as it is encoded; None where it is damaged.

    Args:
      split: where it is from.
      index: which it is.
      image_size: side of the crops in pixels.
      resize: short side that they are cut from, see `images.resize_and_crop`.
      seed: of random crops, of which there is more than one.
    """
    record = split.source.whole(index)
    if record is None:
        return None
    rng = np.random.default_rng((seed, index)) if split.crops > 1 else None
    image = record["image"]
    crops = [images.resize_and_crop(image, image_size, rng, resize) for _ in range(split.crops)]
    pixels = np.stack(crops)
    mirrored = pixels[:, :, ::-1]  # [crops, H, W, C]
    header = {key: record[key] for key in ("captions", "label", "name")}
    return View(header, np.stack([pixels, mirrored][: split.flips], axis=1))


def encode_shards(
    split: Split,
    shards: list[int],
    out: pathlib.Path,
    read: Callable[[int], View | None],
    program: Callable[[np.ndarray], jax.Array],
    *,
    batch_size: int,
    num_threads: int,
    should_stop: Callable[[], bool],
) -> bool:
    """Writes some files of a split; False where `should_stop` ended it.

    The images of all of them are one stream: threads read the next ones while the devices encode
    a batch and the host writes the one before.

    Args:
      split: what is encoded.
      shards: indices of the files, ascending.
      out: the folder.
      read: see `views`.
      program: what `make_program` gave.
      batch_size: images at once.
      num_threads: that read.
      should_stop: asked after every batch.
    """
    stream = _read_ahead(split, shards, read, num_threads, ahead=2 * batch_size)
    with contextlib.closing(stream), _Files(split, shards, out) as files:
        waiting: tuple[list[tuple[int, View]], list[jax.Array]] | None = None
        while rows := list(itertools.islice(stream, batch_size)):
            filled = rows + rows[-1:] * (batch_size - len(rows))
            pixels = np.stack([view.pixels for _, view in filled])  # [B, crops, flips, H, W, C]
            started = [
                program(pixels[:, crop, flip]) for crop, flip in np.ndindex(pixels.shape[1:3])
            ]
            if waiting is not None:
                files.write(*waiting)
            waiting = rows, started
            if should_stop():
                logging.info("stopped; the same command goes on from there")
                return False
        if waiting is not None:
            files.write(*waiting)
        files.finish()
    return True


def _read_ahead(
    split: Split,
    shards: list[int],
    read: Callable[[int], View | None],
    num_threads: int,
    ahead: int,
) -> Generator[tuple[int, View]]:
    """The whole images of some files in order, each with its file's index."""
    pool = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="read")
    try:
        todo = ((shard, index) for shard in shards for index in split.shard(shard))
        reading: collections.deque[tuple[int, futures.Future[View | None]]] = collections.deque()
        for shard, index in todo:
            reading.append((shard, pool.submit(read, index)))
            if len(reading) >= ahead:
                shard, done = reading.popleft()
                if (view := done.result()) is not None:
                    yield shard, view
        for shard, done in reading:
            if (view := done.result()) is not None:
                yield shard, view
    finally:
        pool.shutdown(cancel_futures=True)


class _Files:
    """Writes files one after the other, and says how far it is. Only whole ones stay."""

    def __init__(self, split: Split, shards: list[int], out: pathlib.Path):
        self._split, self._out = split, out
        self._left = list(shards)
        self._writer: ShardWriter | None = None
        self._images, self._total = 0, sum(len(split.shard(shard)) for shard in shards)
        self._start = self._shown = time.perf_counter()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close(whole=False)

    def write(self, rows: list[tuple[int, View]], started: list[jax.Array]) -> None:
        """Writes a batch of images, whose moments [B, h, w, c] come one array for each view."""
        moments = np.stack([np.asarray(x) for x in started], axis=1)
        counts = self._split.crops, self._split.flips
        for (shard, view), found in zip(rows, moments, strict=False):  # the rest fills the batch
            if not np.isfinite(found).all():
                raise UserError(
                    f"the moments of {view.record['name']} are not finite in {found.dtype}; "
                    + ("try --dtype=float32" if found.dtype == np.float16 else "the first stage "
                       "is damaged, or its first_stage.autoencoder.dtype does not do")
                )  # fmt: skip
            while self._writer is None or self._left[0] != shard:
                self._next()
            shape = *counts, *found.shape[1:]
            self._writer.write(view.record | {"moments": found.reshape(shape)})
        self._images += len(rows)
        if time.perf_counter() - self._shown > LOG_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown = time.perf_counter()
        logging.info(
            "%s: encoded %d of %d images, %.0f images/s",
            *(self._split.name, self._images, self._total),
            self._images / (self._shown - self._start),
        )

    def finish(self) -> None:
        """Ends the last file, and writes those in which no image is whole."""
        while self._left:
            self._next()
        if self._total:
            self._show()

    def _next(self) -> None:
        """Ends the file that is open, opens the next one."""
        if self._writer is not None:
            self._writer.close(whole=True)
            self._writer = None
            self._left.pop(0)
        if self._left:
            path = shard_path(self._out, self._split.name, self._left[0], self._split.num_shards)
            self._writer = ShardWriter(path)
