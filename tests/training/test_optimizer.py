"""The learning-rate schedule's shape, and AdamW with clipping against PyTorch,
and training a part of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from latent_diffusion_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    train_only,
)

PEAK, WARMUP, STEPS, FINAL = 3e-4, 10, 110, 0.1


def values(schedule, steps) -> np.ndarray:
    return np.array([float(schedule(step)) for step in steps])


def expected_rate(step: int, warmup: int = WARMUP, final: float = FINAL) -> float:
    if step < warmup:
        return PEAK * step / warmup
    share = min((step - warmup) / (STEPS - warmup), 1.0)
    return PEAK * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * share)))


def test_warmup_rises_from_zero_to_the_peak_and_the_cosine_falls_to_its_end():
    rates = values(learning_rate_schedule(PEAK, WARMUP, STEPS, FINAL), range(STEPS + 1))
    assert rates[0] == 0.0
    np.testing.assert_allclose(rates[WARMUP], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rates[(WARMUP + STEPS) // 2], PEAK * (1 + FINAL) / 2, rtol=1e-5)
    np.testing.assert_allclose(rates[STEPS], FINAL * PEAK, rtol=1e-5)
    assert (np.diff(rates[: WARMUP + 1]) > 0).all() and (np.diff(rates[WARMUP:]) < 0).all()
    expected = [expected_rate(step) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)


def test_the_rate_stays_at_its_end_after_the_last_step():
    schedule = learning_rate_schedule(PEAK, WARMUP, STEPS, FINAL)
    np.testing.assert_allclose(values(schedule, [STEPS, 10 * STEPS]), FINAL * PEAK, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 10])
def test_a_final_fraction_of_one_is_constant_after_the_warmup(warmup):
    rates = values(learning_rate_schedule(PEAK, warmup, STEPS, 1.0), range(warmup, 2 * STEPS))
    np.testing.assert_allclose(rates, PEAK, rtol=1e-6)


def test_without_warmup_the_rate_starts_at_the_peak():
    rates = values(learning_rate_schedule(PEAK, 0, STEPS, 0.0), [0, STEPS // 2, STEPS])
    np.testing.assert_allclose(rates, [PEAK, PEAK / 2, 0.0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 5, 10])
def test_runs_shorter_than_the_warmup_only_warm_up(num_steps):
    rates = values(learning_rate_schedule(PEAK, WARMUP, num_steps, FINAL), range(num_steps))
    np.testing.assert_allclose(rates, PEAK * np.arange(num_steps) / WARMUP, rtol=1e-5)


def run_ours(gradients, start, **fields):
    optimizer = make_optimizer(**fields)
    params = {name: np.asarray(value, np.float32) for name, value in start.items()}
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_torch(gradients, start, rates, betas, weight_decay, clip_norm, eps):
    params = {name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()}
    for parameter in params.values():
        parameter.requires_grad_()
    settings = dict(betas=betas, weight_decay=weight_decay, eps=eps)
    optimizer = torch.optim.AdamW(params.values(), **settings)
    for gradient, rate in zip(gradients, rates, strict=True):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name], dtype=torch.float64)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in params.items()}


def draws(num_steps: int, seed: int = 0):
    """A start, and gradients whose norms vary a hundredfold."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [
        {
            name: (10 ** rng.uniform(-1, 1) * rng.normal(size=shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(num_steps)
    ]
    return start, gradients


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("clip_norm", "eps"), [(0.0, 1e-8), (1.0, 1e-8), (0.0, 0.1)])
def test_updates_equal_torch_adamw(weight_decay, clip_norm, eps):
    """Decay on all parameters, biases too; clipping by the norm over all of them."""
    start, gradients = draws(30)
    betas = (0.8, 0.95)
    ours = run_ours(
        gradients,
        start,
        num_steps=30,
        learning_rate=0.01,
        warmup_steps=5,
        final_fraction=0.2,
        betas=betas,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        eps=eps,
    )
    share = np.clip((np.arange(30) - 5) / 25, 0, 1)
    rates = 0.01 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * share)))
    rates[:5] = 0.01 * np.arange(5) / 5
    theirs = run_torch(gradients, start, rates, betas, weight_decay, clip_norm, eps)
    for name in start:
        moved = np.abs(theirs[name] - start[name]).max()
        assert moved > 0.03
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4 * moved)


def test_clipping_changes_large_gradients_and_keeps_small_ones():
    start, gradients = draws(5)
    fields = dict(
        num_steps=5,
        learning_rate=0.01,
        warmup_steps=0,
        final_fraction=1.0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )
    free = run_ours(gradients, start, clip_norm=0.0, **fields)
    loose = run_ours(gradients, start, clip_norm=1e6, **fields)
    tight = run_ours(gradients, start, clip_norm=1.0, **fields)
    np.testing.assert_array_equal(loose["kernel"], free["kernel"])
    assert np.abs(tight["kernel"] - free["kernel"]).max() > 1e-3


