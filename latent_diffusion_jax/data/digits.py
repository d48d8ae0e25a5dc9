"""The embedded default data: scans of handwritten digits with captions, as a TFDS builder.

The 1,797 scans are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998), which scikit-learn carries, so that nothing is downloaded.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CAPTIONS = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}, written by hand",
    "the number {word}, written by hand",
    "a scan of a handwritten {word}",
    "a scan of the digit {digit}",
    "handwriting: the number {digit}",
    "somebody wrote a {word}",
)

NUM_TEST = 297  # of 1,797; the rest is for training
SIZE = 32  # pixels; the scans are 8x8


class HandwrittenDigits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 32x32 RGB, each with a caption in eight wordings."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=list(WORDS)),
                    "id": tfds.features.Scalar(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        order = np.random.default_rng(0).permutation(1797)
        return {
            "train": self._generate_examples(np.sort(order[NUM_TEST:])),
            "test": self._generate_examples(np.sort(order[:NUM_TEST])),
        }

    def _generate_examples(self, indices):
        from sklearn.datasets import load_digits  # a second's import, for preparation only

        scans = load_digits()
        for i in indices:
            grey = np.round(scans.images[i] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            digit = int(scans.target[i])
            yield (
                int(i),
                {
                    "image": image.convert("RGB"),
                    "captions": [c.format(word=WORDS[digit], digit=digit) for c in CAPTIONS],
                    "label": digit,
                    "id": int(i),
                },
            )
