"""Samplers by name: how to space the noise levels, and the plan of how to go through them.

A new one is a function in `diffusion/solvers.py` and a line in `SAMPLERS`. All on the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from latent_diffusion_jax.diffusion import solvers
from latent_diffusion_jax.diffusion.noise_levels import (
    NoiseLevels,
    noise_levels,
    spaced_timesteps,
)
from latent_diffusion_jax.diffusion.plan import Plan, Row, make_plan
from latent_diffusion_jax.diffusion.process import z_0_coefficients
from latent_diffusion_jax.diffusion.schedules import NoiseSchedule
from latent_diffusion_jax.diffusion.solvers import Move

LCM_STEPS = 50  # of the grid that latent consistency models are distilled on


def lcm_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """Timesteps of `lcm`: spread over the grid that the model was distilled on.

    Raises:
      ValueError: more steps than the grid has.
    """
    grid = min(LCM_STEPS, num_timesteps)
    if not 1 <= num_steps <= grid:
        raise ValueError(f"number of sampling steps of lcm must be in 1..{grid}, got {num_steps}")
    known = (np.arange(grid, 0, -1) * (num_timesteps // grid) - 1).astype(np.float64)
    return known[np.floor(np.linspace(0, grid, num_steps, endpoint=False)).astype(int)]


class Sampler(NamedTuple):
    """A family of plans.

    Attributes:
      moves: (levels, options) -> moves.
      spacing: of timesteps, where nothing else is said; that of diffusers.
      one_more: spaces timesteps with `one_more`, as in diffusers.
      scaled_start: starts from noise of the first level's sigma instead of 1, as in k-diffusion.
      between: may ask the network between two timesteps, as k-diffusion does.
      early_end: may stop at the level of timestep 0, as Stable Diffusion's DDIM and PLMS do.
      karras_range, karras_round: see `noise_levels`.
      timesteps: (T, steps) -> timesteps, where the sampler has its own whatever the spacing.
      options: of the solver, those that a user chooses.
    """

    moves: Callable[..., list[Move]]
    spacing: str = "linspace"
    one_more: bool = False
    scaled_start: bool = False
    between: bool = False
    early_end: bool = False
    karras_range: str = "schedule"
    karras_round: bool = False
    timesteps: Callable[[int, int], np.ndarray] | None = None
    options: tuple[str, ...] = ()


_EULER: dict[str, Any] = {"scaled_start": True, "karras_range": "timesteps", "between": True}
_DPM: dict[str, Any] = {"one_more": True, "karras_round": True}
SAMPLERS = {
    "ddpm": Sampler(solvers.ddpm, "leading", options=("variance",)),
    "ddim": Sampler(solvers.ddim, "leading", early_end=True, options=("eta", "epsilon_of_clipped")),
    "plms": Sampler(solvers.plms, "leading", early_end=True),
    "euler": Sampler(solvers.ddim, **_EULER),
    "euler_ancestral": Sampler(functools.partial(solvers.ddim, eta=1.0), **_EULER),
    "heun": Sampler(solvers.heun, **_EULER),
    "dpm++_2m": Sampler(solvers.dpm_solver_pp_2m, **_DPM),
    "dpm++_2m_sde": Sampler(functools.partial(solvers.dpm_solver_pp_2m, stochastic=True), **_DPM),
    "dpm++_2s": Sampler(solvers.dpm_solver_pp_2s, **_DPM),
    "unipc": Sampler(solvers.unipc, **_DPM),
    "lcm": Sampler(solvers.lcm, "leading", timesteps=lcm_timesteps),
}


def plan_sampler(
    name: str,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_steps: int,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    sigmas: str = "schedule",
    final: str = "zero",
    strength: float | None = None,
    clip: float | None = None,
    **options: Any,
) -> Plan:
    """The plan of a sampler by name.

    Args:
      name: one of `SAMPLERS`.
      schedule: the forward process.
      prediction_type: what the network predicts, one of `PREDICTION_TYPES`.
      num_steps: 1 .. T.
      spacing, offset: see `spaced_timesteps`; "" for the sampler's own.
      sigmas, final: see `noise_levels`; `final` counts for samplers with `early_end`.
      strength: None to start from noise; else the plan starts from latents with noise (SDEdit,
        Meng et al., 2022), and this share in [0, 1] of the steps is carried out, the last ones; 0
        gives the latents back.
      clip: bound on |z_0|, for pixels; None for none.
      options: of the solver's own: `eta` and `epsilon_of_clipped` of ddim, `variance` of ddpm,
        `order` of unipc.

    Raises:
      ValueError: an argument is unknown or out of its range, or sampler, schedule and prediction
        type do not fit one another.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    if strength is not None and not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    if prediction_type == "epsilon" and schedule.alphas_cumprod[-1] <= 0.0:
        raise ValueError(
            "a network that predicts epsilon does not fit a schedule that ends in pure noise: it "
            "says nothing of z_0 there; v does"
        )
    sampler = SAMPLERS[name]
    spacing = spacing or sampler.spacing
    if sampler.timesteps is not None:
        timesteps = sampler.timesteps(schedule.num_timesteps, num_steps)
    else:
        timesteps = spaced_timesteps(
            schedule.num_timesteps,
            num_steps,
            spacing,
            offset,
            sampler.one_more,
            sampler.between,
        )
    levels = noise_levels(
        schedule,
        timesteps,
        sigmas,
        final if sampler.early_end else "zero",
        karras_range=sampler.karras_range,
        karras_round=sampler.karras_round,
    )
    if strength is not None:
        left = int(len(timesteps) * strength)
        if strength and not left:
            raise ValueError(
                f"strength={strength} of {num_steps} steps leaves none to carry out; it must be at "
                f"least {1 / len(timesteps):.3g}"
            )
        if not left:
            return make_plan([], 1.0, 0.0)
        levels = NoiseLevels(*(column[len(timesteps) - left :] for column in levels))
    rows = rows_between(levels, sampler.moves(levels, **options), prediction_type, clip)
    # Whatever level is reached, the result is taken for clean.
    rows[-1] = rows[-1]._replace(alpha=1.0, sigma=0.0)
    if strength is not None:
        return make_plan(rows, levels.alpha[0], levels.sigma[0])
    scaled = sampler.scaled_start and spacing != "leading"
    return make_plan(rows, 0.0, levels.sigma[0] if scaled else 1.0)


