"""The kernels for TPUs and NVIDIA's GPUs: their numbers where they can be had, and their programs.

TPU kernels are interpreted on CPUs; programs are lowered for GPUs, and compiled for TPUs.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.sharding import AxisType, Mesh, NamedSharding

from latent_diffusion_jax.models import attention_kernels
from latent_diffusion_jax.models.dot_product_attention import dot_product_attention
from latent_diffusion_jax.runtime.context_mesh import split_over_mesh
from latent_diffusion_jax.runtime.sharding import AXES, BATCH
from tests.lowering import lowered
from tests.plain_attention import normal

MIB = 2**20


def shape(*sizes, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def gradients(attention):
    """Of a sum of squares, by queries, keys and values."""

    def loss(*arguments):
        return jnp.sum(jnp.square(attention(*arguments).astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2))


def plain(q, k, v):
    """Attention of scaled queries, as its definition has it."""
    weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels as JAX's own operations. The interpreter that acts out a TPU's memory runs JAX inside
    callbacks, which on two cores now and then wait for ever for each other."""
    make = functools.partial(
        attention_kernels.splash_attention.make_splash_mha_single_device, interpret=True
    )
    monkeypatch.setattr(attention_kernels.splash_attention, "make_splash_mha_single_device", make)


def errors(attention, batch, queries, keys, heads, head_dim):
    """The largest errors of a TPU kernel against plain attention: of its values, and of its
    gradients as a share of the largest one."""
    q, k, v = (
        normal(seed, batch, length, heads, head_dim)
        for seed, length in enumerate((queries, keys, keys))
    )
    q *= 2 * head_dim**-0.5
    # A function of its own: one that was traced with other blocks is not traced again.
    out, pull = jax.vjp(jax.jit(lambda *arguments: attention(*arguments)), q, k, v)
    ours = pull(2 * out)
    of_gradients = [
        np.abs(x - y).max() / np.abs(y).max()
        for x, y in zip(ours, gradients(plain)(q, k, v), strict=True)
    ]
    return np.abs(out - plain(q, k, v)).max(), max(of_gradients)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
def test_tpu_kernel_equals_plain_attention(interpreted, head_dim):
    of_values, of_gradients = errors(attention_kernels.tpu_attention, 2, 256, 256, 1, head_dim)
    assert of_values < 3e-6 and of_gradients < 1e-5


def test_tpu_kernel_sees_no_padding(interpreted):
    of_values, of_gradients = errors(attention_kernels.tpu_attention, 1, 200, 77, 2, 40)
    assert of_values < 3e-6 and of_gradients < 1e-5


def made_of(block: int, fused: bool, traced: list):
    """`tpu_blocks` with small blocks: 300 keys are several of them."""

    def blocks(queries, keys, head_dim, dtype):
        traced.append(fused)
        sizes = attention_kernels.splash_attention.BlockSizes(
            *(block,) * 6, *(None if fused else block,) * 2, use_fused_bwd_kernel=fused
        )
        return sizes, -(-queries // block) * block, -(-keys // block) * block

    return blocks


@pytest.mark.parametrize("fused", [True, False])
def test_tpu_kernel_in_many_blocks(interpreted, monkeypatch, fused):
    traced: list[bool] = []
    monkeypatch.setattr(attention_kernels, "tpu_blocks", made_of(128, fused, traced))
    of_values, of_gradients = errors(attention_kernels.tpu_attention, 1, 200, 300, 1, 64)
    assert set(traced) == {fused}
    assert of_values < 3e-6 and of_gradients < 1e-5


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (77, 2048, (256, 1)),
        (1024, 2048, (1024, 1)),
        (1600, 2048, (1792, 1)),
        (2304, 2048, (768, 3)),  # two of 1280 would be more
        (4096, 2048, (2048, 2)),
        (9216, 2048, (1536, 6)),  # five of 2048 would be more
    ],
)
def test_blocks_are_even_and_pad_little(length, limit, expected):
    assert attention_kernels.even_blocks(length, limit, 256) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 160, 512])
