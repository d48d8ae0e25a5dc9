"""A sampler as a table of numbers, and the loop that carries it out.

Every solver here moves along straight combinations of what it has: the present sample, one earlier
sample that it keeps (the anchor), what the network said now and up to three times before, and fresh
noise. So a solver is a table of coefficients, made on the host in float64 by
`diffusion/samplers.py`, and one compiled loop runs them all: sampler, number of steps, strength,
guidance and even what the network predicts are numbers in an argument, not another program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.runtime.randomness import normal_per_key

MEMORY = 4  # predictions at hand in a row: this one and three before

# (z_t [B, ...], t [B], guidance scale []) -> prediction [B, ...], twice as many channels where the
# network also predicts variances.
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Row(NamedTuple):
    """One call of the network and the move after it; a plan has an array of each field.

    With z the sample, z_0 the prediction of clean latents and m what is remembered of it:
      z_0    = clip(z_0_from_z z + z_0_from_prediction prediction)
      m      = memory_from_z z + memory_from_z_0 z_0
      anchor = anchor_from_z z + anchor_from_anchor anchor + sum_k anchor_from_memory[k] m_k
      z      = z_from_z z + z_from_prediction prediction + z_from_anchor anchor
               + sum_k z_from_memory[k] m_k + deviation noise
    where m_0 is m, m_1 the one before it, and so on.

    Attributes:
      timestep: what the network is told.
      alpha, sigma: level that the sample is at afterwards.
      guidance_scale: for this call.
      clip: bound on |z_0|.
      remember: whether m counts as "the one before" in the next row.
      learned: whether the network's own variance takes the place of `deviation`.
      log_variance: (smallest, largest) that the network may choose from.
      preview: slot of the previews that z_0 is shown in, or -1.
    """

    timestep: Any
    z_0_from_z: Any
    z_0_from_prediction: Any
    memory_from_z: Any
    memory_from_z_0: Any
    z_from_z: Any
    z_from_memory: Any
    alpha: Any
    sigma: Any
    deviation: Any = 0.0
    z_from_prediction: Any = 0.0
    z_from_anchor: Any = 0.0
    anchor_from_z: Any = 0.0
    anchor_from_anchor: Any = 0.0
    anchor_from_memory: Any = (0.0,) * MEMORY
    guidance_scale: Any = 1.0
    clip: Any = np.inf
    remember: Any = True
    learned: Any = False
    log_variance: Any = (0.0, 0.0)
    preview: Any = -1


class Plan(NamedTuple):
    """All rows of a sampler, and how it starts.

    Attributes:
      rows: a `Row` of arrays [R, ...]; those after `num_rows` are not run.
      num_rows: calls of the network, int32.
      start_alpha, start_sigma: the first sample is start_alpha z_0 + start_sigma noise, with no z_0
        where there is nothing to start from.
      guidance_rescale: see `guidance.classifier_free`.
    """

    rows: Row
    num_rows: Any
    start_alpha: Any
    start_sigma: Any
    guidance_rescale: Any = np.float32(0.0)


# In the place of a plan's rows where it has none: arrays need at least one.
NOTHING = Row(
    timestep=0.0,
    z_0_from_z=0.0,
    z_0_from_prediction=0.0,
    memory_from_z=0.0,
    memory_from_z_0=0.0,
    z_from_z=0.0,
    z_from_memory=(0.0,) * MEMORY,
    alpha=1.0,
    sigma=0.0,
)


def make_plan(rows: Sequence[Row], start_alpha: float, start_sigma: float) -> Plan:
    """Rows of numbers as one plan of numpy arrays, float32 where they are not whole.

    Raises:
      ValueError: a coefficient is not finite.
    """
    columns = {}
    for name in Row._fields:
        column = np.array([getattr(row, name) for row in rows or [NOTHING]])
        if column.dtype == np.float64:
            column = column.astype(np.float32)
            if name != "clip" and not np.isfinite(column).all():
                raise ValueError(f"the sampler does not fit the schedule: {name} is not finite")
        columns[name] = column.astype(np.int32) if name == "preview" else column
    return Plan(
        Row(**columns), np.int32(len(rows)), np.float32(start_alpha), np.float32(start_sigma)
    )


def padded(plan: Plan, length: int) -> Plan:
    """The same plan with arrays of at least `length` rows: plans of one length share a program."""
    more = max(length - len(plan.rows.timestep), 0)

    def pad(column: np.ndarray) -> np.ndarray:
        return np.pad(column, ((0, more),) + ((0, 0),) * (column.ndim - 1))

    return plan._replace(rows=Row(*map(pad, plan.rows)))


def with_guidance(
    plan: Plan, scale: float, rescale: float, interval: tuple[float, float], last: int
) -> Plan:
    """The plan with a guidance scale where timestep / last is in the interval, and 1 elsewhere.

    Guidance in an interval of noise levels is Kynkaanniemi et al. (2024).

    Args:
      plan: of a sampler.
      scale: 1 is the conditional model.
      rescale: see `guidance.classifier_free`.
      interval: (low, high) in [0, 1], both included.
      last: the noisiest timestep, T - 1.
    """
    share = plan.rows.timestep / max(last, 1)
    inside = (share >= interval[0]) & (share <= interval[1])
    scales = np.where(inside, scale, 1.0).astype(np.float32)
    rows = plan.rows._replace(guidance_scale=scales)
    return plan._replace(rows=rows, guidance_rescale=np.float32(rescale))


def with_previews(plan: Plan, count: int) -> Plan:
    """The plan that shows z_0 at `count` rows spread evenly over it, the last among them.

    Raises:
      ValueError: it has not as many rows.
    """
    rows = int(plan.num_rows)
    if count > rows:
        raise ValueError(f"{count} previews need as many calls of the network, there are {rows}")
    slots = np.full(len(plan.rows.timestep), -1, np.int32)
    for slot in range(count):
        slots[(slot + 1) * rows // count - 1] = slot
    return plan._replace(rows=plan.rows._replace(preview=slots))


def start(plan: Plan, noise: jax.Array, z_0: jax.Array | None = None) -> jax.Array:
    """The first sample [B, ...], from standard normal noise and, for image to image, latents."""
    z = plan.start_sigma * noise
    return z if z_0 is None else z + plan.start_alpha * z_0


def sample(
    predict: Predict,
    z: jax.Array,
    plan: Plan,
    keys: jax.Array,
    *,
    constrain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    num_previews: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Carries out a plan; pure, and may be jitted with all array arguments traced.

    Args:
      predict: the network, with its guidance.
      z: first samples [B, ...], from `start`.
      plan: what to do.
      keys: one random key for each row of the batch, [B].
      constrain: (z, alpha, sigma) -> z, applied after every move: it may put known parts in place
        at the level (alpha, sigma).
      num_previews: slots for previews; see `with_previews`.

    Returns:
      (z_0 [B, ...], previews [num_previews, B, ...]), float32.
    """
    chex.assert_shape(keys, (z.shape[0],))
    z = z.astype(jnp.float32)
    channels = z.shape[-1]

    def combine(weights: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, (weights[k] * term for k, term in enumerate(terms)))

    def move(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        z, anchor, memory, previews = carry
        row = jax.tree.map(lambda column: jnp.asarray(column)[i], plan.rows)
        prediction = predict(z, jnp.full(z.shape[0], row.timestep), row.guidance_scale)
        prediction, variance = prediction[..., :channels], prediction[..., channels:]
        z_0 = row.z_0_from_z * z + row.z_0_from_prediction * prediction.astype(jnp.float32)
        z_0 = jnp.clip(z_0, -row.clip, row.clip)
        m = [row.memory_from_z * z + row.memory_from_z_0 * z_0, *memory]

        anchor = row.anchor_from_z * z + row.anchor_from_anchor * anchor
        anchor += combine(row.anchor_from_memory, m)
        deviation = row.deviation
        if variance.shape[-1]:
            low, high = row.log_variance
            share = (variance.astype(jnp.float32) + 1.0) / 2.0  # -1 .. 1 (Improved DDPM, eq. 15)
            learned = jnp.exp(0.5 * (low + share * (high - low)))
            deviation = jnp.where(row.learned & (deviation > 0), learned, deviation)
        noise = jax.lax.cond(
            row.deviation > 0,
            lambda: normal_per_key(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z.shape[1:]),
            lambda: jnp.zeros_like(z),
        )
        z = row.z_from_z * z + row.z_from_prediction * prediction.astype(jnp.float32)
        z += row.z_from_anchor * anchor + combine(row.z_from_memory, m) + deviation * noise
        if constrain is not None:
            z = constrain(z, row.alpha, row.sigma)

        memory = jnp.where(row.remember, jnp.stack(m[:-1]), memory)
        if num_previews:
            shown = jnp.arange(num_previews) == row.preview
            shown = shown.reshape((-1,) + (1,) * z.ndim)
            previews = jnp.where(shown, z_0, previews)
        return z, anchor, memory, previews

    carry = (
        z,
        jnp.zeros_like(z),
        jnp.zeros((MEMORY - 1, *z.shape)),
        jnp.zeros((num_previews, *z.shape)),
    )
    z, _, _, previews = jax.lax.fori_loop(0, plan.num_rows, move, carry)
    return z, previews
