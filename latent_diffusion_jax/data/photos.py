"""Ten colour photographs, in patches, to train first stages on: a TFDS builder.

They come with packages that are installed anyway, so that nothing is downloaded. scikit-learn has
`china.jpg` (danielbuechele) and `flower.jpg` (vultilion), both from Flickr, CC BY 2.0; the others
are scikit-image's. Public domain: the astronaut and the galaxies (NASA), the rocket (SpaceX). CC0:
the cat (Stefan van der Walt), the coffee (Rachel Michetti), the retina (Mikael Häggström, 2014).
No known restrictions: the tissue (Center for Microscopy and Molecular Imaging). The motorcycle is
of the Middlebury stereo benchmark (Scharstein et al., 2014); its right view shows the same scene
and is left out, as it would show the held-out strip of the left one.
"""

import importlib.util
import pathlib
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from latent_diffusion_jax.runtime.errors import UserError

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Photo(NamedTuple):
    name: str  # of the label
    words: str  # for captions
    package: str
    file: str  # inside the package
    side: str  # from which a strip is held out, chosen to show what the photo is made of
    box: Box | None = None  # what is used of the file; None: all


PHOTOS = (
    Photo("china", "a Chinese tower above a lake", "sklearn", "datasets/images/china.jpg", "left"),
    Photo("flower", "an orange dahlia", "sklearn", "datasets/images/flower.jpg", "bottom"),
    Photo("astronaut", "an astronaut in an orange suit", "skimage", "data/astronaut.png", "left"),
    Photo("cat", "the face of a tabby cat", "skimage", "data/chelsea.png", "left"),
    Photo("coffee", "a cup of coffee on a wooden table", "skimage", "data/coffee.png", "bottom"),
    Photo("rocket", "a rocket on its launch pad", "skimage", "data/rocket.jpg", "bottom"),
    Photo("galaxies", "galaxies in deep space", "skimage", "data/hubble_deep_field.jpg", "right"),
    # The square inside the round picture, around which all is black.
    Photo(
        "retina",
        "the retina of an eye",
        "skimage",
        "data/retina.jpg",
        "left",
        (218, 218, 1193, 1193),
    ),
    Photo("tissue", "stained tissue under a microscope", "skimage", "data/ihc.png", "left"),
    Photo(
        "motorcycle", "a red motorcycle in a garage", "skimage", "data/motorcycle_left.png", "right"
    ),
)

CAPTIONS = ("a photograph of {words}", "a photo of {words}", "part of a photograph of {words}")

MAX_SHORT_SIDE = 512  # pixels; larger photos are shrunk, or they would outnumber the others
STRIP = 128  # pixels: how wide the strip is that is held out at a side of each photo
# Patches of both splits are of one size, so that `data.resize` does the same to both. Every 64x64
# window of a training part is in some patch; the 64x64 centres of the held-out ones are disjoint.
SIZE, STRIDE = 128, 64


class BundledPhotos(tfds.core.GeneratorBasedBuilder):
    """Patches of 128x128 of ten colour photographs, in which a strip of each is held out."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=[photo.name for photo in PHOTOS]),
                    "left": tfds.features.Scalar(np.int64),  # of the patch, in its photo
                    "top": tfds.features.Scalar(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        for photo in PHOTOS:
            part, (left, top, *_) = cut(read(photo), photo.side)[held_out]
            for y in starts(part.height, to_the_end=not held_out):
                for x in starts(part.width, to_the_end=not held_out):
                    yield (
                        f"{photo.name} {left + x} {top + y}",
                        {
                            "image": part.crop((x, y, x + SIZE, y + SIZE)),
                            "captions": [c.format(words=photo.words) for c in CAPTIONS],
                            "label": photo.name,
                            "left": left + x,
                            "top": top + y,
                        },
                    )


def read(photo: Photo) -> Image.Image:
    """The photo as RGB, cropped to its box.

    Raises:
      UserError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec(photo.package)
    if spec is None or spec.origin is None:
        raise UserError(f"data bundled_photos needs the package {photo.package}; install it")
    path = pathlib.Path(spec.origin).parent / photo.file
    try:
        with Image.open(path) as image:
            return image.convert("RGB").crop(photo.box)
    except OSError as error:
        raise UserError(
            f"data bundled_photos: cannot read {path}, which the PyPI releases of "
            f"{photo.package} bring along: {error.strerror or error}"
        ) from error


def cut(photo: Image.Image, side: str) -> list[tuple[Image.Image, Box]]:
    """The part to train on and the one held out at a side, each with its place in the photo.

    Too large a photo is shrunk after the cut, so that no pixel of one part has a share in the
    other; places are those in the shrunk photo.
    """
    scale = min(1.0, MAX_SHORT_SIDE / min(photo.size))
    width, height = round(photo.width * scale), round(photo.height * scale)
    parts = []
    for source, place in zip(
        halves(photo.width, photo.height, round(STRIP / scale), side),
        halves(width, height, STRIP, side),
        strict=True,
    ):
        part, size = photo.crop(source), (place[2] - place[0], place[3] - place[1])
        if part.size != size:
            part = part.resize(size, Image.Resampling.LANCZOS)
        parts.append((part, place))
    return parts


def halves(width: int, height: int, strip: int, side: str) -> tuple[Box, Box]:
    """A picture without the strip at a side, and the strip."""
    if side == "left":
        return (strip, 0, width, height), (0, 0, strip, height)
    if side == "right":
        return (0, 0, width - strip, height), (width - strip, 0, width, height)
    assert side == "bottom", side
    return (0, 0, width, height - strip), (0, height - strip, width, height)


def starts(length: int, to_the_end: bool) -> list[int]:
    """Where patches begin: every `STRIDE` pixels, and one more where that leaves a rest."""
    found = list(range(0, length - SIZE + 1, STRIDE))
    if to_the_end and found[-1] < length - SIZE:
        found.append(length - SIZE)
    return found