def rows_between(
    levels: NoiseLevels,
    moves: Sequence[Move],
    prediction_type: str,
    clip: float | None = None,
) -> list[Row]:
    """The rows of a plan that makes these moves; arguments as for `plan_sampler`."""
    bound = np.inf if clip is None else clip
    return [_row(move, levels, prediction_type, bound) for move in moves]


def _row(move: Move, levels: NoiseLevels, prediction_type: str, clip: float) -> Row:
    alpha, sigma = levels.alpha[move.at], levels.sigma[move.at]
    from_z, from_prediction = z_0_coefficients(prediction_type, alpha, sigma)
    # epsilon = (z - alpha z_0) / sigma
    epsilon_from_z = (1.0 - alpha * from_z) / sigma
    epsilon_from_prediction = -alpha * from_prediction / sigma
    remembered = (0.0, 1.0) if move.memory == "z_0" else (1.0 / sigma, -alpha / sigma)
    kept = {name: getattr(move, name) for name in Move._fields if name in Row._fields}
    kept["z_from_z"] += move.z_from_epsilon * epsilon_from_z
    return Row(
        timestep=levels.timesteps[move.at],
        z_0_from_z=from_z,
        z_0_from_prediction=from_prediction,
        memory_from_z=remembered[0],
        memory_from_z_0=remembered[1],
        z_from_prediction=move.z_from_epsilon * epsilon_from_prediction,
        alpha=levels.alpha[move.to],
        sigma=levels.sigma[move.to],
        clip=clip,
        **kept,
    )
