"""From a request to images as one pure function: text encoder, guided sampling loop, decoder."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.conditioning.base import Cond
from latent_diffusion_jax.diffusion import plan as plans
from latent_diffusion_jax.diffusion.guidance import classifier_free, unguided
from latent_diffusion_jax.diffusion.noise_levels import FINAL, SIGMAS, SPACINGS
from latent_diffusion_jax.diffusion.plan import Plan
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, plan_sampler
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule
from latent_diffusion_jax.diffusion.solvers import VARIANCES
from latent_diffusion_jax.ldm import Inputs, LatentDiffusion, Params
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_uint8
from latent_diffusion_jax.runtime.randomness import normal_per_key


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; numbers in an argument of the program, so that none of them compiles anew.

    Attributes:
      sampler: one of `SAMPLERS`.
      steps: 1 .. T.
      guidance_scale: 1 is no guidance; more follows the prompt more closely.
      guidance_rescale: see `guidance.classifier_free`.
      guidance_interval: (low, high) in [0, 1] of T, outside of which there is no guidance.
      eta: noise of DDIM, 0 for none.
      epsilon_of_clipped: of DDIM with `clip`, see `solvers.ddim`.
      variance: of DDPM's noise, one of `VARIANCES`.
      spacing, offset: see `noise_levels.spaced_timesteps`; "" for the sampler's own.
      sigmas, final: see `noise_levels.noise_levels`; `final` is for samplers with `early_end`.
      clip: bound on |z_0|, for models in the space of pixels; 0 for none.
    """

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    epsilon_of_clipped: bool = True
    variance: str = "posterior"
    spacing: str = "trailing"
    offset: int = 0
    sigmas: str = "schedule"
    final: str = "zero"
    clip: float = 0.0


