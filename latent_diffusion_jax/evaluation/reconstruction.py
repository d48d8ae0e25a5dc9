"""How well an autoencoder reconstructs a data set, batch by batch over all devices.

Nothing is kept of an image but its figures, its share in the features' moments and, of the first
few, the picture to look at; so the number of images is not limited by memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_diffusion_jax.data.pipeline import DecodedSource, image_example
from latent_diffusion_jax.evaluation.fid import Moments, frechet_distance
from latent_diffusion_jax.evaluation.psnr import psnr
from latent_diffusion_jax.evaluation.ssim import WINDOW, ssim
from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.inception import InceptionV3
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.runtime import processes, sharding
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float

LPIPS_MIN_SIZE = 16  # pixels: four poolings halve it
LOG_EVERY = 50  # batches

Program = Callable[[jax.Array], dict[str, jax.Array]]


def check(
    network: AutoencoderKL | AutoencoderVQ, image_size: int, *, lpips: bool, inception: bool
) -> None:
    """Raises UserError where the figures cannot be had.

    Args:
      network: the autoencoder.
      image_size: side of the square images in pixels.
      lpips: whether LPIPS looks at the images.
      inception: whether Inception does.
    """
    factor, channels = network.downsampling_factor, network.image_channels
    if image_size % factor:
        near = [n for n in (image_size // factor * factor, -(-image_size // factor) * factor) if n]
        raise UserError(
            f"image_size={image_size} is not divisible by the autoencoder's downsampling factor "
            f"{factor}; {' or '.join(map(str, near))} would be"
        )
    least = LPIPS_MIN_SIZE if lpips else WINDOW
    if image_size < least:
        raise UserError(
            f"image_size={image_size} is too small to measure: {'LPIPS' if lpips else 'SSIM'} "
            f"needs at least {least} pixels"
        )
    if (lpips or inception) and channels not in (1, 3):
        raise UserError(
            f"LPIPS and Inception look at images of 1 or 3 channels, those of this autoencoder "
            f"have {channels}; leave their weights out"
        )


def measure_reconstructions(
    network: AutoencoderKL | AutoencoderVQ,
    params: Any,
    source: DecodedSource,
    mesh: Mesh,
    *,
    image_size: int,
    num_images: int,
    batch_size: int,
    lpips_params: Any = None,
    inception_params: Any = None,
    num_threads: int = 8,
    num_shown: int = 32,
    resize: int = 0,
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of the reconstructions from the posterior's mean, and some of them to look at.

    Both images are compared as uint8: resized, cropped and rounded to levels.

    Args:
      network: the autoencoder; it looks at as many channels as the source gives.
      params: its parameters, on the mesh.
      source: where images come from; the first ones are taken, in order.
      mesh: devices; batches are split over its data and fsdp axes.
      image_size: side of the square images in pixels.
      num_images: how many to take; fewer where the source has fewer.
      batch_size: images in all devices' memory at once.
      lpips_params: of `LPIPS`; None leaves `lpips` out.
      inception_params: of `InceptionV3`; None leaves `rfid` out.
      num_threads: that read and decode, and compute SSIM.
      num_shown: pairs to look at.
      resize: short side that images are cropped from, see `runtime.images.resize_and_crop`.

    Returns:
      Figures over the images: `psnr`, `ssim`, `lpips` and their standard deviations `*_std`;
      `rfid`, the Frechet Inception distance of reconstructions and originals; with a codebook
      `codebook_usage`, the share of its entries that occur, and `codebook_perplexity`, which is
      their number if all occur equally often. And pairs, original first, uint8 [2 * N, H, W, C].

    Raises:
      UserError: as `check`; the mesh does not divide the batch; too many images are damaged; with
        Inception, there are fewer than two; reconstructions are not finite.
    """
    with_lpips, with_inception = lpips_params is not None, inception_params is not None
    check(network, image_size, lpips=with_lpips, inception=with_inception)
    sharding.check_batch_size(batch_size, mesh, "batch_size")
    num_images = min(num_images, len(source))
    if with_inception and num_images < 2:
        raise UserError("the Frechet distance needs at least two images, one is there")
    program = _program(network, params, mesh, lpips_params, inception_params)
    codes = network.num_codes if isinstance(network, AutoencoderVQ) else 0
    tally = _Tally(num_shown, num_threads, np.zeros(codes, np.int64))
    starts = range(0, num_images, batch_size)

    def read(index: int) -> np.ndarray:
        record = source[min(index, num_images - 1)]
        return image_example(record, None, image_size, random_flip=False, resize=resize)

    rows = _rows(read, num_images, sharding.own_rows(batch_size, mesh), batch_size, num_threads)
    waiting: dict[str, jax.Array] | None = None
    # The host counts one batch while the devices work on the next.
    for number, batch in enumerate(rows):
        started = program(sharding.put_batch(batch, mesh, batch_size))
        if waiting is not None:
            tally.add(waiting, batch_size)
        waiting = started
        if number and number % LOG_EVERY == 0:
            logging.info("reconstructed %d of %d images", starts[number], num_images)
    if waiting is not None:
        tally.add(waiting, num_images - starts[-1])
    return tally.figures(), np.concatenate(tally.shown)


