"""Quantisers of VQ autoencoders: a learned codebook, and finite scalar quantisation.

Both turn latents [B, h, w, c] into the nearest of finitely many vectors, with the straight-through
estimator: the gradient passes as if nothing had been rounded.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

CODES_AT_ONCE = 1024  # whose distances are in memory at the same time


@flax.struct.dataclass
class Quantized:
    """What a quantiser makes of latents [B, h, w, c].

    Attributes:
      latents: the quantised vectors [B, h, w, c]; gradients pass straight through to the input.
      indices: of the codes, int32 [B, h, w].
      codebook_loss: squared distance that moves the codes towards the latents, averaged over an
        image: [B]. Zero where there is no codebook.
      commitment_loss: the same distance, which moves the latents towards the codes: [B].
    """

    latents: jax.Array
    indices: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` in value, `z` in gradient."""
    return z + jax.lax.stop_gradient(quantized - z)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest code, the first of several: [..., c], [n, c] -> int32 [...].

    Goes through the codebook in blocks, so that memory grows with the latents alone.
    """
    n = len(codebook)
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))

    def closest(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        # |z - e|^2 without |z|^2, which is the same for all codes. Full precision: a product in
        # bfloat16, the default of TPUs, would pick other codes.
        products = jnp.einsum("...c,nc->...n", z, codes, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(jnp.square(codes), axis=-1) - 2.0 * products
        index = jnp.argmin(distances, axis=-1)
        return jnp.min(distances, axis=-1), index.astype(jnp.int32)

    if n <= CODES_AT_ONCE:
        return closest(codebook)[1]
    blocks = math.ceil(n / CODES_AT_ONCE)
    # Filled up with copies of the first code, which never win against it.
    filled = jnp.concatenate(
        [codebook, jnp.broadcast_to(codebook[:1], (blocks * CODES_AT_ONCE - n, codebook.shape[1]))]
    )

    def step(best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]):
        codes, start = block
        distance, index = closest(codes)
        closer = distance < best[0]
        return (
            jnp.where(closer, distance, best[0]),
            jnp.where(closer, start + index, best[1]),
        ), None

    first = closest(filled[:CODES_AT_ONCE])
    rest = filled[CODES_AT_ONCE:].reshape(blocks - 1, CODES_AT_ONCE, -1)
    starts = CODES_AT_ONCE * jnp.arange(1, blocks, dtype=jnp.int32)
    return jax.lax.scan(step, first, (rest, starts))[0][1]


class VectorQuantizer(nn.Module):
    """A learned codebook (van den Oord et al., 2017; VQGAN, section 3.1)."""

    codebook_size: int
    dim: int

    def setup(self):
        def init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-1.0 / shape[0], maxval=1.0 / shape[0])

        self.codebook = self.param("codebook", init, (self.codebook_size, self.dim))

    def indices(self, z: jax.Array) -> jax.Array:
        """Latents [..., c] -> index of the nearest code, int32 [...]."""
        return nearest(z, self.codebook)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Indices [...] -> codes [..., c]."""
        return self.codebook[indices]

    def __call__(self, z: jax.Array) -> Quantized:
        z = z.astype(jnp.float32)
        indices = self.indices(z)
        codes = self.lookup(indices)
        return Quantized(
            latents=straight_through(z, codes),
            indices=indices,
            codebook_loss=_mean_square(codes - jax.lax.stop_gradient(z)),
            commitment_loss=_mean_square(z - jax.lax.stop_gradient(codes)),
        )


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to one of a few values in [-1, 1] (FSQ; Mentzer et al., 2023).

    Needs no codebook and no loss of its own: every combination of the levels is a code.
    """

    levels: Sequence[int]  # values of each channel, at least 3 (of 2, one is hardly ever reached)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def _basis(self) -> np.ndarray:
        """What a step in each channel adds to the index."""
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    def _round(self, z: jax.Array) -> jax.Array:
        """Latents -> integers around 0, one of `levels` in each channel; straight-through."""
        levels = np.asarray(self.levels)
        # A little wider than the range, so that the outermost values can be reached.
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2, 0.0, 0.5)  # an even number of values has none at 0
        shift = np.arctanh(offset / half)
        bounded = jnp.tanh(z + shift.astype(np.float32)) * half.astype(np.float32) - offset.astype(
            np.float32
        )
        return straight_through(bounded, jnp.round(bounded))

    def _to_indices(self, integers: jax.Array) -> jax.Array:
        digits = integers.astype(jnp.int32) + np.asarray(self.levels, np.int32) // 2
        return jnp.sum(digits * self._basis(), axis=-1)

    def indices(self, z: jax.Array) -> jax.Array:
        """Latents [..., c] -> int32 [...] below the product of the levels."""
        return self._to_indices(self._round(z.astype(jnp.float32)))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Indices [...] -> codes [..., c] in [-1, 1]."""
        levels = np.asarray(self.levels, np.int32)
        digits = indices[..., None] // self._basis() % levels
        return (digits - levels // 2).astype(jnp.float32) / (levels // 2).astype(np.float32)

    def __call__(self, z: jax.Array) -> Quantized:
        rounded = self._round(z.astype(jnp.float32))
        none = jnp.zeros(z.shape[0])
        return Quantized(
            latents=rounded / (np.asarray(self.levels) // 2).astype(np.float32),
            indices=self._to_indices(jax.lax.stop_gradient(rounded)),
            codebook_loss=none,
            commitment_loss=none,
        )


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=(1, 2, 3))
