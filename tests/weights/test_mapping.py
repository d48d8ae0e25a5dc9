"""The table engine: layouts there and back, and errors that name every tensor."""

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import mapping

BLOCK = (("norm", "n", "norm"), ("proj", "p", "dense"))
ROWS = (
    ("stem", "conv_in", "conv"),
    ("level_{i}", "levels.{j}", BLOCK),
    ("as_conv", "attn.q", "dense_as_conv"),
    ("as_dense", "attn.out", "conv_as_dense"),
    ("codes", "embedding.weight", "same"),
    ("lin", "lin.weight", "per_channel"),
)
TABLE = mapping.expand(ROWS, [{"i": 0, "j": 1}, {"i": 1, "j": 0}])
SHAPES = {
    "stem/kernel": (3, 2, 4, 5),
    "stem/bias": (5,),
    "level_0/norm/scale": (5,),
    "level_0/norm/bias": (5,),
    "level_0/proj/dense/kernel": (5, 6),
    "level_0/proj/dense/bias": (6,),
    "level_1/proj/dense/kernel": (7, 6),
    "as_conv/dense/kernel": (4, 3),
    "as_dense/kernel": (1, 1, 4, 3),
    "codes": (8, 2),
    "lin": (6,),
}


def draw() -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def ours():
    return draw()


@pytest.fixture
def theirs(ours):
    return mapping.to_theirs(TABLE, mapping._nested(ours))


def check_refused(tensors, *parts: str):
    with pytest.raises(UserError) as error:
        mapping.to_ours(TABLE, tensors, SHAPES, "some file")
    message = str(error.value)
    assert "some file" in message and "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_names_and_layouts(ours, theirs):
    expected = {
        "conv_in.weight": ours["stem/kernel"].transpose(3, 2, 0, 1),
        "conv_in.bias": ours["stem/bias"],
        "levels.1.n.weight": ours["level_0/norm/scale"],
        "levels.1.n.bias": ours["level_0/norm/bias"],
        "levels.1.p.weight": ours["level_0/proj/dense/kernel"].T,
        "levels.1.p.bias": ours["level_0/proj/dense/bias"],
        "levels.0.p.weight": ours["level_1/proj/dense/kernel"].T,
        "attn.q.weight": ours["as_conv/dense/kernel"].T.reshape(3, 4, 1, 1),
        "attn.out.weight": ours["as_dense/kernel"][0, 0].T,
        "embedding.weight": ours["codes"],
        "lin.weight": ours["lin"].reshape(1, 6, 1, 1),
    }
    assert theirs.keys() == expected.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
        assert tensor.flags.c_contiguous


def test_there_and_back_changes_no_bit(ours, theirs):
    back = mapping.to_ours(TABLE, theirs, SHAPES, "some file")
    assert set(back) == {"stem", "level_0", "level_1", "as_conv", "as_dense", "codes", "lin"}
    flat = flatten_names(back)
    assert flat.keys() == ours.keys()
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, ours[name], err_msg=name)
        assert leaf.dtype == np.float32 and leaf.flags.c_contiguous and leaf.flags.writeable


def test_rows_that_a_network_does_not_have_are_no_matter(ours):
    """level_1 has no norm: its rows are in the table and nowhere else."""
    assert "level_1/norm/scale" in TABLE and "level_1/norm/scale" not in ours


@pytest.mark.parametrize(
    "name", ["attn.q.weight", "attn.out.weight", "levels.1.p.weight", "levels.0.p.weight"]
)
def test_dense_layers_are_read_as_matrix_and_as_convolution(ours, theirs, name):
    for shape in (theirs[name].shape[:2], (*theirs[name].shape[:2], 1, 1)):
        changed = theirs | {name: theirs[name].reshape(shape)}
        flat = flatten_names(mapping.to_ours(TABLE, changed, SHAPES, "some file"))
        for key, leaf in flat.items():
            np.testing.assert_array_equal(leaf, ours[key], err_msg=key)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_other_precisions_are_read_as_float32(theirs, dtype):
    converted = {name: tensor.astype(dtype) for name, tensor in theirs.items()}
    codes = mapping.to_ours(TABLE, converted, SHAPES, "some file")["codes"]
    assert codes.dtype == np.float32
    np.testing.assert_array_equal(codes, converted["embedding.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parameters_are_of_the_dtype_that_is_asked_for(theirs, ours, dtype):
    converted = {name: tensor.astype(dtype) for name, tensor in theirs.items()}
    found = mapping.to_ours(TABLE, converted, SHAPES, "some file", jnp.bfloat16)
    for name, leaf in flatten_names(found).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, ours[name].astype(dtype).astype(jnp.bfloat16))


def test_every_problem_is_named_with_shapes(theirs):
    del theirs["conv_in.bias"], theirs["levels.0.p.weight"]
    theirs["lin.weight"] = theirs["lin.weight"].reshape(6)
    theirs["attn.q.weight"] = np.zeros((3, 4, 3, 3), np.float32)
    theirs["embedding.weight"] = np.zeros((8, 2), np.int32)
    theirs["more.a"], theirs["more.b"] = np.zeros(2), np.zeros(())
    message = check_refused(
        theirs,
        "2 missing: 'conv_in.bias' (5,), 'levels.0.p.weight' (6, 7)",
        "3 misshapen: 'attn.q.weight' (3, 4, 3, 3), expected (3, 4, 1, 1)",
        "'embedding.weight' of int32, expected floating point",
        "'lin.weight' (6,), expected (1, 6, 1, 1)",
        "2 extra: 'more.a' (2,), 'more.b' ()",
    )
    assert "'conv_in.weight'" not in message


def test_hundreds_of_problems_are_counted(theirs):
    theirs |= {f"extra.{i:03}": np.zeros(3) for i in range(300)}
    message = check_refused(theirs, "300 extra: ", "'extra.000' (3,)", "and 280 more")
    assert message.count("'extra.") == mapping.SHOWN and "missing" not in message


def test_transposed_kernels_are_not_taken_for_square_ones(theirs):
    """[in, out] instead of [out, in] is an error wherever the shape shows it."""
    theirs["levels.0.p.weight"] = theirs["levels.0.p.weight"].T
    check_refused(theirs, "1 misshapen: 'levels.0.p.weight' (7, 6), expected (6, 7)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_named(ours, theirs, value):
    """1e300 is finite in the file, and infinite in float32."""
    changed = {name: tensor.astype(np.float64) for name, tensor in theirs.items()}
    changed["conv_in.weight"][4, 3, 2, 1] = value
    changed["lin.weight"][0, 0, 0, 0] = value
    message = check_refused(changed, "2 of them: 'conv_in.weight', 'lin.weight'", "float32 cannot")
    assert "embedding" not in message


def test_all_numbers_of_a_large_tensor_are_looked_at():
    numbers = np.zeros((3, mapping.CHECKED), np.float16)
    assert mapping.all_finite(numbers) and mapping.all_finite(numbers[:, :0])
    for place in (0, mapping.CHECKED, numbers.size - 1):
        changed = numbers.copy()
        changed.reshape(-1)[place] = np.nan
        assert not mapping.all_finite(changed)


def test_long_names_are_cut_in_messages(theirs):
    message = check_refused(theirs | {"x" * 3_000_000: np.zeros(3)}, "1 extra: 'xxx", "xxx' (3,)")
    assert len(message) < 1_000