def check(settings: Settings, num_timesteps: int) -> None:
    """Raises ValueError where a setting is of another type, unknown or out of its range."""
    for name in ("steps", "offset"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be an integer, got {value!r:.60}")
    for name in ("guidance_scale", "guidance_rescale", "eta", "clip"):
        value = getattr(settings, name)
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
    if not isinstance(settings.epsilon_of_clipped, bool):
        raise ValueError(
            f"epsilon_of_clipped must be true or false, got {settings.epsilon_of_clipped!r:.60}"
        )
    for name, what, known in (
        ("sampler", "sampler", tuple(SAMPLERS)),
        ("variance", "variance", VARIANCES),
        ("spacing", "timestep spacing", ("", *SPACINGS)),
        ("sigmas", "sigmas", SIGMAS),
        ("final", "final level", FINAL),
    ):
        value = getattr(settings, name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"unknown {what} {value!r:.60}; known: {', '.join(filter(None, known))}"
            )
    interval = settings.guidance_interval
    if not isinstance(interval, tuple | list) or [*map(_is_number, interval)] != [True, True]:
        raise ValueError(f"guidance_interval must be two numbers, got {interval!r:.60}")
    low, high = interval
    for name, value, most in (
        ("eta", settings.eta, 1.0),
        ("guidance_rescale", settings.guidance_rescale, 1.0),
        ("guidance_interval's start", low, high),
        ("guidance_interval's end", high, 1.0),
    ):
        if not 0.0 <= value <= most:
            raise ValueError(f"{name} must be in [0, {most:g}], got {value}")
    for name, value in (("offset", settings.offset), ("clip", settings.clip)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not 1 <= settings.steps <= num_timesteps:
        raise ValueError(
            f"number of sampling steps must be in 1..{num_timesteps}, got {settings.steps}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def make_plan(
    schedule: NoiseSchedule,
    prediction_type: str,
    settings: Settings,
    strength: float | None = None,
    num_previews: int = 0,
) -> Plan:
    """The plan of a model's sampler, as long as any of the model's plans: they share a program.

    Args:
      schedule, prediction_type: the model's.
      settings: what to do.
      strength: see `plan_sampler`.
      num_previews: see `with_previews`.

    Raises:
      ValueError: a setting is unknown or out of its range, or does not fit the model.
    """
    check(settings, schedule.num_timesteps)
    options = SAMPLERS[settings.sampler].options
    plan = plan_sampler(
        settings.sampler,
        schedule,
        prediction_type,
        settings.steps,
        spacing=settings.spacing,
        offset=settings.offset,
        sigmas=settings.sigmas,
        final=settings.final,
        strength=strength,
        clip=settings.clip or None,
        **{name: getattr(settings, name) for name in options},
    )
    timesteps = schedule.num_timesteps
    plan = plans.with_guidance(
        plan,
        settings.guidance_scale,
        settings.guidance_rescale,
        settings.guidance_interval,
        timesteps - 1,
    )
    plan = plans.with_previews(plan, num_previews)
    return plans.padded(plan, 2 * timesteps)  # Heun's sampler calls the network twice a step


@flax.struct.dataclass
class Request:
    """What to draw: arrays with a leading axis B. What is None makes another, smaller program.

    Attributes:
      seeds: uint32 [B]; row i of the images depends on row i of all of these alone.
      inputs: of the condition, see `LatentDiffusion.condition`; empty for an unconditional model.
      null_inputs: of what guidance leads away from: the empty prompt, or a negative one, or the
        label for "no label"; None for the model without guidance, at half the cost.
      variation_seeds: of other noise that the start is turned towards.
      variation_strength: [], 0 .. 1, how far.
      noise: to start from [B, h, w, c], in place of what the seeds give.
      image: to start from, or to be painted into, [B, H, W, C] in [-1, 1].
      mask: [B, H, W, 1], 1 where to paint.
    """

    seeds: jax.Array
    inputs: Inputs = dataclasses.field(default_factory=dict)
    null_inputs: Inputs | None = None
    variation_seeds: jax.Array | None = None
    variation_strength: jax.Array | None = None
    noise: jax.Array | None = None
    image: jax.Array | None = None
    mask: jax.Array | None = None


# (params, request, plan) -> (images [B, H, W, C], previews [N, B, H, W, C]), both in [-1, 1]
Draw = Callable[[Params, Request, Plan], tuple[jax.Array, jax.Array]]


def make_draw(
    ldm: LatentDiffusion, height: int, width: int, *, num_previews: int = 0, masked: bool = False
) -> Draw:
    """The whole of sampling as one pure function, to be jitted.

    Args:
      ldm: the networks.
      height, width: of the images, in pixels.
      num_previews: how often the predicted images are shown on the way; see `with_previews`.
      masked: the UNet sees the mask and the masked image's latents beside z_t, as in Stable
        Diffusion's inpainting models; otherwise parts that are not to be painted are put back
        after every step.

    Raises:
      ValueError: the networks do not divide height and width.
    """
    shape = ldm.shape_of(height, width)

    def draw(params: Params, request: Request, plan: Plan) -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(jax.random.key)(request.seeds)
        start_keys, step_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        noise = _starting_noise(request, start_keys, shape)
        chex.assert_shape(noise, (len(request.seeds), *shape))

        def encode(images: jax.Array, stream: int) -> jax.Array:
            posterior_keys = jax.vmap(jax.random.fold_in, (0, None))(start_keys, stream)
            return ldm.encode(params, images, normal_per_key(posterior_keys, shape))

        known = None if request.image is None else encode(request.image, 0)
        z = plans.start(plan, noise, known)
        concat, constrain = None, None
        if request.mask is not None:
            assert request.image is not None and known is not None
            mask = _shrunk(request.mask, shape)
            if masked:
                visible = request.image * (request.mask < 0.5)
                concat = jnp.concatenate([mask, encode(visible, 1)], axis=-1)
            else:

                def constrain(z: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
                    return mask * z + (1.0 - mask) * (alpha * known + sigma * noise)

        def condition(inputs: Inputs) -> Cond:
            return dataclasses.replace(ldm.condition(params, inputs), concat=concat)

        def network(z_t: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
            return ldm.predict(params, z_t, t, cond)

        cond = condition(request.inputs)
        if request.null_inputs is None:
            predict = unguided(network, cond)
        else:
            null = condition(request.null_inputs)
            predict = classifier_free(network, cond, null, plan.guidance_rescale, shape[-1])
        z_0, shown = plans.sample(
            predict, z, plan, step_keys, constrain=constrain, num_previews=num_previews
        )
        images = bounded(ldm.decode(params, z_0))
        if num_previews:
            shown = jax.lax.map(lambda z: bounded(ldm.decode(params, z)), shown)
        else:
            shown = jnp.zeros((0, *images.shape))
        return images, shown

    return draw


def bounded(images: jax.Array) -> jax.Array:
    """Images within [-1, 1]; NaN where they are not finite, as infinity would become white."""
    return jnp.where(jnp.isfinite(images), jnp.clip(images, -1.0, 1.0), jnp.nan)


def to_pictures(images: np.ndarray, whose: str, dtype: DTypeLike) -> np.ndarray:
    """Images in [-1, 1] as uint8.

    Args:
      images: of any shape.
      whose: they are, to begin a message with.
      dtype: that they were computed in.

    Raises:
      UserError: they are not finite.
    """
    if not np.isfinite(images).all():
        raise UserError(
            f"{whose} is no picture, but not finite: its weights are damaged, or too large for "
            f"{np.dtype(dtype).name}"
        )
    return to_uint8(images)


def _starting_noise(request: Request, keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    if request.noise is not None:
        return request.noise
    noise = normal_per_key(keys, shape)
    if request.variation_seeds is None:
        return noise
    other_keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[0])(
        request.variation_seeds
    )
    return _turned(noise, normal_per_key(other_keys, shape), request.variation_strength)


def _turned(a: jax.Array, b: jax.Array, share: Any) -> jax.Array:
    """From a to b on the great circle between them, which keeps the norm of noise."""
    axes = tuple(range(1, a.ndim))

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axes, keepdims=True)

    angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -0.9995, 0.9995))
    return (jnp.sin((1.0 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)


def _shrunk(mask: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A mask [B, H, W, 1] at the latents' size [B, h, w, 1], 0 or 1: each square's first pixel."""
    step = mask.shape[1] // shape[0]
    return (mask[:, ::step, ::step] >= 0.5).astype(jnp.float32)
