"""Encoding and decoding tile by tile, for images whose activations do not fit in memory.

Tiles overlap and are blended. In an overlap of `o` pixels a tile counts for nothing in its outer
quarter, where it sees the padding in place of its neighbour, and rises to full weight over the
middle half as a raised cosine, so that what differs between tiles changes smoothly. Where the
network reaches no further than `o / 4` pixels, the result is that of the whole image.

An autoencoder does reach further: its group normalisation and its attention look at the whole of
what they are given, so tiles differ in tone. `collage` is for that: the statistics of pieces from
all over the image stand for the image's, and all tiles are normalised by them. What is left is the
attention, which sees one tile at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.runtime.errors import UserError


def tile_starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """First pixels of the tiles along an axis of `size`, evenly spread, the last one flush.

    Neighbours share at least `overlap` pixels. A size of at most `tile` has the one start 0.
    """
    if size <= tile:
        return np.zeros(1, np.int32)
    count = 1 + -(-(size - tile) // (tile - overlap))
    return np.round(np.linspace(0, size - tile, count)).astype(np.int32)


def tile_weights(size: int, tile: int, overlap: int, starts: np.ndarray) -> np.ndarray:
    """Weight of each pixel of each tile, [tiles, tile] float32; over a pixel's tiles they sum to 1.

    `tile` is at most `size`. The image's own borders get no ramp.
    """
    margin = overlap / 4
    distance = np.arange(tile) + 0.5  # from the tile's first border, in pixels
    rise = np.clip((distance - margin) / max(overlap - 2 * margin, 1e-9), 0.0, 1.0)
    rise = 0.5 - 0.5 * np.cos(np.pi * rise)
    weights = np.ones((len(starts), tile))
    weights[1:] *= rise
    weights[:-1] *= rise[::-1]
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    whole = [total[start : start + tile] for start in starts]
    return (weights / np.stack(whole)).astype(np.float32)


def tiled_decode(
    decode: Callable[[jax.Array], jax.Array],
    z: jax.Array,
    *,
    factor: int,
    tile: int,
    overlap: int,
) -> jax.Array:
    """Decodes latents of any size with the memory of one tile and the image.

    Args:
      decode: latents [B, t, t, c] -> images [B, t * factor, t * factor, C], t = tile / factor;
        latents that are smaller than a tile along an axis keep their size there.
      z: latents [B, h, w, c].
      factor: downsampling factor of the autoencoder.
      tile: side of a tile in pixels of the image, a multiple of `factor`.
      overlap: the least that neighbours share, likewise, less than `tile`.

    Returns:
      Images [B, h * factor, w * factor, C] in the dtype of `decode`.

    Raises:
      UserError: for a tile or an overlap that does not fit the factor or each other.
    """
    check_tiles(factor, tile, overlap)
    return _blend(decode, z, tile // factor, overlap // factor, units=(1, factor))


def tiled_encode(
    encode: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    factor: int,
    tile: int,
    overlap: int,
) -> jax.Array:
    """Encodes images of any size with the memory of one tile and the latents.

    Args:
      encode: images [B, tile, tile, C] -> moments (or latents) [B, t, t, c], t = tile / factor;
        images that are smaller than a tile along an axis keep their size there.
      x: images [B, H, W, C], of multiples of `factor`.
      factor, tile, overlap: as for `tiled_decode`.

    Returns:
      Moments [B, H / factor, W / factor, c] in the dtype of `encode`.

    Raises:
      UserError: as `tiled_decode`, and for images that are no multiple of `factor`.
    """
    check_tiles(factor, tile, overlap)
    height, width = x.shape[1:3]
    if height % factor or width % factor:
        raise UserError(
            f"tiled encoding: an image of {width}x{height} is not divisible by {factor}, "
            "the autoencoder's downsampling factor"
        )
    return _blend(encode, x, tile // factor, overlap // factor, units=(factor, 1))


def collage(x: jax.Array, size: int) -> jax.Array:
    """Pieces from all over an image, or latents, put together to one of at most `size` a side.

    Its statistics are close to those of the whole: pieces are small, but not resized. With an
    autoencoder,

      def decode(z, statistics):
          return autoencoder.apply(
              {"params": params, **statistics}, z, method="decode", mutable=[NORM_STATISTICS]
          )

      _, statistics = decode(collage(z, tile // factor), {})
      images = tiled_decode(lambda z: decode(z, statistics)[0], z, ...)

    Args:
      x: [B, H, W, C].
      size: in pixels of x.

    Returns:
      [B, min(H, size), min(W, size), C]: up to 8 x 8 pieces of at least 8 x 8 pixels.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length <= size:
            continue
        count = max(n for n in range(1, 9) if size % n == 0 and (n == 1 or size // n >= 8))
        piece = size // count
        starts = np.round(np.linspace(0, length - piece, count)).astype(int)
        if count == 1:
            starts[:] = (length - piece) // 2
        x = jnp.take(x, (starts[:, None] + np.arange(piece)).ravel(), axis=axis)
    return x


def _blend(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    tile: int,
    overlap: int,
    *,
    units: tuple[int, int],
) -> jax.Array:
    """Applies `function` to the tiles of x one after the other, and adds up what they weigh.

    `tile` and `overlap` count latent pixels, which are `units` pixels wide in x and in the result.
    """
    unit_in, unit_out = units
    size = (x.shape[1] // unit_in, x.shape[2] // unit_in)
    rows, columns, shape = _tile_grid(size, tile, overlap)
    if shape == size:
        return function(x)
    row_weights, column_weights = (
        tile_weights(n * unit_out, t * unit_out, overlap * unit_out, starts * unit_out)
        for n, t, starts in zip(size, shape, (rows, columns), strict=True)
    )
    # Outside the loop the arrays are constants of the program; inside, one row of each is read.
    starts = jnp.asarray(_all_pairs(rows, columns))
    weights = (
        jnp.asarray(np.repeat(row_weights, len(columns), axis=0)),
        jnp.asarray(np.tile(column_weights, (len(rows), 1))),
    )
    tile_in = (shape[0] * unit_in, shape[1] * unit_in)

    def of_tile(start: jax.Array) -> jax.Array:
        return function(_cut(x, start * unit_in, tile_in))

    def paint(i: jax.Array, canvas: jax.Array) -> jax.Array:
        weight = weights[0][i][:, None, None] * weights[1][i][None, :, None]
        row, column = starts[i] * unit_out
        old = _cut(canvas, starts[i] * unit_out, weight.shape[:2])
        new = old + weight * of_tile(starts[i])
        return jax.lax.dynamic_update_slice(canvas, new, (0, row, column, 0))

    result = jax.eval_shape(of_tile, starts[0])
    canvas = jnp.zeros(
        (x.shape[0], size[0] * unit_out, size[1] * unit_out, result.shape[-1]), jnp.float32
    )
    return jax.lax.fori_loop(0, len(starts), paint, canvas).astype(result.dtype)


def _tile_grid(
    size: tuple[int, int], tile: int, overlap: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Starts of the rows and of the columns of tiles, and a tile's height and width."""
    height, width = size
    return (
        tile_starts(height, tile, overlap),
        tile_starts(width, tile, overlap),
        (min(height, tile), min(width, tile)),
    )


def _all_pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Starts of all tiles, row by row, [tiles, 2]."""
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _cut(x: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The [B, *shape, C] of x [B, H, W, C] that begins at `start`, a row and a column."""
    row, column = start
    return jax.lax.dynamic_slice(x, (0, row, column, 0), (x.shape[0], *shape, x.shape[3]))


def check_tiles(factor: int, tile: int, overlap: int) -> None:
    """Raises UserError for a tile or an overlap that does not fit the factor or each other."""
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value < 0 or value % factor:
            raise UserError(
                f"tiling: {name}={value} pixels is not a multiple of {factor}, the autoencoder's "
                "downsampling factor"
            )
    if tile <= overlap:
        raise UserError(
            f"tiling: overlap={overlap} pixels must be less than tile={tile}, or tiles make no "
            "headway"
        )
