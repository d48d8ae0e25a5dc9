"""How exactly TPUs are asked to multiply, in what is lowered for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.models.inception import InceptionV3
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from tests.lowering import lowered, precisions

SMALL = dict(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4)
IMAGES, LARGE = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 32, 32, 3), np.float32)
TOKENS = np.zeros((1, 4), np.int32)
NETWORKS = {
    "unet": (
        UNet(**SMALL, head_dim=8, attention_levels=(1,)),
        (IMAGES, np.zeros(1, np.int32), np.zeros((1, 3, 5), np.float32)),
    ),
    "autoencoder": (AutoencoderKL(**SMALL), (IMAGES,)),
    "discriminator": (PatchDiscriminator(channels=4, num_layers=2), (LARGE,)),
    "text_transformer": (
        TextTransformer(vocab_size=9, max_length=4, width=8, depth=1, num_heads=1, head_dim=8),
        (TOKENS,),
    ),
    "clip": (ClipTextEncoder(vocab_size=9, width=8, depth=1, num_heads=2), (TOKENS,)),
    "lpips": (LPIPS(), (LARGE, LARGE)),
}


def asked_for(network, arguments):
    """The precisions of the products in a network and its gradient."""
    params = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]

    def loss(params):
        return jnp.sum(network.apply({"params": params}, *arguments))

    return precisions(lowered(jax.grad(loss), "tpu", params))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_multiplied_as_the_field_says(name):
    network, arguments = NETWORKS[name]
    assert asked_for(network, arguments) == {"HIGHEST" if name == "lpips" else "HIGH"}
    for precision in ("default", "highest"):
        found = asked_for(network.clone(precision=precision), arguments)
        assert found == {precision.upper()}


@pytest.mark.parametrize("name", ["unet", "autoencoder", "clip"])
def test_half_precision_asks_for_nothing(name):
    network, arguments = NETWORKS[name]
    network = network.clone(dtype=jnp.bfloat16, precision="highest")
    with jax.default_matmul_precision("highest"):
        assert asked_for(network, arguments) == {"DEFAULT"}


def test_methods_and_rematerialised_blocks_are_as_exact():
    network = AutoencoderKL(**SMALL, remat="full")
    params = jax.eval_shape(network.init, jax.random.key(0), IMAGES)["params"]
    for method, x in (("encode", IMAGES), ("decode", np.zeros((1, 4, 4, 3), np.float32))):
        text = lowered(
            lambda params, x, method=method: network.apply({"params": params}, x, method=method),
            "tpu", params, x,
        )  # fmt: skip
        assert precisions(text) == {"HIGH"}
    assert asked_for(network, (IMAGES,)) == {"HIGH"}


def test_inception_is_as_exact_as_can_be():
    network = InceptionV3()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), images)
    text = lowered(lambda params, x: network.apply(params, x), "tpu", params, images)
    assert precisions(text) == {"HIGHEST"} and len(re.findall("stablehlo.convolution", text)) > 90


def test_cpus_compute_the_same_numbers():
    network, (images,) = NETWORKS["autoencoder"]
    images = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    params = network.init(jax.random.key(0), images)
    found = [
        jax.jit(network.clone(precision=precision).apply)(params, images)
        for precision in ("default", "highest")
    ]
    np.testing.assert_array_equal(*found)
