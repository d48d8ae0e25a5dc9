"""Batches from a source: shuffled by seed, sharded by process, resumable; and in order.

A loader's position is the number of batches it has given, the same for any number of processes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import grain
import numpy as np
from absl import logging

from latent_diffusion_jax.data.patience import OF_ANY_PROCESS, Patience, RecordError
from latent_diffusion_jax.data.sources import Source
from latent_diffusion_jax.runtime import images
from latent_diffusion_jax.runtime.errors import UserError

ENOUGH = 20  # damaged images from which a share of all is told by those that were looked at

Example = dict[str, np.ndarray]
Prepare = Callable[[dict[str, Any], np.random.Generator | None], Example]


class Examples(Protocol):
    """What batches are made from: a `DecodedSource`, or latents that were encoded before."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def identity(self) -> str:
        """Of the source underneath, see there."""
        ...

    @property
    def records(self) -> Source:
        """The source underneath."""
        ...

    @property
    def damaged(self) -> dict[int, str]:
        """Names of the damaged records seen so far, by index."""
        ...


class DecodedSource:
    """A source with decoded images, in which a damaged image is replaced by the next whole one.

    Images are Pillow's with so many `channels`, or arrays that have them (see `images.decode`).
    Which image stands in depends on the data alone, so runs stay reproducible. Every damaged one
    is named in the log once and counted. Where the source is not there, it is waited for up to
    `retry_seconds`.

    Raises (on access):
      UserError: more than `max_damaged_share` of the images are damaged, or one cannot give
        the channels.
      DataError: the source has not come back.
    """

    def __init__(
        self,
        source: Source,
        max_damaged_share: float,
        channels: int = 3,
        retry_seconds: float = 0.0,
    ):
        self._source = source
        self._patience = Patience(retry_seconds)
        self._channels = channels
        self._limit = int(max_damaged_share * len(source))
        self._share = max_damaged_share
        self._damaged: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(len(self)):
            record = self.whole((index + i) % len(self))
            if record is not None:
                return record
        raise UserError(f"none of the {len(self)} images can be decoded")

    def whole(self, index: int) -> dict[str, Any] | None:
        """The record at `index` itself; None, noted, where its image is damaged."""
        try:
            record = self._patience.read(lambda: self._source[index])
        except RecordError as error:
            self._note(index, error.name, str(error))
            return None
        try:
            return record | {"image": images.decode(record["image"], self._channels)}
        except images.ChannelsError as error:
            raise UserError(f"image {record['name']}: {error}") from error
        except ValueError as error:
            self._note(index, record["name"], str(error))
            return None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def identity(self) -> str:
        """Of the source underneath, see there."""
        return self._source.identity

    @property
    def records(self) -> Source:
        """The source underneath, with images left encoded."""
        return self._source

    @property
    def damaged(self) -> dict[int, str]:
        """Names of the damaged images seen so far, by index."""
        return dict(self._damaged)

    def _note(self, index: int, name: str, reason: str) -> None:
        with self._lock:
            if index in self._damaged:
                return
            self._damaged[index] = name
            count = len(self._damaged)
        logging.warning(
            "cannot decode image %s: %s (%d so far)", name, reason, count, extra=OF_ANY_PROCESS
        )
        if count > self._limit:
            raise UserError(
                f"{count} of {len(self)} images cannot be decoded, the last is {name} ({reason}); "
                f"at most {self._limit} may be skipped (data.max_damaged_share={self._share})"
            )

    def check(self, count: int, num_threads: int = 1) -> None:
        """Decodes up to `count` images, spread evenly, so that damage shows before training.

        Raises:
          UserError: so many of them are damaged that more than `max_damaged_share` of all will be.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self)), dtype=int))
        with futures.ThreadPoolExecutor(num_threads, thread_name_prefix="check") as pool:
            for _ in pool.map(self._decodes, chosen.tolist()):
                pass  # raises what a thread raised
        found = len(self._damaged.keys() & set(chosen.tolist()))
        if found >= ENOUGH and found > self._share * len(chosen):
            raise UserError(
                f"{found} of {len(chosen)} images that were looked at cannot be decoded, and of "
                f"all {len(self)} at most {self._share:.2%} may be skipped (data.max_damaged_share)"
            )

    def _decodes(self, index: int) -> None:
        """Reads one record for its errors alone: ten thousand images would not fit in memory."""
        self[index]


def image_example(
    record: dict[str, Any],
    rng: np.random.Generator | None,
    size: int,
    random_flip: bool,
    resize: int = 0,
) -> np.ndarray:
    """The image of a record as uint8 [size, size, C]; no `rng` means no augmentation.

    `resize` is the short side that is cropped from, see `images.resize_and_crop`.
    """
    image = images.resize_and_crop(record["image"], size, rng, resize)
    if random_flip and rng is not None and rng.random() < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


class _PrepareAt(grain.transforms.RandomMap):
    """Applies `prepare` with a generator that depends on the seed and the global index alone."""

    def __init__(self, prepare: Prepare):
        self._prepare = prepare

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> Example:
        return self._prepare(element, rng)


def train_loader(
    source: Examples,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int],
    num_threads: int,
) -> Any:
    """An endless iterator of this process' share of each global batch.

    Reshuffled every epoch. Row r of global batch s is the same for any number of processes.

    Args:
      source: where records come from.
      prepare: (record, generator) -> example of arrays.
      batch_size: of the global batch.
      seed: of order and augmentation.
      rows: of each global batch, that this process reads.
      num_threads: for reading and decoding; as many batches are made in advance.

    Returns:
      A Grain iterator with `get_state` and `set_state`.
    """
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_PrepareAt(prepare))  # before rows are chosen: keyed by the global index
    )
    chosen = grain.MapDataset.source(_Rows(dataset, batch_size, rows)).batch(len(rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(chosen.to_iter_dataset(options))


def records_of(samples: range, length: int, seed: int) -> list[int]:
    """Which records of a source of that length `train_loader` makes the run's samples of."""
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
    return [int(order[sample]) for sample in samples]


class _Rows:
    """Some rows of every batch, one after the other."""

    def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._dataset, self._batch_size, self._rows = dataset, batch_size, list(rows)

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, len(self._rows))
        return self._dataset[batch * self._batch_size + self._rows[row]]


def eval_batches(
    source: Examples,
    prepare: Prepare,
    *,
    batch_size: int,
    num_examples: int,
    rows: Sequence[int],
) -> Iterator[tuple[Example, int]]:
    """The first examples in order, not augmented: (these rows of a batch, valid rows in all).

    The last global batch is filled up with repeated examples, so that all have one shape.
    """
    num_examples = min(num_examples, len(source))
    for start in range(0, num_examples, batch_size):
        valid = min(batch_size, num_examples - start)
        indices = [min(start + row, num_examples - 1) for row in rows]
        examples = [prepare(source[index], None) for index in indices]
        yield {key: np.stack([e[key] for e in examples]) for key in examples[0]}, valid