@pytest.mark.parametrize("length", [512, 1600, 2304, 4096, 9216])
def test_blocks_make_up_the_padded_tokens(length, head_dim, dtype):
    sizes, queries, keys = attention_kernels.tpu_blocks(length, length, head_dim, dtype)
    assert length <= queries < 1.3 * length and length <= keys < 1.3 * length
    assert queries % sizes.block_q == queries % sizes.block_q_dkv == 0
    assert keys % sizes.block_kv == keys % sizes.block_kv_dkv == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0
    assert sizes.has_backward_blocks


def make_mesh(devices, **sizes):
    devices = np.array(devices).reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(("batch", "heads"), [(4, 2), (1, 1)])  # split over the mesh, and not
def test_each_device_runs_the_kernel_on_its_part(interpreted, batch, heads):
    mesh = make_mesh(jax.devices(), data=2, fsdp=2, tensor=2)
    shapes = []

    def attention(q, k, v):
        shapes.append(q.shape)
        return attention_kernels.tpu_attention(q, k, v)

    with jax.set_mesh(mesh):
        of_values, of_gradients = errors(
            split_over_mesh(attention, batch, heads), batch, 128, 128, heads, 8
        )
    assert of_values < 3e-6 and of_gradients < 1e-5
    assert set(shapes) == {(1, 128, 1, 8)}


@pytest.mark.parametrize(
    ("tokens", "keys", "causal", "expected"),
    [(4096, 4096, False, True), (4096, 77, False, False), (77, 77, True, False)],
)
def test_tpus_run_the_kernel_where_there_are_many_scores(tokens, keys, causal, expected):
    q, k = shape(2, tokens, 8, 40), shape(2, keys, 8, 40)
    attention = functools.partial(dot_product_attention, causal=causal)
    for function in (attention, gradients(attention)):
        assert ("tpu_custom_call" in lowered(function, "tpu", q, k, k)) == expected
        assert "custom_call @tpu" not in lowered(function, "cuda", q, k, k)


@pytest.fixture
def with_cudnn(monkeypatch):
    """As on a machine with an NVIDIA GPU, as far as lowering goes."""

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91400)

    monkeypatch.setattr(jax_cudnn, "cuda_versions", Versions)
    monkeypatch.setattr(attention_kernels, "_has_cudnn", lambda: True)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "expected"),
    [
        (64, jnp.bfloat16, True),
        (40, jnp.float16, True),
        (160, jnp.bfloat16, False),
        (64, jnp.float32, False),
        (4, jnp.bfloat16, False),
    ],
)
def test_nvidia_gpus_run_cudnn_where_it_can(with_cudnn, head_dim, dtype, expected):
    x = shape(2, 1024, 8, head_dim, dtype=dtype)
    for function in (functools.partial(dot_product_attention), gradients(dot_product_attention)):
        assert ("__cudnn$fmhaSoftmax" in lowered(function, "cuda", x, x, x)) == expected
        assert "cudnn" not in lowered(function, "tpu", x, x, x)


def test_cudnn_sits_in_the_mesh_too(with_cudnn, monkeypatch):
    mesh = make_mesh(jax.devices(), data=4, tensor=2)
    module = sys.modules[dot_product_attention.__module__]
    monkeypatch.setattr(module, "platform", lambda: "cuda")  # of these CPUs
    x = shape(8, 1024, 8, 64)
    with jax.set_mesh(mesh):
        text = lowered(gradients(dot_product_attention), "cuda", x, x, x)
    assert "__cudnn$fmhaSoftmax" in text and "CustomSPMDPartitioning" not in text


def test_machines_without_cudnn_take_the_other_form():
    x = shape(2, 1024, 8, 64)
    function = functools.partial(dot_product_attention)  # which no test has traced
    assert "cudnn" not in lowered(function, "cuda", x, x, x)


def test_a_program_exported_for_tpus_has_the_kernel():
    q = shape(1, 512, 1, 8)
    exported = jax.export.export(jax.jit(dot_product_attention), platforms=["tpu"])(q, q, q)
    assert "tpu_custom_call" in exported.mlir_module() and exported.serialize()