def test_training_a_part_leaves_the_others_alone_and_out_of_the_norm():
    """As if the part were all there is: moments, clipping, decay."""
    start, gradients = draws(5)
    fields = dict(num_steps=5, learning_rate=0.01, warmup_steps=0, final_fraction=1.0,
                  betas=(0.9, 0.999), weight_decay=0.1, clip_norm=1.0)  # fmt: skip
    expected = run_ours(gradients, start, **fields)

    optimizer = train_only(make_optimizer(**fields), ("net/decoder/", "net/last/"))
    part = {name: np.asarray(value, np.float32) for name, value in start.items()}
    params = {"net": {"decoder": part, "encoder": part, "decoder_2": part}}
    state = optimizer.init(params)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == [(3, 4), (3, 4), (4,), (4,)]
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        large = {name: 1e3 * value for name, value in gradient.items()}
        grads = {"net": {"decoder": gradient, "encoder": large, "decoder_2": large}}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(params["net"]["decoder"][name], value, rtol=1e-6)
        for other in ("encoder", "decoder_2"):
            np.testing.assert_array_equal(params["net"][other][name], part[name])


def test_the_state_is_that_of_optax_adamw():
    """Checkpoints of its moments are restored."""
    ours = make_optimizer(3, 1e-3, 0, 1.0, (0.9, 0.99), 0.01, 1.0)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3))
    params = {"w": np.ones(3, np.float32)}
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(theirs.init(params))


def in_bfloat16(x) -> np.ndarray:
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float64)


def test_moments_are_stored_in_their_dtypes_and_rounded_there_alone():
    """Against Adam as it is written, in float64, with moments rounded after each update."""
    start, gradients = draws(20)
    optimizer = make_optimizer(
        20, 0.01, 0, 1.0, (0.9, 0.95), 0.0, 0.0, mu_dtype="bfloat16", nu_dtype="bfloat16"
    )
    params = {name: np.asarray(value, np.float32) for name, value in start.items()}
    state = optimizer.init(params)
    expected = {name: np.array(value, np.float64) for name, value in start.items()}
    mu, nu = ({name: np.zeros_like(x) for name, x in start.items()} for _ in range(2))
    step = jax.jit(optimizer.update)
    for n, gradient in enumerate(gradients, start=1):
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in gradient.items():
            m = 0.9 * mu[name] + 0.1 * g
            v = 0.95 * nu[name] + 0.05 * np.square(g, dtype=np.float64)
            expected[name] -= 0.01 * m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8)
            mu[name], nu[name] = in_bfloat16(m), in_bfloat16(v)
    moments = state[1][0]
    for name in start:
        assert moments.mu[name].dtype == moments.nu[name].dtype == jnp.bfloat16
        # A number between two halves may be rounded to the other one.
        np.testing.assert_allclose(moments.mu[name].astype(np.float32), mu[name], rtol=2**-7)
        np.testing.assert_allclose(moments.nu[name].astype(np.float32), nu[name], rtol=2**-7)
        assert params[name].dtype == np.float32
        moved = np.abs(expected[name] - start[name]).max()
        np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=2e-3 * moved)


@pytest.mark.parametrize(("beta", "falls"), [(0.999, False), (0.99, True)])
def test_the_second_moment_in_bfloat16_falls_with_a_small_beta_alone(beta, falls):
    """As said of `nu_dtype`: the cost that one has to know."""
    optimizer = make_optimizer(9, 0.01, 0, 1.0, (0.9, beta), 0.0, 0.0, nu_dtype="bfloat16")
    params = {"w": np.ones(50, np.float32)}
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    gradient = {"w": np.random.default_rng(0).normal(size=50).astype(np.float32)}
    _, state = step(gradient, state, params)
    before = np.asarray(state[1][0].nu["w"], np.float32)
    for _ in range(10):
        _, state = step({"w": np.zeros(50, np.float32)}, state, params)
    after = np.asarray(state[1][0].nu["w"], np.float32)
    assert (after < before).all() if falls else (after == before).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_do_not_take_the_dtype_of_the_parameters(dtype):
    optimizer = make_optimizer(9, 0.01, 0, 1.0, (0.9, 0.9), 0.01, 1.0, mu_dtype=dtype)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    updates, new = jax.jit(optimizer.update)({"w": jnp.ones(3)}, state, params)
    for moments in (state[1][0], new[1][0]):
        assert (moments.mu["w"].dtype, moments.nu["w"].dtype) == (jnp.dtype(dtype), jnp.float32)
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