def _rows(
    read: Callable[[int], np.ndarray],
    num_images: int,
    own: Sequence[int],
    batch_size: int,
    num_threads: int,
) -> Iterator[np.ndarray]:
    """This process' own rows of every batch; to be full, the last one goes beyond the last image.

    So many images are read ahead as two batches have.
    """

    def read_own(place: int) -> np.ndarray:
        batch, row = divmod(place, len(own))
        return read(batch * batch_size + own[row])

    count = -(-num_images // batch_size) * len(own)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * len(own))
    rows = grain.MapDataset.range(count).map(read_own).to_iter_dataset(options)
    return iter(rows.batch(len(own)))


def to_levels(images: jax.Array) -> jax.Array:
    """`runtime.images.to_uint8` on the device."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _program(
    network: AutoencoderKL | AutoencoderVQ,
    params: Any,
    mesh: Mesh,
    lpips_params: Any,
    inception_params: Any,
) -> Program:
    """Original images uint8 [B, H, W, C], split over the mesh -> what `_Tally.add` takes."""
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    lpips_params, inception_params = processes.put((lpips_params, inception_params), whole)

    # Every process gets every image, so that all of them come to the same figures.
    @jax.jit
    def reconstruct(params: Any, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        def call(x: jax.Array, method: str) -> Any:
            return network.apply({"params": params}, x, method=method)

        z = call(to_float(images), "encode").mean
        y = call(z, "decode")
        found = {"finite": jnp.all(jnp.isfinite(y), axis=(1, 2, 3))}
        if isinstance(network, AutoencoderVQ):
            found["codes"] = call(z, "indices")
        levels = jax.lax.with_sharding_constraint(to_levels(y), split)
        return levels, jax.lax.with_sharding_constraint(found, whole)

    @jax.jit
    def distance(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        pair = (to_float(_colour(images)) for images in (x, y))
        found = LPIPS().apply({"params": params}, *pair)
        return jax.lax.with_sharding_constraint(found, whole)

    @jax.jit
    def features(params: Any, images: jax.Array) -> jax.Array:
        found = InceptionV3().apply({"params": params}, _colour(images)).features
        return jax.lax.with_sharding_constraint(found, whole)

    gather = jax.jit(lambda images: images, out_shardings=whole)

    def run(images: jax.Array) -> dict[str, jax.Array]:
        reconstructions, found = sharding.over(mesh, reconstruct)(params, images)
        found |= {"images": gather(images), "reconstructions": gather(reconstructions)}
        if lpips_params is not None:
            found["lpips"] = distance(lpips_params, images, reconstructions)
        if inception_params is not None:
            found["features"] = features(inception_params, images)
            found["reconstructions_features"] = features(inception_params, reconstructions)
        return found

    return run


def _colour(images: jax.Array) -> jax.Array:
    """[B, H, W, 1] or [B, H, W, 3] -> [B, H, W, 3], grey repeated."""
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


@dataclasses.dataclass
class _Tally:
    """What is known of the images so far.

    Attributes:
      num_shown: pairs to keep for looking at.
      num_threads: for SSIM.
      code_counts: how often each code occurred [K]; empty without a codebook.
      per_image: values of each figure, one array for a batch.
      moments: of the originals' and of the reconstructions' features.
      shown: pairs, uint8 [2 * N, H, W, C], one array for a batch.
    """

    num_shown: int
    num_threads: int
    code_counts: np.ndarray
    per_image: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    moments: tuple[Moments, Moments] | None = None
    shown: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, outputs: dict[str, jax.Array], valid: int) -> None:
        """Counts the first `valid` rows of a batch.

        Raises:
          UserError: a reconstruction holds NaN or infinity.
        """
        rows = {name: processes.fetch(value)[:valid] for name, value in outputs.items()}
        if not rows["finite"].all():
            raise UserError(
                f"{np.sum(~rows['finite'])} of {valid} reconstructions are not finite numbers; the "
                "autoencoder's weights are damaged or it diverged"
            )
        x, y = rows["images"], rows["reconstructions"]
        batch = {"psnr": psnr(x, y), "ssim": ssim(x, y, self.num_threads)}
        if "lpips" in rows:
            batch["lpips"] = rows["lpips"]
        for name, values in batch.items():
            self.per_image.setdefault(name, []).append(values)
        if "codes" in rows:
            self.code_counts += np.bincount(rows["codes"].ravel(), minlength=len(self.code_counts))
        if "features" in rows:
            new = Moments.of(rows["features"]), Moments.of(rows["reconstructions_features"])
            old = self.moments
            self.moments = new if old is None else (old[0] + new[0], old[1] + new[1])
        if self.num_shown > 0:
            pairs = np.stack([x, y], axis=1)[: self.num_shown]
            self.num_shown -= len(pairs)
            self.shown.append(pairs.reshape(-1, *x.shape[1:]))

    def figures(self) -> dict[str, float]:
        """What `measure_reconstructions` returns."""
        found: dict[str, float] = {}
        for name, batches in self.per_image.items():
            values = np.concatenate(batches).astype(np.float64)
            found[name], found[f"{name}_std"] = float(values.mean()), float(values.std())
        if self.moments is not None:
            found["rfid"] = frechet_distance(*self.moments)
        if len(self.code_counts):
            shares = self.code_counts / self.code_counts.sum()
            occurring = shares[shares > 0]
            entropy = -np.sum(occurring * np.log(occurring))
            found["codebook_usage"] = len(occurring) / len(shares)
            found["codebook_perplexity"] = float(np.exp(entropy))
        return found
