"""Counted operations: against PyTorch's counter, by hand, and what must not change them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.flops import count_flops, valid_products

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def torch_flops(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_without_padding_are_counted_as_in_torch(stride, groups):
    def ours(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=DIMENSIONS,
            feature_group_count=groups,
        )  # fmt: skip

    x, kernel = torch.zeros(2, 4, 9, 7), torch.zeros(6, 4 // groups, 3, 3, requires_grad=True)
    x.requires_grad_()

    def theirs():
        return torch.nn.functional.conv2d(x, kernel, stride=stride, groups=groups)

    shapes = jnp.zeros((2, 9, 7, 4)), jnp.zeros((3, 3, 4 // groups, 6))
    assert count_flops(ours, *shapes) == torch_flops(theirs)
    if groups == 1:
        gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(ours(*args))), (0, 1))
        assert count_flops(gradients, *shapes) == torch_flops(
            lambda: theirs().sin().sum().backward()
        )


def test_products_of_matrices_are_counted_as_in_torch():
    a, b = torch.zeros(3, 5, 7), torch.zeros(3, 7, 2)
    assert count_flops(jnp.matmul, a.numpy(), b.numpy()) == torch_flops(torch.matmul, a, b)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_valid_products_are_those_that_meet_an_input(size):
    for window, out, stride, padding, lhs, rhs in itertools.product(
        (1, 3, 4), (1, 4, 9), (1, 2, 3), (-1, 0, 2), (1, 2), (1, 2)
    ):
        places = (o * stride + w * rhs - padding for o in range(out) for w in range(window))
        expected = sum(0 <= p <= (size - 1) * lhs and p % lhs == 0 for p in places)
        found = valid_products(
            size, window, out, stride=stride, padding=padding, lhs_dilation=lhs, rhs_dilation=rhs
        )
        assert found == expected


def test_loops_count_their_rounds():
    x = jnp.zeros((4, 4))
    assert count_flops(lambda x: jax.lax.map(lambda row: row @ x, x), x) == 2 * 4**3
    traced = jax.make_jaxpr(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y @ y, x))(x, 3)
    from latent_diffusion_jax.runtime.flops import traced_flops

    assert traced_flops(traced, rounds=5) == 5 * 2 * 4**3


def test_of_a_choice_by_platform_the_default_counts():
    def twice(x):
        return x @ x @ x

    def once(x):
        return x @ x

    x = jnp.zeros((4, 4))
    for cpu, default, expected in ((twice, once, 1), (once, twice, 2)):
        counted = count_flops(
            lambda x, c=cpu, d=default: jax.lax.platform_dependent(x, cpu=c, default=d), x
        )
        assert counted == expected * 2 * 4**3


def unet_flops(remat: str, batch: int = 2) -> float:
    unet = UNet(4, 8, (1,), 1, (0,), head_dim=8, num_groups=4, remat=remat)
    z, t = jnp.zeros((batch, 8, 8, 4)), jnp.zeros(batch, jnp.int32)
    context = jnp.zeros((batch, 3, 6))
    params = jax.eval_shape(unet.init, jax.random.key(0), z, t, context)
    return count_flops(
        jax.grad(lambda params: jnp.sum(unet.apply(params, z, t, context) ** 2)), params
    )


def test_what_is_computed_again_to_save_memory_does_not_count():
    plain = unet_flops("none")
    assert plain > 1e6
    np.testing.assert_allclose(unet_flops("none", batch=4), 2 * plain, rtol=1e-3)
    for remat in ("dots", "full"):
        assert unet_flops(remat) == plain, remat
