"""Solvers: what moves take a sample from each noise level to the next, in float64 on the host.

Each is a function of the levels, and options of its own. With lambda = log(alpha / sigma), as in
DPM-Solver. `diffusion/samplers.py` makes plans of them.
"""

from typing import NamedTuple

import numpy as np

from latent_diffusion_jax.diffusion.noise_levels import NoiseLevels
from latent_diffusion_jax.diffusion.plan import MEMORY

VARIANCES = ("posterior", "beta", "learned")
LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5


def _weights(*by_age: float) -> tuple[float, ...]:
    """Coefficients of the newest prediction and those before it."""
    return (*by_age, *[0.0] * (MEMORY - len(by_age)))


class Move(NamedTuple):
    """A call of the network at one level and the move after it.

    Attributes:
      at: index of the level.
      to: index of the level that the sample is at afterwards.
      memory: what is remembered of the prediction, `z_0` or `epsilon`.
      z_from_epsilon: of the epsilon that the network predicts, before z_0 is clipped.
      others: as in `Row`.
    """

    at: int
    to: int
    z_from_z: float
    z_from_memory: tuple[float, ...]
    deviation: float = 0.0
    memory: str = "z_0"
    z_from_epsilon: float = 0.0
    z_from_anchor: float = 0.0
    anchor_from_z: float = 0.0
    anchor_from_anchor: float = 0.0
    anchor_from_memory: tuple[float, ...] = _weights()
    remember: bool = True
    learned: bool = False
    log_variance: tuple[float, float] = (0.0, 0.0)


def ddim(levels: NoiseLevels, eta: float = 0.0, epsilon_of_clipped: bool = True) -> list[Move]:
    """DDIM (Song et al., 2021, equation 12).

    With eta = 0 the same as Euler's method for the probability flow of EDM, with eta = 1 as
    k-diffusion's ancestral Euler and DDPM's posterior, on the same levels.

    Args:
      levels: to visit.
      eta: 0 is deterministic, 1 has the variance of DDPM's posterior.
      epsilon_of_clipped: where z_0 is clipped, epsilon is what makes it of the sample, as in ADM
        and k-diffusion; otherwise what the network predicts, as in diffusers.
    """
    moves = []
    for i in range(levels.num_steps):
        (a, s), (a_next, s_next) = _pairs(levels, i)
        # Equation 16.
        deviation = eta * s_next / s * np.sqrt(max(1.0 - (a / a_next) ** 2, 0.0))
        direction = np.sqrt(max(s_next**2 - deviation**2, 0.0))  # of epsilon
        move = Move(i, i + 1, 0.0, _weights(a_next), deviation, z_from_epsilon=direction)
        if epsilon_of_clipped:
            move = move._replace(
                z_from_z=direction / s,
                z_from_memory=_weights(a_next - direction * a / s),
                z_from_epsilon=0.0,
            )
        moves.append(move)
    return moves