def test_one_exported_program_is_for_all_platforms(with_cudnn):
    q = shape(1, 512, 1, 8, dtype=jnp.float32)
    platforms = ["cpu", "cuda", "tpu"]
    with attention_kernels.no_kernels():
        exported = jax.export.export(
            jax.jit(functools.partial(dot_product_attention)), platforms=platforms
        )(q, q, q)
    again = jax.export.deserialize(exported.serialize())
    q, k, v = (normal(seed, 1, 512, 1, 8) for seed in range(3))
    np.testing.assert_allclose(again.call(q, k, v), plain(q * 8**-0.5, k, v), rtol=0, atol=1e-5)


def compiled(function, mesh, *arguments):
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def kernels(text):
    """Names of the calls of kernels in a compiled program."""
    return re.findall(r'^\s+%(\S+) = .*custom_call_target="tpu_custom_call"', text, re.MULTILINE)


@pytest.mark.parametrize(
    "sizes",
    [  # of Stable Diffusion 1's levels, the widest with 768 pixels, and of the autoencoder
        (2, 4096, 8, 40),
        (2, 1024, 8, 80),
        (2, 576, 8, 160),
        (1, 4096, 1, 512),
    ],
)
def test_tpu_programs_never_hold_the_scores(tpu_topology, sizes):
    batch, tokens, heads, _ = sizes
    mesh = make_mesh(tpu_topology("v5e:2x2")[:1])
    x = shape(*sizes, sharding=NamedSharding(mesh, BATCH))
    program = compiled(gradients(dot_product_attention), mesh, x, x, x)
    scores = 4 * batch * heads * tokens**2
    found = program.memory_analysis().temp_size_in_bytes
    assert found < scores / 4, f"{found / MIB:.1f} MiB"  # in halves they are a half
    names = kernels(program.as_text())
    assert any("mha_fwd" in name for name in names) and any("mha_dkv" in name for name in names)


@pytest.mark.parametrize("tokens", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_the_widest_heads_fit_the_vector_memory(tpu_topology, tokens):
    """In float32, as an autoencoder's one head of all channels."""
    mesh = make_mesh(tpu_topology("v4:2x2x1")[:1])
    x = shape(2, tokens, 1, 512, dtype=jnp.float32, sharding=NamedSharding(mesh, BATCH))
    with jax.default_matmul_precision("high"):
        program = compiled(gradients(dot_product_attention), mesh, x, x, x)
    assert "tpu_custom_call" in program.as_text()


def in_scan(q, k, v):
    """Two layers, of which the backward pass keeps only the inputs."""
    layer = jax.checkpoint(lambda x, _: (dot_product_attention(x, k, v), None))
    return jax.lax.scan(layer, q, None, length=2)[0]


def in_map(q, k, v):
    """Over two parts of the queries."""
    parts = q.reshape(q.shape[0], 2, -1, *q.shape[2:]).swapaxes(0, 1)
    parts = jax.lax.map(lambda part: dot_product_attention(part, k, v), parts)
    return parts.swapaxes(0, 1).reshape(q.shape)


@pytest.mark.parametrize("attention", [dot_product_attention, in_scan, in_map])
def test_tpu_programs_keep_a_batch_spread(tpu_topology, attention):
    mesh = make_mesh(tpu_topology("v5e:2x2"), data=2, fsdp=2)
    x = shape(8, 1024, 2, 40, sharding=NamedSharding(mesh, BATCH))
    text = compiled(gradients(attention), mesh, x, x, x).as_text()
    assert "tpu_custom_call" in text
    assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", text)


@pytest.mark.parametrize(
    "precision", ["default", "high", pytest.param("highest", marks=pytest.mark.slow)]
)
def test_the_kernel_takes_any_precision_that_is_asked_for(tpu_topology, precision):
    """Pallas has no products in three passes."""
    (device,) = tpu_topology("v5e:1x1")
    x = jax.ShapeDtypeStruct(
        (1, 1024, 2, 64), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )

    def gradients(*arguments):
        with jax.default_matmul_precision(precision):
            return jax.grad(lambda *a: jnp.sum(dot_product_attention(*a) ** 2), (0, 1, 2))(
                *arguments
            )

    text = jax.jit(gradients).lower(x, x, x).compile().as_text()
    assert text.count("tpu_custom_call") >= 2
