"""runtime.compilation: options reach the compiler, and one that XLA does not know is left away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models.layers import dot_general
from latent_diffusion_jax.runtime import compilation


@pytest.fixture(autouse=True)
def forget():
    compilation.compiler_options.cache_clear()
    yield
    compilation.compiler_options.cache_clear()


def test_compiled_programs_are_kept_where_they_are_told(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for place, folder in (("a", tmp_path / "a"), ("user/latent_diffusion_jax", None)):
            jax.config.update("jax_compilation_cache_dir", None)
            compilation.use_persistent_cache(folder)
            compilation.use_persistent_cache(tmp_path / "not looked at")
            jax.jit(lambda x: 2 * x)(1.0)
            assert list((tmp_path / place).iterdir())
        assert not (tmp_path / "not looked at").exists()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation.compilation_cache.reset_cache()


def test_convolutions_on_cpus_are_not_handed_on():
    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    x, kernel = jnp.ones((8, 32, 32, 64)), jnp.ones((3, 3, 64, 64))
    programs = [
        jax.jit(convolve, compiler_options=options).lower(x, kernel).compile()
        for options in ({}, compilation.compiler_options())
    ]
    # Where the first stops being so, the option has had its day.
    assert ["ynn_fusion" in program.as_text() for program in programs] == [True, False]
    results = [program(x, kernel) for program in programs]
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_dots_in_half_precision_are_handed_on():
    x = jnp.ones((256, 256), jnp.bfloat16)
    programs = [
        jax.jit(dot_general, static_argnums=2, compiler_options=compilation.compiler_options(half))
        .lower(x, x, (((1,), (0,)), ((), ())))
        .compile()
        for half in (False, True)
    ]
    assert ["ynn_fusion" in program.as_text() for program in programs] == [False, True]
    for program in programs:
        np.testing.assert_array_equal(program(x, x), 256.0)


def test_weights_are_not_widened_before_they_are_used():
    def apply(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return x

    shapes = (
        [jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)] * 16,
        jax.ShapeDtypeStruct((8, 256), jnp.bfloat16),
    )
    default, ours = (
        jax.jit(apply, compiler_options=options)
        .lower(*shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for options in ({}, compilation.compiler_options())
    )
    # Where the first stops being so, the option has had its day.
    assert default > 15 * 256 * 256 * 4 and ours < 4 * 256 * 256 * 4


def test_an_unknown_option_is_left_away(monkeypatch):
    monkeypatch.setattr(
        compilation,
        "_CPU_OPTIONS",
        {"xla_no_such_option": "1"} | (known := {"xla_backend_optimization_level": "2"}),
    )
    assert compilation.compiler_options() == known


def test_other_platforms_have_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compilation.compiler_options() == {}
