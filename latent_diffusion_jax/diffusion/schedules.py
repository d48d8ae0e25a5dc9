"""Noise schedules (how much noise at which timestep) and the timesteps that a sampler visits.

Learning-rate schedules are in `training/optimizer.py`.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I).

    Attributes:
      alphas_cumprod: alpha_bar_t for t = 0 .. T-1, float64, falling.
    """

    alphas_cumprod: np.ndarray

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Betas on a line (DDPM, section 4)."""
    return np.linspace(beta_start, beta_end, num_timesteps)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Square roots of the betas on a line: what LDM's configs call "linear"."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2


BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}


def make_schedule(
    name: str, num_timesteps: int, beta_start: float, beta_end: float
) -> NoiseSchedule:
    """Builds a schedule by name.

    Raises:
      ValueError: the name is not one of `BETAS`, or the betas are not in (0, 1).
    """
    if name not in BETAS:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(BETAS)}")
    betas = BETAS[name](num_timesteps, beta_start, beta_end)
    if not (betas > 0).all() or not (betas < 1).all():
        raise ValueError(f"betas must lie in (0, 1); beta_start={beta_start}, beta_end={beta_end}")
    return NoiseSchedule(np.cumprod(1.0 - betas))


def sampling_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """Exactly `num_steps` timesteps, evenly spaced and falling from T-1 ("trailing" spacing).

    Starts at the noisiest timestep that training saw, which leading spacing does not (Lin et al.,
    2024, table 2).

    Returns:
      int32 array [num_steps], strictly falling, first element T-1.

    Raises:
      ValueError: num_steps is not in 1 .. T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"number of sampling steps must be in 1..{num_timesteps}, got {num_steps}")
    spaced = num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)
    return np.round(spaced).astype(np.int32) - 1
