"""The noise levels that a sampler visits: spacings of timesteps, Karras' sigmas, LDM's own lists.

All on the host, in float64.
"""

from typing import NamedTuple

import numpy as np

from latent_diffusion_jax.diffusion.schedules import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace", "ldm_uniform", "ldm_quad")
SIGMAS = ("schedule", "karras")
FINAL = ("zero", "first")
KARRAS_RHO = 7.0


class NoiseLevels(NamedTuple):
    """Levels in falling order; a sampler goes from each to the next.

    Attributes:
      timesteps: what the network is told at each level but the last, [S]; may lie between two.
      alpha: share of z_0, sqrt(alpha_bar), [S + 1]; the last entry is the level reached.
      sigma: standard deviation of the noise, sqrt(1 - alpha_bar), [S + 1].
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def log_snr(self) -> np.ndarray:
        """lambda = log(alpha / sigma), [S + 1]; infinite at sigma = 0, and finite at alpha = 0."""
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(self.alpha, 1e-10)) - np.log(self.sigma)


def spaced_timesteps(
    num_timesteps: int,
    num_steps: int,
    spacing: str = "trailing",
    offset: int = 0,
    one_more: bool = False,
    between: bool = False,
) -> np.ndarray:
    """Timesteps to visit, falling; exactly `num_steps` of them but for LDM's own lists.

    Args:
      num_timesteps: T of the schedule.
      num_steps: 1 .. T.
      spacing: `trailing` starts at T-1, the noisiest timestep that training saw; `leading` ends at
        0 and may start far from T-1; `linspace` has both (Lin et al., 2024, table 2, compares the
        three). `ldm_uniform` and `ldm_quad` are the lists of CompVis' DDIM, for parity: they may
        have more or fewer entries.
      offset: added to `leading` timesteps as far as they stay below T; 1 in Stable Diffusion.
      one_more: space `leading` and `linspace` for one step more and leave out timestep 0, as
        diffusers does for its DPM-Solver and UniPC.
      between: leave `linspace` between two timesteps, as k-diffusion does.

    Returns:
      [S], float64.

    Raises:
      ValueError: num_steps is not in 1 .. T, the offset is negative, or the spacing is unknown or
        has no such list.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"number of sampling steps must be in 1..{num_timesteps}, got {num_steps}")
    if offset < 0:  # timesteps below 0 would be taken for the last ones
        raise ValueError(f"offset of timesteps must not be negative, got {offset}")
    parts = num_steps + one_more
    if spacing == "trailing":
        found = np.round(num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)) - 1
    elif spacing == "linspace":
        found = np.linspace(0, num_timesteps - 1, parts)[::-1][:num_steps]
        if not between and parts <= num_timesteps:  # more than that fall together
            found = np.round(found)
    elif spacing == "leading":
        stride = max(num_timesteps // parts, 1)
        found = np.arange(parts)[::-1][:num_steps] * stride
        found = found + min(offset, num_timesteps - 1 - int(found[0]))
    elif spacing == "ldm_uniform":
        found = np.arange(0, num_timesteps, num_timesteps // num_steps)[::-1] + 1
    elif spacing == "ldm_quad":
        found = (np.linspace(0, (0.8 * num_timesteps) ** 0.5, num_steps) ** 2).astype(int)[::-1] + 1
    else:
        raise ValueError(f"unknown timestep spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    if found[0] >= num_timesteps or found[-1] < 0 or (np.diff(found) >= 0).any():
        raise ValueError(
            f"{spacing} spacing has no list of {num_steps} steps for {num_timesteps} timesteps"
        )
    return found.astype(np.float64)


def noise_levels(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    sigmas: str = "schedule",
    final: str = "zero",
    *,
    karras_range: str = "schedule",
    karras_round: bool = False,
) -> NoiseLevels:
    """The levels at some timesteps, and the one that the last step reaches.

    Args:
      schedule: the forward process.
      timesteps: falling [S]; those between two have their sigma / alpha on a line between them.
      sigmas: `schedule` for those of the timesteps; `karras` for as many with sigma / alpha spaced
        by its seventh root (EDM, equation 5), and the timesteps that go with them.
      final: `zero` for clean latents at the end, `first` for the level of timestep 0, which
        Stable Diffusion's DDIM and PLMS stop at.
      karras_range: largest and smallest of Karras' sigmas are those of the `schedule`, or of the
        `timesteps`.
      karras_round: tell the network whole timesteps.

    Raises:
      ValueError: a name is unknown, or the schedule ends in pure noise, which Karras' sigmas cannot
        have.
    """
    alpha_bar = schedule.alphas_cumprod
    if sigmas == "schedule":
        low = np.floor(timesteps).astype(int)
        high = np.minimum(low + 1, schedule.num_timesteps - 1)
        share = timesteps - low
        whole = share == 0
        with np.errstate(divide="ignore", invalid="ignore"):  # at an alpha of 0
            ratio = np.sqrt((1.0 - alpha_bar) / alpha_bar)
            between = ratio[low] + share * (ratio[high] - ratio[low])
        levels = np.where(whole, alpha_bar[low], 1.0 / (1.0 + between**2))
    elif sigmas == "karras":
        if alpha_bar[-1] <= 0.0:
            raise ValueError("Karras' sigmas do not fit a schedule that ends in pure noise")
        ratio = np.sqrt((1.0 - alpha_bar) / alpha_bar)
        ends = (ratio[-1], ratio[0])
        if karras_range == "timesteps":
            ends = tuple(np.interp((timesteps[0], timesteps[-1]), np.arange(len(ratio)), ratio))
        largest, smallest = (end ** (1.0 / KARRAS_RHO) for end in ends)
        ramp = np.linspace(0.0, 1.0, len(timesteps))
        spaced = (largest + ramp * (smallest - largest)) ** KARRAS_RHO
        timesteps = np.interp(np.log(spaced), np.log(ratio), np.arange(len(ratio)))
        timesteps = np.round(timesteps) if karras_round else timesteps
        levels = 1.0 / (1.0 + spaced**2)
    else:
        raise ValueError(f"unknown sigmas {sigmas!r}; known: {', '.join(SIGMAS)}")
    if final not in FINAL:
        raise ValueError(f"unknown final level {final!r}; known: {', '.join(FINAL)}")
    levels = np.append(levels, 1.0 if final == "zero" else alpha_bar[0])
    return NoiseLevels(timesteps, np.sqrt(levels), np.sqrt(1.0 - levels))
