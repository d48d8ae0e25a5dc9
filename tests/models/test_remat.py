"""Rematerialisation: no policy changes a number or a name; on TPUs each takes less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from latent_diffusion_jax.models import remat
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.planning.compiled import NO_SEARCH
from latent_diffusion_jax.runtime.compilation import offload_options
from latent_diffusion_jax.runtime.trees import flatten_names
from tests.torch_networks import draw_params

# Small: each policy is compiled.
FIELDS = dict(
    channels=4, channel_multipliers=(1, 2), num_res_blocks=0, num_groups=2, attention_levels=(0,)
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_every_policy(make, *arguments):
    """Values and gradients of a network by policy; parameters are those without one."""
    params = draw_params(make("none"), *arguments)

    def run(policy):
        network = make(policy)

        @jax.jit
        def value_and_gradient(params):
            def loss(params):
                y = network.apply({"params": params}, *arguments)
                return jnp.sum(jnp.sin(y)), y

            return jax.value_and_grad(loss, has_aux=True)(params)

        shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        (_, y), gradient = value_and_gradient(params)
        return y, gradient

    return {policy: run(policy) for policy in remat.POLICIES}


def check_equal(found):
    y, gradient = found["none"]
    expected = flatten_names(gradient)
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for policy, (ours, theirs) in found.items():
        np.testing.assert_allclose(ours, y, rtol=0, atol=1e-5 * np.abs(y).max(), err_msg=policy)
        for name, leaf in flatten_names(theirs).items():
            # Some gradients are zero but for rounding: of biases that a norm takes away again.
            scale = max(np.abs(expected[name]).max(), 0.01 * largest)
            error = np.abs(leaf - expected[name]).max()
            assert error < 1e-5 * scale, (policy, name)


def test_no_policy_changes_a_unet():
    fields = FIELDS | dict(head_dim=4, dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 2)
    arguments = normal(13, 2, 4, 4, 3), np.array([10, 700]), normal(14, 2, 3, 4), None, keys
    check_equal(with_every_policy(lambda policy: UNet(**fields, remat=policy), *arguments))


@pytest.mark.slow  # gradients with one policy are in test_autoencoder_networks.py
def test_no_policy_changes_an_autoencoder():
    images = normal(2, 1, 8, 8, 3)
    check_equal(with_every_policy(lambda policy: AutoencoderKL(**FIELDS, remat=policy), images))


@pytest.mark.parametrize("network", [UNet, AutoencoderKL])
def test_unknown_policies_are_named(network):
    arguments = (np.zeros((1, 8, 8, 3), np.float32), np.zeros(1))[: 2 if network is UNet else 1]
    with pytest.raises(ValueError, match="unknown remat 'some'; known: none, dots, blocks"):
        jax.eval_shape(network(remat="some").init, jax.random.key(0), *arguments)


def gradient_memory(policy, tpu):
    """Temporary bytes of a UNet's gradient on a TPU, and of the host's memory."""
    network = UNet(
        channels=128,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=2,
        attention_levels=(),
        remat=policy,
        dtype=jnp.bfloat16,
    )
    place = SingleDeviceSharding(tpu)

    def given(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    arguments = (jnp.zeros((64, 32, 32, 3)), jnp.zeros(64, jnp.int32), jnp.zeros((64, 16, 32)))
    params = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]

    def loss(params, arguments):
        return jnp.mean(jnp.square(network.apply({"params": params}, *arguments)))

    options = NO_SEARCH | (offload_options("tpu") if policy == "offload" else {})
    gradient = jax.jit(jax.grad(loss), out_shardings=place, compiler_options=options)
    found = gradient.lower(given(params), given(arguments)).compile().memory_analysis()
    return found.temp_size_in_bytes, found.host_temp_size_in_bytes


@pytest.mark.slow  # libtpu takes a minute for each
def test_what_policies_take_of_a_tpus_memory(tpu_topology):
    (tpu,) = tpu_topology("v5e:1x1")
    bytes_of = {policy: gradient_memory(policy, tpu) for policy in remat.POLICIES}
    temporary = {policy: found[0] for policy, found in bytes_of.items()}
    assert temporary["none"] > temporary["dots"] > temporary["blocks"] >= temporary["full"]
    assert temporary["offload"] < 0.95 * temporary["blocks"]
    assert [policy for policy, found in bytes_of.items() if found[1]] == ["offload"]