def ddpm(levels: NoiseLevels, variance: str = "posterior") -> list[Move]:
    """Ancestral sampling (DDPM, algorithm 2), on any levels.

    Args:
      levels: to visit.
      variance: of the noise: `posterior` (DDPM's beta tilde), `beta`, or `learned`, the network's
        own choice between both (Improved DDPM, equation 15).
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    moves = []
    for i in range(levels.num_steps):
        (a, s), (a_next, s_next) = _pairs(levels, i)
        beta = 1.0 - (a / a_next) ** 2
        posterior = s_next**2 / s**2 * beta
        last = i == levels.num_steps - 1
        chosen = beta if variance == "beta" else posterior
        floor = 1e-20  # of variances, as in the references
        moves.append(
            Move(
                i,
                i + 1,
                # The posterior's mean (DDPM, equation 7).
                z_from_z=a / a_next * s_next**2 / s**2,
                z_from_memory=_weights(a_next * beta / s**2),
                deviation=0.0 if last else np.sqrt(max(chosen, floor)),
                learned=variance == "learned",
                log_variance=(np.log(max(posterior, floor)), np.log(max(beta, floor))),
            )
        )
    return moves


def plms(levels: NoiseLevels) -> list[Move]:
    """Pseudo linear multistep (PNDM, Liu et al., 2022, with its first steps as in CompVis' code).

    S + 1 calls of the network: the first step is Heun's, the others extrapolate epsilon by the
    formulas of Adams and Bashforth.
    """
    formulas = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24,
                -9 / 24))  # fmt: skip
    moves = []
    for i in range(levels.num_steps):
        shrink, push = _epsilon_move(levels, i)
        weights = np.array(formulas[min(i, 3)])
        move = Move(
            i,
            i + 1,
            memory="epsilon",
            z_from_z=shrink,
            z_from_memory=_weights(*(push * weights)),
        )
        if i == 0 and levels.num_steps > 1:
            # A look ahead from the first sample, then the step itself with the mean of both.
            moves.append(move._replace(anchor_from_z=1.0))
            moves.append(
                move._replace(
                    at=1,
                    anchor_from_anchor=1.0,
                    z_from_z=0.0,
                    z_from_anchor=shrink,
                    z_from_memory=_weights(push / 2, push / 2),
                    remember=False,
                )
            )
        else:
            moves.append(move)
    return moves


def heun(levels: NoiseLevels) -> list[Move]:
    """Heun's second-order method for the probability flow (EDM, algorithm 1), 2 S - 1 calls."""
    moves = []
    for i in range(levels.num_steps):
        shrink, push = _epsilon_move(levels, i)
        first = Move(
            i,
            i + 1,
            memory="epsilon",
            z_from_z=shrink,
            z_from_memory=_weights(push),
            anchor_from_z=1.0,
        )
        moves.append(first)
        if i < levels.num_steps - 1:  # there is no slope to average with at the end
            moves.append(
                first._replace(
                    at=i + 1,
                    anchor_from_z=0.0,
                    anchor_from_anchor=1.0,
                    z_from_z=0.0,
                    z_from_anchor=shrink,
                    z_from_memory=_weights(push / 2, push / 2),
                )
            )
    return moves


def dpm_solver_pp_2m(
    levels: NoiseLevels, stochastic: bool = False, lower_order_final: bool = True
) -> list[Move]:
    """DPM-Solver++(2M), second order with one call a step (Lu et al., 2022b, algorithm 2).

    Args:
      levels: to visit.
      stochastic: its SDE variant (k-diffusion's DPM++ 2M SDE, "midpoint").
      lower_order_final: the last of fewer than 15 steps is of first order; one that ends in clean
        latents always is.
    """
    lam, moves, last = levels.log_snr, [], levels.num_steps - 1
    for i in range(levels.num_steps):
        (_, s), (a_next, s_next) = _pairs(levels, i)
        h = lam[i + 1] - lam[i]
        first_order = i == 0 or (
            i == last and (s_next == 0.0 or (lower_order_final and levels.num_steps < 15))
        )
        slope = 0.0 if first_order else 0.5 * h / (lam[i] - lam[i - 1])
        if stochastic:
            shrink, pull = s_next / s * np.exp(-h), -a_next * np.expm1(-2.0 * h)
            deviation = s_next * np.sqrt(-np.expm1(-2.0 * h))
        else:
            shrink, pull, deviation = s_next / s, -a_next * np.expm1(-h), 0.0
        moves.append(
            Move(
                i,
                i + 1,
                z_from_z=shrink,
                z_from_memory=_weights(pull * (1.0 + slope), -pull * slope),
                deviation=deviation,
            )
        )
    return moves


def dpm_solver_pp_2s(levels: NoiseLevels) -> list[Move]:
    """DPM-Solver++(2S), second order in pairs of steps (Lu et al., 2022b, algorithm 1).

    Every second level is the point between two, so that S levels are S calls, as in diffusers.
    """
    lam, moves, count = levels.log_snr, [], levels.num_steps
    for i in range(count):
        (_, s), (a_next, s_next) = _pairs(levels, i)
        move = Move(
            i,
            i + 1,
            z_from_z=s_next / s,
            z_from_memory=_weights(-a_next * np.expm1(-(lam[i + 1] - lam[i]))),
            anchor_from_z=1.0,
        )
        if i % 2 and i < count - 1:
            h = lam[i + 1] - lam[i - 1]
            pull = -a_next * np.expm1(-h)
            slope = 0.5 * h / (lam[i] - lam[i - 1])
            move = move._replace(
                anchor_from_z=0.0,
                anchor_from_anchor=1.0,
                z_from_z=0.0,
                z_from_anchor=s_next / levels.sigma[i - 1],
                z_from_memory=_weights(pull * slope, pull * (1.0 - slope)),
            )
        moves.append(move)
    return moves


def unipc(levels: NoiseLevels, order: int = 2, lower_order_final: bool = True) -> list[Move]:
    """UniPC with B(h) = e^h - 1 (Zhao et al., 2023), one call a step, corrector included.

    Args:
      levels: to visit.
      order: of the predictor, 1 to 3; the corrector has one more.
      lower_order_final: lower the order towards the end.

    Raises:
      ValueError: the order is not in 1 .. 3.
    """
    if not 1 <= order < MEMORY:
        raise ValueError(f"UniPC has the orders 1 to {MEMORY - 1}, got {order}")
    lam, moves, used = levels.log_snr, [], 1
    for i in range(levels.num_steps):
        move = Move(i, i + 1, 0.0, (), anchor_from_z=float(i == 0))
        if i:  # correct the sample, from where it was before the last move
            shrink, memory = _unipc_move(levels, lam, i - 1, i, used, corrector=True)
            move = move._replace(anchor_from_anchor=shrink, anchor_from_memory=_weights(*memory))
        left = levels.num_steps - i
        used = min(order, i + 1, left if lower_order_final else order)
        if left == 1 and levels.sigma[i + 1] == 0.0:
            used = 1
        shrink, memory = _unipc_move(levels, lam, i, i + 1, used, corrector=False)
        moves.append(move._replace(z_from_anchor=shrink, z_from_memory=_weights(*memory)))
    return moves


def _unipc_move(
    levels: NoiseLevels, lam: np.ndarray, i: int, j: int, order: int, corrector: bool
) -> tuple[float, list[float]]:
    """UniPC from level i to j: coefficients of the sample at i and of predictions, newest first.

    The corrector's newest prediction is at j, the predictor's at i. The weights solve the
    conditions of order for the differences to the prediction at i (equations 9 and 13).
    """
    h = lam[j] - lam[i]
    b_h = np.expm1(-h)
    nodes = [(lam[i - k] - lam[i]) / h for k in range(1, order)] + [1.0] * corrector
    count = len(nodes)
    if count == 1:
        weights = np.array([0.5])
    else:
        phi, factorial, right = b_h / -h - 1.0, 1.0, []
        for k in range(1, count + 1):
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / -h - 1.0 / factorial
        powers = np.array([[node**k for node in nodes] for k in range(count)])
        weights = np.linalg.solve(powers, np.array(right)) if count else np.zeros(0)
    steps = -levels.alpha[j] * b_h * weights / np.array(nodes)
    at_i = -levels.alpha[j] * b_h - steps.sum()
    older, newest = (steps[:-1], [steps[-1]]) if corrector else (steps, [])
    return levels.sigma[j] / levels.sigma[i], [*newest, at_i, *older]


def lcm(levels: NoiseLevels) -> list[Move]:
    """Multistep consistency sampling (Luo et al., 2023, algorithm 3), for distilled models."""
    moves = []
    for i in range(levels.num_steps):
        _, (a_next, s_next) = _pairs(levels, i)
        time = levels.timesteps[i] * LCM_TIME_SCALE
        skip = LCM_SIGMA_DATA**2 / (time**2 + LCM_SIGMA_DATA**2)
        out = time / np.sqrt(time**2 + LCM_SIGMA_DATA**2)
        moves.append(
            Move(
                i,
                i + 1,
                z_from_z=a_next * skip,
                z_from_memory=_weights(a_next * out),
                deviation=s_next,
            )
        )
    return moves


def _pairs(levels: NoiseLevels, i: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, sigma) of a level and of the next one."""
    return (levels.alpha[i], levels.sigma[i]), (levels.alpha[i + 1], levels.sigma[i + 1])


def _epsilon_move(levels: NoiseLevels, i: int) -> tuple[float, float]:
    """Coefficients of z and of epsilon in the deterministic move to the next level."""
    (a, s), (a_next, s_next) = _pairs(levels, i)
    if a == 0.0:
        raise ValueError(
            "this sampler extrapolates epsilon, which says nothing of z_0 where a schedule ends in "
            "pure noise; take ddim, euler, dpm++_2m or unipc"
        )
    return a_next / a, s_next - s * a_next / a
