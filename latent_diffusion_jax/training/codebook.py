"""The codebook of a VQ autoencoder: how it is used, and learning it by moving averages.

A codebook that learns by moving averages has no gradient; dead codes are given a new place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class CodebookAverage:
    """A codebook of moving averages (van den Oord et al., 2017, appendix A.1).

    Each code is the mean of the latents that fall to it, over a window of 1 / (1 - decay) updates.

    Attributes:
      decay: of both averages, below 1.
      revive_below: a code that gets a smaller share of the latents than this, relative to an even
        share, is dead and put where a random latent of the batch is; 0 leaves dead codes alone.
    """

    decay: float
    revive_below: float

    def init(self, codebook: jax.Array) -> dict[str, jax.Array]:
        """Averages that give the codebook [n, c] and an even use of it."""
        n = len(codebook)
        return {"shares": jnp.full(n, 1.0 / n), "sums": codebook.astype(jnp.float32) / n}

    def update(
        self, averages: Any, found: Any, candidates: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The new codebook and averages.

        Args:
          averages: what `init` or the last update gave.
          found: what `statistics` gave for the batch.
          candidates: latents of the batch, [N, c].
          key: which of them replace dead codes.
        """
        rate = 1.0 - self.decay
        shares, sums = (
            averages[name] + rate * (found[name] - averages[name]) for name in ("shares", "sums")
        )
        n = len(shares)
        dead = shares * n < self.revive_below
        chosen = candidates[jax.random.randint(key, (n,), 0, len(candidates))]
        codebook = jnp.where(dead[:, None], chosen, sums / jnp.maximum(shares, 1e-10)[:, None])
        # A revived code starts with an even share, so that it is not dead again at once.
        shares = jnp.where(dead, 1.0 / n, shares)
        return codebook, {"shares": shares, "sums": codebook * shares[:, None]}


def statistics(z: jax.Array, indices: jax.Array, num_codes: int) -> dict[str, jax.Array]:
    """What a batch says of its codes; the average over micro-batches is that of the batch.

    Args:
      z: latents before they are quantised, [..., c].
      indices: of their codes, [...].
      num_codes: size of the codebook, n.

    Returns:
      `shares` [n] of the latents that fall to a code, and `sums` [n, c] of those latents, divided
      by the number of all latents.
    """
    flat, count = indices.reshape(-1), indices.size
    sums = jax.ops.segment_sum(z.reshape(count, -1).astype(jnp.float32), flat, num_codes)
    return {"shares": usage(indices, num_codes), "sums": sums / count}


def usage(indices: jax.Array, num_codes: int) -> jax.Array:
    """Share of the latents that falls to each code: [n]."""
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1.0) / indices.size


def usage_figures(shares: jax.Array) -> dict[str, jax.Array]:
    """Share of the codes in use, and their perplexity: the exponential of the entropy of use."""
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30)))
    return {"codebook_usage": jnp.mean(shares > 0), "perplexity": jnp.exp(entropy)}
