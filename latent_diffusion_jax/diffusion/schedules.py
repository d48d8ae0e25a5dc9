"""Noise schedules: how much noise at which timestep.

Which of the timesteps a sampler visits is in `diffusion/noise_levels.py`, learning-rate schedules
are in `training/optimizer.py`.
"""

import dataclasses

import numpy as np

COSINE_SHIFT = 0.008  # Improved DDPM, section 3.2
MAX_BETA = 0.999
MAX_TIMESTEPS = 100_000


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I).

    Attributes:
      alphas_cumprod: alpha_bar_t for t = 0 .. T-1, float64, falling. The last one is 0 where the
        schedule ends in pure noise ("zero terminal SNR"), else positive.
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where they are not that."""
        alphas = np.asarray(self.alphas_cumprod)
        if alphas.ndim != 1 or not 1 <= len(alphas) <= MAX_TIMESTEPS:
            raise ValueError(f"a noise schedule has 1 to {MAX_TIMESTEPS} timesteps")
        if not (np.all(np.diff(np.append(1.0, alphas)) < 0) and alphas[-1] >= 0):
            raise ValueError(
                "the betas of a noise schedule must be above 0 and at most 1, and so far from 0 "
                "that alpha_bar falls at each step, and does not fall to 0 before the last"
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> np.ndarray:
        """Variance of the noise that each timestep adds, [T]."""
        return 1.0 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Betas on a line (DDPM, section 4); CompVis' code calls it "sqrt_linear"."""
    return np.linspace(beta_start, beta_end, num_timesteps)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Square roots of the betas on a line: what LDM's configs call "linear"."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2


def sqrt_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Squares of the betas on a line (an option of CompVis' code)."""
    return np.linspace(beta_start, beta_end, num_timesteps) ** 0.5


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Betas on a logistic curve from -6 to 6 (GeoDiff)."""
    curve = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))
    return beta_start + (beta_end - beta_start) * curve


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """alpha_bar on a squared cosine (Improved DDPM, equation 17); start and end are not used."""
    del beta_start, beta_end
    t = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bar = np.cos((t + COSINE_SHIFT) / (1.0 + COSINE_SHIFT) * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "sqrt": sqrt_betas,
    "sigmoid": sigmoid_betas,
    "cosine": cosine_betas,
}


def make_schedule(
    name: str,
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Builds a schedule by name.

    Args:
      name: one of `BETAS`.
      num_timesteps: T.
      beta_start, beta_end: first and last beta.
      zero_terminal_snr: rescale so that nothing of z_0 is left at T-1.

    Raises:
      ValueError: the name is not one of `BETAS`, the betas are not in (0, 1), or there are too many
        timesteps or none.
    """
    if name not in BETAS:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(BETAS)}")
    if not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps={num_timesteps} must be 1 to {MAX_TIMESTEPS}")
    betas = BETAS[name](num_timesteps, beta_start, beta_end)
    if not (betas > 0).all() or not (betas < 1).all():
        raise ValueError(f"betas must lie in (0, 1); beta_start={beta_start}, beta_end={beta_end}")
    schedule = NoiseSchedule(np.cumprod(1.0 - betas))
    return rescaled_to_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def rescaled_to_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shifts and scales sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al.,
    2024, algorithm 1)."""
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule(root**2)
