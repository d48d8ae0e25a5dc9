"""PatchGAN discriminator against the layers of pix2pix in PyTorch, and its receptive field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from latent_diffusion_jax.models.discriminator import BatchNorm, PatchDiscriminator


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pix2pix(in_channels: int, channels: int, num_layers: int) -> tuple[nn.Sequential, list]:
    """NLayerDiscriminator of pix2pix, and our name for each of its layers."""
    layers, names = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)], ["conv_0", ""]
    width = channels
    for i in range(1, num_layers + 1):
        before, width = width, channels * min(2**i, 8)
        stride = 2 if i < num_layers else 1
        layers += [
            nn.Conv2d(before, width, 4, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
        ]
        names += [f"conv_{i}", f"norm_{i}", ""]
    layers.append(nn.Conv2d(width, 1, 4, 1, 1))
    names.append(f"conv_{num_layers + 1}")
    return nn.Sequential(*layers).double().train(), names


# Four layers reach the cap on the width, 8 times the first.
@pytest.mark.parametrize(("num_layers", "size"), [(2, 16), (3, 32), (4, 64)])
def test_values_and_gradients_equal_torch(
    num_layers, size, random_params, to_torch, assert_gradients_equal
):
    model = PatchDiscriminator(channels=4, num_layers=num_layers)
    images = normal(0, 2, size, size, 3)
    params = random_params(model, images)
    reference, names = pix2pix(3, 4, num_layers)
    renames = [(f"^{name}/", f"{i}/") for i, name in enumerate(names) if name]
    missing, unexpected = reference.load_state_dict(to_torch(params, renames), strict=False)
    assert not unexpected
    assert all(name.split(".")[1].startswith(("running", "num_batches")) for name in missing)

    x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    theirs = reference(x)
    weights = normal(1, *theirs.permute(0, 2, 3, 1).shape)
    (torch.tensor(weights).permute(0, 3, 1, 2) * theirs).sum().backward()

    def loss(params, images):
        logits = model.apply({"params": params}, images)
        return jnp.sum(weights * logits), logits

    (param_grad, image_grad), logits = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, images)
    expected = theirs.detach().permute(0, 2, 3, 1).numpy()
    assert logits.shape == expected.shape and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    expected = x.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(image_grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert_gradients_equal(to_torch(param_grad, renames), reference, 1e-4)


@pytest.mark.parametrize(("num_layers", "size", "logits"), [(3, 256, 30), (2, 64, 14)])
def test_logits_are_one_for_each_patch(num_layers, size, logits):
    model = PatchDiscriminator(num_layers=num_layers)
    images = jnp.zeros((1, size, size, 3))
    out, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images))
    assert out.shape == (1, logits, logits, 1)


@pytest.mark.parametrize(("num_layers", "field"), [(2, 34), (3, 70)])
def test_receptive_field(monkeypatch, random_params, num_layers, field):
    """Of the convolutions: batch statistics, which see everything, are left out."""
    monkeypatch.setattr(BatchNorm, "__call__", lambda self, x: x)
    model = PatchDiscriminator(channels=2, num_layers=num_layers)
    images = normal(2, 1, 96, 96, 3)
    params = random_params(model, images)

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
