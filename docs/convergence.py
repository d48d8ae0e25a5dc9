"""Draws how fast the samplers converge where the answer is known: a mixture of Gaussians.

  python docs/convergence.py docs/convergence.png

In one dimension the probability flow takes each quantile of the noise to the same quantile of the
data, so the exact sample of every noise is known, and so is the best prediction of it. Needs
matplotlib beside this package.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, stats

from latent_diffusion_jax.diffusion import plan as plans
from latent_diffusion_jax.diffusion.noise_levels import NoiseLevels
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, rows_between

SHARES = np.array([0.3, 0.5, 0.2])
MEANS = np.array([-1.5, 0.2, 1.8])
DEVIATIONS = np.array([0.5, 0.4, 0.6])
MOST, LEAST = 3.0, -4.0  # log signal-to-noise ratio lambda at the end and at the start

# Order of the global error; PLMS has formulas for even steps and takes uneven ones.
ORDERS = {"ddim": 1, "plms": 2, "heun": 2, "dpm++_2m": 2, "dpm++_2s": 2, "unipc": 3}
STEPS = (8, 16, 32, 64, 128)


def alpha_sigma(t):
    """At time 0 .. 1, lambda falling on a line."""
    log_snr = MOST + t * (LEAST - MOST)
    return np.sqrt(1 / (1 + np.exp(-2 * log_snr))), np.sqrt(1 / (1 + np.exp(2 * log_snr)))


def predict(z, t, guidance_scale=1.0):
    """E[epsilon | z_t = z], exact; z [B, 1], t [B]."""
    log_snr = (MOST + t * (LEAST - MOST))[:, None]
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(2 * log_snr)), jnp.sqrt(jax.nn.sigmoid(-2 * log_snr))
    variances = (alpha * DEVIATIONS) ** 2 + sigma**2
    apart = z - alpha * MEANS
    log_shares = jnp.log(SHARES) - 0.5 * jnp.log(variances) - 0.5 * apart**2 / variances
    shares = jax.nn.softmax(log_shares, axis=-1)
    return jnp.sum(shares * sigma * apart / variances, axis=-1, keepdims=True)


def quantile(t, share):
    """Value of z_t below which `share` of the mixture lies."""
    alpha, sigma = alpha_sigma(t)
    deviations = np.sqrt((alpha * DEVIATIONS) ** 2 + sigma**2)

    def below(z):
        return np.sum(SHARES * stats.norm.cdf(z, alpha * MEANS, deviations)) - share

    return optimize.brentq(below, -20, 20, xtol=1e-13)


SAMPLE_SHARES = np.linspace(0.02, 0.98, 25)


def error(name: str, num_steps: int) -> float:
    """Root mean square of a sampler's error with so many calls of the network."""
    count = num_steps // 2 if name == "heun" else num_steps
    t = np.linspace(1.0, 0.0, count + 1)
    alpha, sigma = alpha_sigma(t)
    levels = NoiseLevels(t[:-1], alpha, sigma)
    options = {} if name in ("ddim", "plms", "heun", "dpm++_2s") else {"lower_order_final": False}
    moves = SAMPLERS[name].moves(levels, **options)
    plan = plans.padded(plans.make_plan(rows_between(levels, moves, "epsilon"), 0.0, 1.0), 256)
    start = np.array([[quantile(1.0, share)] for share in SAMPLE_SHARES])
    end = np.array([[quantile(0.0, share)] for share in SAMPLE_SHARES])
    keys = jax.random.split(jax.random.key(0), len(start))
    found = _run(start, plan, keys)
    return float(np.sqrt(np.mean((np.asarray(found) - end) ** 2)))


_run = jax.jit(lambda z, plan, keys: plans.sample(predict, z, plan, keys)[0])


def main(out: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, order in ORDERS.items():
        errors = [error(name, num_steps) for num_steps in STEPS]
        slope = np.log2(errors[1] / errors[2])
        axes.loglog(STEPS, errors, "o-", label=f"{name}: order {order}, seen {slope:.1f}")
        print(
            name, order, [f"{e:.1e}" for e in errors], np.log2(np.divide(errors[:-1], errors[1:]))
        )
    axes.set_xlabel("calls of the network")
    axes.set_ylabel("error")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
