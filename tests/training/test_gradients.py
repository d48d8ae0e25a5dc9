"""Micro-batches and work that only some steps need, as CPUs and as other devices run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.planning.compiled import NO_SEARCH
from latent_diffusion_jax.runtime import sharding
from latent_diffusion_jax.training.gradients import accumulate, map_parts, run_if


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """Runs what CPUs run, and on CPUs what other devices run."""

    def choose(*args, default=None, **branches):
        return branches.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


def draw(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "row": np.arange(rows, dtype=np.int32),
    }


def squares(part):
    """A mean over the rows, and the rows."""
    return {"mean": jnp.mean(jnp.square(part["x"])), "rows": jnp.mean(part["row"])}, part["row"]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_mean_over_micro_batches_is_that_of_the_batch(platform, count):
    batch = draw(6)
    found, last = jax.jit(lambda batch: accumulate(squares, batch, count))(batch)
    np.testing.assert_allclose(found["mean"], np.square(batch["x"]).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["rows"], 2.5, rtol=1e-6)
    # Every count-th row from the last one's first on: each device's own rows.
    np.testing.assert_array_equal(last, np.arange(6)[count - 1 :: count])


def test_gradients_over_micro_batches_are_those_of_the_batch(platform):
    batch, weights = draw(8), jnp.asarray([1.0, -2.0, 0.5])

    def gradient(part):
        loss = lambda w: jnp.mean(jnp.tanh(part["x"] @ w))  # noqa: E731
        return jax.grad(loss)(weights), ()

    whole, _ = gradient(batch)
    parts, nothing = jax.jit(lambda batch: accumulate(gradient, batch, 4))(batch)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-7)
    assert nothing == ()


@pytest.mark.parametrize("count", [1, 2, 6])
def test_rows_of_micro_batches_are_those_of_the_batch(platform, count):
    def figures(part):
        assert part["x"].shape == (6 // count, 3)
        return {"sum": jnp.sum(part["x"], axis=1), "row": part["row"]}

    batch = draw(6)
    found = jax.jit(lambda batch: map_parts(figures, batch, count))(batch)
    np.testing.assert_array_equal(found["row"], batch["row"])
    np.testing.assert_allclose(found["sum"], batch["x"].sum(1), rtol=1e-6)


def test_keys_are_split_like_other_arrays(platform):
    keys = jax.random.split(jax.random.key(0), 4)

    def draw_noise(part):
        return jnp.mean(jax.vmap(jax.random.normal)(part["key"])), part["key"]

    found, last = jax.jit(lambda keys: accumulate(draw_noise, {"key": keys}, 2))(keys)
    expected = np.mean([float(jax.random.normal(key)) for key in keys])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.random.key_data(last), jax.random.key_data(keys[1::2]))


@pytest.mark.parametrize("condition", [False, True])
def test_work_is_done_where_the_condition_holds(platform, condition):
    otherwise = {"a": jnp.zeros(3), "b": jnp.ones((), jnp.int32)}

    def work(x):
        return {"a": 2.0 * x, "b": jnp.asarray(7, jnp.int32)}

    run = jax.jit(lambda condition, x: run_if(condition, work, otherwise, x))
    found = run(condition, jnp.arange(3.0))
    np.testing.assert_array_equal(found["a"], [0.0, 2.0, 4.0] if condition else np.zeros(3))
    assert int(found["b"]) == (7 if condition else 1) and found["b"].dtype == jnp.int32


def test_numbers_that_are_not_finite_do_not_leak_from_work_that_was_not_wanted(platform):
    run = jax.jit(lambda x: run_if(x > 0.0, jnp.log, jnp.float32(3.0), x))
    assert run(-1.0) == 3.0
    np.testing.assert_allclose(run(2.0), np.log(2.0), rtol=1e-6)


def test_other_devices_branch_and_loop_where_cpus_do_not(platform):
    """What is compiled for them: a loop over micro-batches, a branch around the work."""
    batch = draw(4)
    looped = str(jax.make_jaxpr(lambda batch: accumulate(squares, batch, 2))(batch))
    branched = str(jax.make_jaxpr(lambda x: run_if(x > 0.0, jnp.log, 0.0, x))(1.0))
    assert ("scan[" in looped) == (platform == "default")
    assert ("cond[" in branched) == (platform == "default")


@pytest.mark.parametrize("count", [1, 4])
def test_halves_are_averaged_in_float32(platform, count):
    rows = np.full(4, 1.0, np.float32)
    rows[0] = 256.0  # 256 + 1 is not a number in bfloat16

    def of_half(part):
        return jnp.sum(part.astype(jnp.bfloat16)), part.astype(jnp.bfloat16)

    found, last = jax.jit(lambda rows: accumulate(of_half, jnp.asarray(rows), count))(rows)
    assert found.dtype == jnp.float32 and last.dtype == jnp.bfloat16
    if count == 4:
        assert float(found) == (256 + 3) / 4


def memory_of_gradients(mesh, count):
    """Temporary bytes on a TPU for the gradients of four convolutions; activations are 128 MiB."""

    def run(kernels, images):
        def gradient(x):
            def loss(kernels):
                y = x
                for kernel in kernels:
                    names = ("NHWC", "HWIO", "NHWC")
                    y = jax.lax.conv_general_dilated(
                        y, kernel, (1, 1), "SAME", dimension_numbers=names
                    )
                    y = jax.nn.silu(y)
                return jnp.mean(jnp.square(y.astype(jnp.float32)))

            return jax.grad(loss)(kernels), ()

        return accumulate(gradient, images, count)[0]

    def given(shape, place):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    kernels = [given((3, 3, 128, 128), sharding.replicated(mesh))] * 4
    images = given((512, 32, 32, 128), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, compiler_options=NO_SEARCH).lower(kernels, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_micro_batches_take_the_memory_of_one(tpu_topology):
    """No activations of another one are kept meanwhile."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, tpu_topology("v5e:1x1"))
    whole, parts = (memory_of_gradients(mesh, count) / 2**20 for count in (1, 4))
    print(f"MiB of temporaries: {whole:.0f} in one, {parts:.0f} in four micro-batches")
    assert whole > 4 * 128
    assert parts < 0.3 * whole
