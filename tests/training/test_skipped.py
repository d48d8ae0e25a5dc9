"""Steps that are not finite change nothing, are told with their samples, and end a run at last."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training.skipped import SkippedSteps, finite
from latent_diffusion_jax.training.state import State, finite_steps_alone

OPTIMIZER = optax.adam(0.1)


def train_step(state, batch, key):
    """A regression, with an average of its parameters."""
    loss, grads = jax.value_and_grad(lambda w: jnp.mean(jnp.square(batch @ w - 1.0)))(state.params)
    updates, opt = OPTIMIZER.update(grads, state.opt)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state.ema, params)
    figures = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return State(state.step + 1, params, ema, opt, state.frozen), figures


def run(batches):
    params = jnp.ones(3)
    state = State(jnp.int32(0), params, params, OPTIMIZER.init(params), frozen={"x": params})
    step = jax.jit(finite_steps_alone(train_step))
    skipped = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(0))
        skipped.append(float(metrics["skipped"]))
    return state, skipped


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been():
    rng = np.random.default_rng(0)
    good = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(4)]
    bad = [np.full((4, 3), value, np.float32) for value in (np.nan, np.inf, 1e30)]
    state, skipped = run([*good[:2], *bad, *good[2:]])
    expected, none = run(good)
    assert skipped == [0, 0, 1, 1, 1, 0, 0] and none == [0] * 4
    assert int(state.step) == 7 and int(expected.step) == 4
    assert int(state.opt[0].count) == 4
    for name in ("params", "ema", "opt", "frozen"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))


def test_all_devices_skip_a_step_that_one_of_them_spoils():
    mesh = jax.make_mesh((8,), ("data",))
    rows, same = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    params = jax.device_put(jnp.ones(3), same)
    state = State(jnp.int32(0), params, params, OPTIMIZER.init(params), frozen={"x": params})
    state = jax.device_put(state, same)
    step = jax.jit(finite_steps_alone(train_step), out_shardings=same)
    batch = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    state, metrics = step(state, jax.device_put(batch, rows), jax.random.key(0))
    assert float(metrics["skipped"]) == 0
    batch[13] = np.nan  # a row of the seventh
    after, metrics = step(state, jax.device_put(batch, rows), jax.random.key(0))
    assert float(metrics["skipped"]) == 1 and int(after.step) == 2
    for before, leaf in zip(jax.tree.leaves(state.opt), jax.tree.leaves(after.opt), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, before)
    for shard in after.params.addressable_shards:
        np.testing.assert_array_equal(shard.data, state.params)


def records(samples):
    return [1000 + sample for sample in samples]


GOOD, BAD = {"loss": 0.5, "skipped": 0.0}, {"loss": float("nan"), "g": 1.0, "skipped": 1.0}


def test_skipped_steps_are_told_with_their_samples(caplog):
    steps = SkippedSteps("diffusion", 32, 2, records)
    with caplog.at_level(logging.WARNING):
        steps.look([(1, GOOD), (2, BAD), (3, BAD), (4, GOOD), (5, BAD)])
        steps.look([(6, BAD), (7, GOOD)])
    assert steps.count == 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert said[0] == (
        "diffusion: step 2 is skipped, as loss=nan (samples 32 to 63 in the run's order, made of "
        f"the data's records {', '.join(map(str, range(1032, 1064)))})"
    )


def test_too_many_in_a_row_end_the_run():
    steps = SkippedSteps("diffusion", 32, 2, records)
    steps.look([(1, GOOD), (2, BAD), (3, BAD)])
    said = (
        r"loss=nan at step 4, and no step since 2 has been finite \(samples 32 to 127 in the run's "
        r"order, made of the data's records 1032, .*, 1095 and 32 more\)"
    )
    with pytest.raises(UserError, match=said):
        steps.look([(4, BAD), (5, BAD)])
    with pytest.raises(UserError, match="step 1, and no step since 1"):
        SkippedSteps("diffusion", 32, 0, records).look([(1, BAD)])


def test_those_before_a_start_count():
    """A run that is ended now and then comes to its end all the same."""
    steps = SkippedSteps("diffusion", 32, 2, records)
    steps.look([(8, GOOD), (9, BAD), (10, BAD)])
    later = SkippedSteps("diffusion", 32, 2, records, steps.since)
    with pytest.raises(UserError, match="step 11, and no step since 9 has been finite"):
        later.look([(11, BAD)])
    steps.look([(11, GOOD)])
    assert steps.since is None


def test_what_is_not_finite_is_not_logged():
    assert finite({"a": 1.0, "b": float("nan"), "c": float("-inf")}) == {"a": 1.0}
