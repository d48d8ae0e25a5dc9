"""Stable Diffusion's autoencoder in full size against `diffusers`: `pytest -m slow`."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import autoencoder_kl
from latent_diffusion_jax import build
from tests.torch_networks import diffusers_autoencoder, draw_params, in_diffusers, nchw, nhwc

SIZE = 256


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES, NOISE = 0.5 * normal(0, 1, SIZE, SIZE, 3), normal(1, 1, SIZE // 8, SIZE // 8, 4)
WEIGHTS = normal(2, *IMAGES.shape) / IMAGES.size  # of a scalar loss


def run_torch(reference, dtype) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """Values, and gradients by name; of the reference in this precision."""
    reference.to(dtype).zero_grad()
    images, noise, weights = (nchw(x).to(dtype) for x in (IMAGES, NOISE, WEIGHTS))
    posterior = reference.encode(images).latent_dist
    decoded = reference.decode(posterior.mean + posterior.std * noise).sample
    ((weights * decoded).sum() + 1e-6 * posterior.kl().sum()).backward()
    values = [nhwc(x.double()) for x in (posterior.mean, posterior.logvar, decoded)]
    return values, {name: p.grad.double() for name, p in reference.named_parameters()}


def worst(values, expected) -> float:
    """Error relative to the largest element, of the values that are worst off."""
    return max(
        np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        for a, b in zip(values, expected, strict=True)
    )


@pytest.mark.slow
def test_values_and_gradients_equal_diffusers():
    model = build.autoencoder(autoencoder_kl.get_config("f8"))
    params = draw_params(model, jnp.zeros((1, 8, 8, 3)))
    reference = diffusers_autoencoder(model, params)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected, gradients = run_torch(reference, torch.float64)
        gc.collect()
        single, single_gradients = run_torch(reference, torch.float32)
    finally:
        torch.set_num_threads(threads)
    reference.zero_grad()
    gc.collect()

    def forward(network):
        posterior = network.encode(IMAGES)
        return posterior, network.decode(posterior.sample(NOISE))

    def loss(params):
        posterior, decoded = model.apply({"params": params}, method=forward)
        total = jnp.sum(WEIGHTS * decoded) + 1e-6 * jnp.sum(posterior.kl())
        return total, (posterior.mean, posterior.logvar, decoded)

    options = {"xla_backend_optimization_level": 2}
    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
    our_gradients, ours = run(params)
    our_gradients = in_diffusers(our_gradients, reference)

    def worst_gradient(found) -> tuple[float, str]:
        assert found.keys() == gradients.keys()
        largest = max(g.abs().max().item() for g in gradients.values())
        errors = {}
        for name, gradient in gradients.items():
            scale = max(gradient.abs().max().item(), 1e-3 * largest)
            errors[name] = (found[name] - gradient).abs().max().item() / scale
        name = max(errors, key=errors.__getitem__)
        return errors[name], name

    print(f"values: ours {worst(ours, expected):.1e}, torch's {worst(single, expected):.1e}")
    print(f"gradients: ours {worst_gradient(our_gradients)}, torch's "
          f"{worst_gradient(single_gradients)}")  # fmt: skip
    assert worst(ours, expected) < 1e-5
    assert worst_gradient(our_gradients)[0] < 1e-4
