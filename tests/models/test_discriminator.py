"""PatchGAN discriminator against the layers of pix2pix in PyTorch, and its receptive field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.models import discriminator as module
from latent_diffusion_jax.models.discriminator import ActNorm, BatchNorm, PatchDiscriminator
from latent_diffusion_jax.runtime.trees import count
from tests.torch_networks import PatchDiscriminator as TorchDiscriminator
from tests.torch_networks import check_gradients, draw_params, nchw, nhwc, torch_names


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(ours, expected, tolerance: float) -> None:
    """Relative to the largest element."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Four layers reach the cap on the width, 8 times the first.
@pytest.mark.parametrize(
    ("norm", "num_layers", "size", "channels"),
    [("batch", 2, 16, 3), ("batch", 4, 64, 1), ("activation", 2, 16, 5), ("activation", 3, 32, 3)],
)
def test_values_and_gradients_equal_torch(norm, num_layers, size, channels):
    model = PatchDiscriminator(channels=4, num_layers=num_layers, norm=norm)
    images = normal(0, 2, size, size, channels)
    params = draw_params(model, images)
    reference = TorchDiscriminator(channels, 4, num_layers, norm).load(params)

    x = nchw(images).requires_grad_()
    theirs = reference(x)
    weights = normal(1, *theirs.permute(0, 2, 3, 1).shape)
    (nchw(weights) * theirs).sum().backward()

    def loss(params, images):
        logits = model.apply({"params": params}, images)
        return jnp.sum(weights * logits), logits

    (param_grad, image_grad), logits = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, images)
    assert logits.shape == nhwc(theirs).shape and logits.dtype == jnp.float32
    assert_close(logits, nhwc(theirs), 1e-5)
    assert_close(image_grad, nhwc(x.grad), 1e-4)
    check_gradients(torch_names(param_grad, []), reference, 1e-4)


def test_activation_norms_start_from_the_data_as_in_torch():
    """Layer after layer: each sees what the one before it, just set, lets through."""
    model = PatchDiscriminator(channels=4, num_layers=3, norm="activation")
    images = 3 * normal(2, 3, 32, 32, 3) + 1
    params = draw_params(model, images)
    reference = TorchDiscriminator(3, 4, 3, "activation").load(params)
    reference.start_from(nchw(images))

    logits, updated = model.apply({"params": params}, images, True, mutable=["params"])
    theirs = reference.state_dict()
    for name, tensor in torch_names(updated["params"], []).items():
        assert_close(tensor.numpy(), theirs[name].numpy(), 1e-5)
    assert_close(logits, nhwc(reference(nchw(images))), 1e-5)
    for i in range(4):  # convolutions stay as they are, and so do later calls
        kernel = updated["params"][f"conv_{i}"]["kernel"]
        np.testing.assert_array_equal(kernel, params[f"conv_{i}"]["kernel"])
    assert_close(model.apply(updated, images), logits, 1e-6)


def test_activation_norm_sets_mean_and_deviation():
    x = 5 * normal(3, 4, 6, 6, 2) + 40
    params = {"shift": jnp.zeros(2), "scale": jnp.ones(2)}
    np.testing.assert_array_equal(ActNorm().apply({"params": params}, x), x)
    y, updated = ActNorm().apply({"params": params}, x, True, mutable=["params"])
    np.testing.assert_allclose(np.mean(y, axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(y, axis=(0, 1, 2), ddof=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(ActNorm().apply(updated, x), y, rtol=1e-6)
    half = ActNorm().apply(updated, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.1)


@pytest.mark.parametrize(
    ("num_layers", "size", "logits", "parameters"),
    [(3, 256, 30, 2_765_633), (2, 256, 62, 663_361), (2, 64, 14, 663_361)],
)
def test_logits_and_parameters_are_those_of_the_reference(num_layers, size, logits, parameters):
    model = PatchDiscriminator(num_layers=num_layers)
    images = jnp.zeros((1, size, size, 3))
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert out.shape == (1, logits, logits, 1)
    assert count(variables["params"]) == parameters


def test_a_norm_that_does_not_exist_is_refused_with_those_that_do():
    model = PatchDiscriminator(norm="group")
    with pytest.raises(ValueError, match="unknown norm 'group'; known: batch, activation"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert module.NORMS == ("batch", "activation")


@pytest.mark.parametrize(("num_layers", "field"), [(2, 34), (3, 70)])
def test_receptive_field(monkeypatch, num_layers, field):
    """Of the convolutions: batch statistics, which see everything, are left out."""
    monkeypatch.setattr(BatchNorm, "__call__", lambda self, x: x)
    model = PatchDiscriminator(channels=2, num_layers=num_layers)
    images = normal(2, 1, 96, 96, 3)
    params = draw_params(model, images)

    def middle_logit(images):
        logits = model.apply({"params": params}, images)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    seen = np.abs(jax.jit(jax.grad(middle_logit))(images)[0]).max(axis=-1) > 0
    assert seen.sum() == field**2
    assert seen.any(axis=0).sum() == seen.any(axis=1).sum() == field


def test_initialisation_is_that_of_pix2pix():
    """Convolutions N(0, 0.02), norms N(1, 0.02), and no running averages beside the parameters."""
    model = PatchDiscriminator(channels=16, num_layers=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert set(variables) == {"params"}
    params = variables["params"]
    for name in ("conv_0", "conv_1", "conv_2"):
        assert abs(np.std(params[name]["kernel"]) / 0.02 - 1) < 0.15
    scales = np.concatenate([params[name]["scale"] for name in ("norm_1", "norm_2")])
    assert abs(scales.mean() - 1) < 0.01 and abs(np.std(scales) / 0.02 - 1) < 0.35
    assert not np.any(params["norm_1"]["bias"])
    assert "bias" not in params["conv_1"] and "bias" in params["conv_0"]


def test_batch_norm_normalises_over_the_batch():
    x = 5 * normal(3, 4, 6, 6, 2) + 40
    norm = BatchNorm()
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    y = np.asarray(norm.apply({"params": params}, x), np.float64)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1.0, atol=1e-5)
    half = norm.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.1)
