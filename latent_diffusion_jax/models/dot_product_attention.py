"""The one softmax attention: on each platform the form that is fastest there."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_diffusion_jax.models import attention_kernels
from latent_diffusion_jax.models.layers import stored
from latent_diffusion_jax.runtime.context_mesh import (
    platform,
    rows_of_device,
    split_over_mesh,
)

# Numbers of scores; where there are more, they are computed in parts.
CPU_SCORES = 2**20
ACCELERATOR_SCORES = 2**27  # half a GiB


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False
) -> jax.Array:
    """Softmax attention with scores in float32.

    Batch and heads lead and the scores are kept transposed, [.., keys, queries]: XLA's CPU backend
    does this two to three times as fast as the usual order. Where there are many scores, a part of
    them exists at a time, in the backward pass too.

    Args:
      q: queries [B, N, heads, head_dim].
      k: keys [B, M, heads, head_dim].
      v: values [B, M, heads, head_dim].
      causal: each query sees the keys up to its own place only; N and M are then the same.

    Returns:
      [B, N, heads, head_dim] in the dtype of `v`.

    Raises:
      ValueError: causal, and there are not as many queries as keys.
    """
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
        )
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q = q * head_dim**-0.5
    on_cpu = step_sizes(batch, queries, heads, keys, on_cpu=True)
    otherwise = step_sizes(rows_of_device(batch), queries, heads, keys, on_cpu=False)
    default = functools.partial(_attention, causal=causal, step=otherwise)
    forms: dict[str, Callable[..., jax.Array]] = {}
    if on_cpu != otherwise:
        forms["cpu"] = functools.partial(_attention, causal=causal, step=on_cpu)
    if attention_kernels.fits_tpu(queries, keys, head_dim, causal=causal):
        forms["tpu"] = split_over_mesh(attention_kernels.tpu_attention, batch, heads)
    if attention_kernels.fits_cudnn(q.dtype, head_dim):
        cudnn = functools.partial(attention_kernels.cudnn_attention, causal=causal)
        forms["cuda"] = split_over_mesh(cudnn, batch, heads)
    known = platform()
    if known is not None:
        forms = {name: form for name, form in forms.items() if name == known}
    if not forms:
        return default(q, k, v)
    if known == "cpu":
        return forms["cpu"](q, k, v)
    # Of kernels the default is traced too: by it the model's operations are counted.
    return jax.lax.platform_dependent(q, k, v, default=default, **forms)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, step: tuple[int, int]
) -> jax.Array:
    """`dot_product_attention` of scaled queries, so many heads and queries at a time."""
    queries, heads = q.shape[1:3]
    if step != (heads, queries):
        return _attention_in_steps(q, k, v, causal, *step)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhmd,bhnd->bhmn", k, q, preferred_element_type=jnp.float32)
    if causal:
        scores = _hide_later_keys(scores, jnp.arange(queries))
    weights = jax.nn.softmax(scores, axis=-2).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhmn,bhmd->bhnd", weights, v), 1, 2)


def step_sizes(batch: int, queries: int, heads: int, keys: int, *, on_cpu: bool) -> tuple[int, int]:
    """How many heads and queries have their scores computed at a time.

    CPUs are fastest where the scores of a step stay in their caches; accelerators want as much work
    in a step as their memory allows.
    """
    scores = batch * heads * queries * keys
    limit, group, unit = (CPU_SCORES, 1, 64) if on_cpu else (ACCELERATOR_SCORES, heads, 128)
    if scores <= limit:
        return heads, queries
    fitting = limit // (batch * group * keys)
    return group, min(max(fitting // unit, 1) * unit, queries)


def _hide_later_keys(scores: jax.Array, places: jax.Array) -> jax.Array:
    """Scores [.., M, N] of queries at these places [N]; later keys get no weight."""
    keys = jnp.arange(scores.shape[-2])
    return jnp.where(keys[:, None] <= places, scores, -jnp.inf)


def _attention_in_steps(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, group: int, block: int
) -> jax.Array:
    """`dot_product_attention` of scaled queries, over groups of heads and blocks of queries.

    The batch leads the first axis of every product: a batch that is spread over devices remains
    so. The number of heads is a multiple of the group.
    """
    batch, queries, heads, head_dim = q.shape
    padding = -queries % block
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(batch, -1, block, heads // group, group, head_dim)
    # [groups, blocks, rows, d, block], where rows are those of the batch for each of the group.
    q = q.transpose(3, 1, 0, 4, 5, 2).reshape(heads // group, -1, batch * group, head_dim, block)
    places = jnp.arange(queries + padding).reshape(-1, block)

    def grouped(x: jax.Array) -> jax.Array:
        """[B, M, heads, d] -> [groups, rows, M, d]."""
        keys, width = x.shape[1], x.shape[-1]
        x = x.reshape(batch, keys, heads // group, group, width).transpose(2, 0, 3, 1, 4)
        return x.reshape(heads // group, batch * group, keys, width)

    def of_group(tokens: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = tokens  # [blocks, rows, d, block], [rows, M, d], [rows, d, M]

        @jax.checkpoint
        def of_block(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, places = part
            scores = jnp.einsum("bmd,bdn->bmn", k, q, preferred_element_type=jnp.float32)
            if causal:
                scores = _hide_later_keys(scores, places)
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))
            weights = stored(weights.astype(v.dtype))
            out = jnp.einsum("bdm,bmn->bdn", v, weights, preferred_element_type=jnp.float32)
            return (out / weights.sum(1, keepdims=True, dtype=jnp.float32)).astype(v.dtype)

        return jax.lax.map(of_block, (q, places))

    out = jax.lax.map(of_group, (q, grouped(k), grouped(v).swapaxes(2, 3)))
    # [groups, blocks, rows, d, block] -> [B, N, heads, d]
    out = out.reshape(heads // group, -1, batch, group, v.shape[-1], block)
    out = out.transpose(2, 1, 5, 0, 3, 4).reshape(batch, queries + padding, heads, -1)
    return out[:, :queries]
