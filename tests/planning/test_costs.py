"""Costs of programs that the compiler for TPUs made, against what is known of them by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_diffusion_jax.planning import costs, hlo
from latent_diffusion_jax.planning.links import Slices
from latent_diffusion_jax.runtime.chips import CHIPS

V5E = CHIPS["TPU v5 lite"]


def compiled_cost(tpu_topology, function, *shapes, dtype=jnp.bfloat16, spec=None, rounds=1):
    """The cost on four chips; arguments are split by `spec`."""
    devices = np.array(tpu_topology("v5e:2x2"))
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    specs = spec or [P()] * len(shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, s))
        for shape, s in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    return costs.estimate(hlo.parse(text), Slices(V5E, (2, 2)), rounds)


def test_a_product_of_matrices(tpu_topology):
    cost = compiled_cost(tpu_topology, jnp.matmul, (4096, 4096), (4096, 4096))
    assert cost.flops == 2 * 4096**3
    assert cost.bytes == pytest.approx(3 * 2 * 4096**2, rel=0.01)
    assert cost.seconds == pytest.approx(cost.flops / V5E.flops, rel=0.01)
    assert cost.bound["compute"] > 0.99 * cost.seconds and not cost.collectives


def test_narrow_products_fill_up_tiles(tpu_topology):
    cost = compiled_cost(tpu_topology, jnp.matmul, (65536, 160), (160, 4096))
    assert cost.flops == 2 * 65536 * 160 * 4096
    assert cost.seconds >= 0.99 * cost.flops * (256 / 160) / V5E.flops


def test_a_projection_into_narrow_heads_wastes_no_tiles():
    """The compiler writes heads as an axis of space: they are features of the kernel all the same.

    As it was printed for 5 heads of 64. Its 320 features on either side take three tiles of 128.
    """
    text = """ENTRY %main (x: bf16[32,4096,320,1], w: bf16[5,64,320,1]) -> bf16[32,4096,5,64] {
  %x = bf16[32,4096,320,1]{1,0,2,3} parameter(0)
  %w = bf16[5,64,320,1]{2,1,0,3} parameter(1)
  ROOT %y = bf16[32,4096,5,64]{1,3,2,0} convolution(%x, %w), window={size=1x5 pad=0_0x4_4 \
rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
}"""
    module = hlo.parse(text)
    entry = module.computations[module.entry]
    flops, filled = costs.convolution_flops(entry["y"], entry, 128)
    assert flops == 2 * 32 * 4096 * 320 * 320
    assert filled == pytest.approx(flops * (384 / 320) ** 2)


def test_what_is_added_elementwise_is_bound_by_memory(tpu_topology):
    cost = compiled_cost(tpu_topology, jnp.add, (8192, 8192), (8192, 8192))
    assert cost.flops == 0
    assert cost.bytes == pytest.approx(3 * 2 * 8192**2, rel=0.01)
    assert cost.seconds == pytest.approx(cost.bytes / V5E.memory_bandwidth, rel=0.01)
    assert cost.bound["memory"] == cost.seconds


def test_a_convolution_and_its_gradients(tpu_topology):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (8, 32, 32, 128), (3, 3, 128, 128)
    valid = (3 * 32 - 2) ** 2  # places in the window that meet the image, along both axes
    once = 2 * 8 * valid * 128 * 128
    assert compiled_cost(tpu_topology, convolve, *shapes).flops == once

    def gradients(x, kernel, y):
        return jax.vjp(convolve, x, kernel)[1](y)

    cost = compiled_cost(tpu_topology, gradients, *shapes, shapes[0])
    assert cost.flops == pytest.approx(2 * once, rel=0.01)


@pytest.mark.parametrize("steps", [None, 7])
def test_loops_cost_their_rounds(tpu_topology, steps):
    def function(x, n):
        rounds = 7 if steps is None else n[0, 0].astype(jnp.int32)
        return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ y), x)

    cost = compiled_cost(tpu_topology, function, (1024, 1024), (1, 1), rounds=7)
    assert cost.flops == 7 * 2 * 1024**3


def test_float32_products_take_the_passes_of_their_precision(tpu_topology):
    def product(precision):
        return compiled_cost(
            tpu_topology,
            lambda a, b: jnp.matmul(a, b, precision=precision),
            (2048, 2048),
            (2048, 2048),
            dtype=jnp.float32,
        )

    default, highest = product("default"), product("highest")
    assert highest.flops == default.flops
    assert highest.bound["compute"] == pytest.approx(6 * default.flops / V5E.flops, rel=0.01)


def test_collectives_are_found_with_their_sizes(tpu_topology):
    rows = [P("data"), P("data")]

    def gram(a, b):
        return a.T @ b

    cost = compiled_cost(tpu_topology, gram, (8192, 1024), (8192, 2048), spec=rows)
    assert cost.flops == 2 * 8192 * 1024 * 2048 / 4
    reduced = [found for found, _ in cost.collectives]
    assert sum(f.size for f in reduced if f.kind == "all-reduce") == 2 * 1024 * 2048
    assert all(len(f.group) == 4 for f in reduced)
    assert cost.bound["links"] > 0


def test_what_is_started_early_is_hidden_by_what_runs_until_it_is_done():
    """As JAX's own permutes come: all of one channel, their operands among the results.

    The product takes more than one permute, and less than two.
    """
    text = """ENTRY %main (x: bf16[2048,8192], w: bf16[8192,6144]) -> bf16[2048,8192] {
  %x = bf16[2048,8192]{1,0} parameter(0)
  %w = bf16[8192,6144]{1,0} parameter(1)
  %s = (bf16[2048,8192]{1,0}, bf16[2048,8192]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %t = (bf16[2048,8192]{1,0}, bf16[2048,8192]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %y = bf16[2048,6144]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %a = bf16[2048,8192]{1,0} collective-permute-done(%s)
  ROOT %b = bf16[2048,8192]{1,0} collective-permute-done(%t)
}"""
    cost = costs.estimate(hlo.parse(text), Slices(V5E, (2, 2)))
    array = 2 * 2048 * 8192
    product = 2 * 2048 * 8192 * 6144 / V5E.flops
    permute = array / V5E.link_bandwidth
    assert permute < product < 2 * permute
    assert [found.size for found, _ in cost.collectives] == [array] * 2
    assert cost.bytes == (2 * 2 + 1) * array + 2 * (8192 + 2048) * 6144
    assert cost.bound["links"] == pytest.approx(2 * permute - product)
    assert cost.seconds == pytest.approx(2 * permute)


def test_attention_by_a_kernel_is_counted(tpu_topology):
    from latent_diffusion_jax.models.dot_product_attention import dot_product_attention

    shape, rows = (4, 4096, 8, 64), [P("data")] * 3
    forward = compiled_cost(tpu_topology, dot_product_attention, *[shape] * 3, spec=rows)
    assert forward.flops == 4 * 8 * 4096**2 * 64

    def gradients(q, k, v):
        return jax.grad(
            lambda *args: jnp.sum(dot_product_attention(*args).astype(jnp.float32) ** 2), (0, 1, 2)
        )(q, k, v)

    backward = compiled_cost(tpu_topology, gradients, *[shape] * 3, spec=rows)
    assert 3 * forward.flops < backward.flops <= 5 * forward.flops
