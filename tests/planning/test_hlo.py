"""Reading compiled programs: shapes, operands, computations, as XLA prints them."""

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion_jax.planning import hlo

TEXT = """HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[2,40], param_1: f32[]) -> bf16[2,40] {
  %param_0 = bf16[2,40]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = bf16[2,40]{1,0:T(8,128)(2,1)} add(%param_0, %param_0)
}

ENTRY %main.3 (x: bf16[2,40]) -> (bf16[2,40], s32[]) {
  %x = bf16[2,40]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %seven = s32[]{:T(128)} constant(7)
  %copy-start = (bf16[2,40]{1,0:T(8,128)(2,1)S(1)}, bf16[2,40]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %fusion = bf16[2,40]{1,0:T(8,128)(2,1)} fusion(%x, %seven), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}
  ROOT %tuple = (bf16[2,40]{1,0}, s32[]) tuple(%fusion, %seven)
}
"""  # noqa: E501


def test_a_program_is_read():
    module = hlo.parse(TEXT)
    assert module.entry == "main.3" and list(module.computations) == ["fused", "main.3"]
    main = module.computations["main.3"]
    assert [i.opcode for i in main.values()] == [
        "parameter", "constant", "copy-start", "fusion", "tuple",
    ]  # fmt: skip
    fusion = main["fusion"]
    assert fusion.operands == ("x", "seven") and fusion.called == ("fused",)
    assert fusion.op_name == "jit(f)/add"
    assert main["seven"].literal == "7"
    assert [s.memory_space for s in main["copy-start"].shapes] == [1, 0, 2]
    assert main["tuple"].shapes[0].dims == (2, 40)


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "size"),
    [
        ("bf16", (2, 40), "1,0:T(8,128)(2,1)", 8 * 128 * 2),  # tiles are filled up
        ("bf16", (2, 40), "0,1:T(8,128)(2,1)", 40 * 128 * 2),
        ("f32", (3, 3, 64, 128), "3,2,1,0:T(8,128)", 9 * 64 * 128 * 4),
        ("f32", (5,), "0:T(128)", 512),
        ("f32", (2, 3), "1,0", 24),  # no tiles
        ("pred", (3,), "", 3),
        ("s32", (), "", 4),
    ],
)
def test_sizes_in_memory(dtype, dims, layout, size):
    assert hlo.Shape(dtype, dims, layout).size == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule empty\n")


def test_real_programs_are_read_whole():
    def function(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ y), x).sum()

    text = jax.jit(function).lower(jnp.ones((8, 8))).compile().as_text()
    module = hlo.parse(text)
    for computation in module.computations.values():
        for instruction in computation.values():
            assert all(name in computation for name in instruction.operands), instruction
            assert all(name in module.computations for name in instruction.called), instruction
    opcodes = {i.opcode for c in module.computations.values() for i in c.values()}
    assert {"while", "dot", "parameter"} <= opcodes
