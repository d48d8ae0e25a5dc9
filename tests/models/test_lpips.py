"""LPIPS against the `lpips` package with random weights, and as a distance."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from latent_diffusion_jax.models import lpips
from latent_diffusion_jax.models.lpips import LPIPS, VGG16
from latent_diffusion_jax.weights import lpips as lpips_weights
from tests.torch_networks import nchw, nhwc


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def vgg_features() -> nn.Sequential:
    """`features` of torchvision's VGG16."""
    layers, channels = [], 3
    for block in lpips.VGG_BLOCKS:
        for width in block:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def package():
    """The `lpips` package; of torchvision, which it imports, it needs the layers of a VGG16."""
    with pytest.MonkeyPatch.context() as patch:
        torchvision = types.ModuleType("torchvision")
        torchvision.models = types.ModuleType("torchvision.models")
        torchvision.models.vgg16 = lambda pretrained: types.SimpleNamespace(features=vgg_features())
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", torchvision.models)
        import lpips as package

        yield package


def test_values_and_gradients_equal_the_package(package, tmp_path):
    torch.manual_seed(0)
    reference = package.LPIPS(pretrained=False, net="vgg", pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.startswith("lin"):
                parameter.uniform_(0, 1)  # learned weights are not negative
            elif parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
            else:
                parameter.uniform_(-0.2, 0.2)
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    params = lpips_weights.load(tmp_path / "lpips.pth")
    reference.double()

    x, y = np.random.default_rng(2).uniform(-1, 1, (2, 2, 32, 16, 3)).astype(np.float32)
    y[1] = x[1] + 0.05 * y[1]
    torch_x, torch_y = nchw(x).requires_grad_(), nchw(y).requires_grad_()
    expected = reference(torch_x, torch_y)
    expected.sum().backward()

    def total(x, y, params):
        distance = LPIPS().apply({"params": params}, x, y)
        return distance.sum(), distance

    gradients, distance = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, y, params)
    np.testing.assert_allclose(distance, expected.detach().numpy()[:, 0, 0, 0], rtol=1e-5)
    for ours, theirs in zip(gradients, (torch_x, torch_y), strict=True):
        for a, b in zip(ours, nhwc(theirs.grad), strict=True):  # each pair has its own scale
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


X, Y = normal(0, 3, 16, 32, 3), normal(1, 3, 16, 32, 3)


@pytest.fixture(scope="module")
def narrow(random_params):
    """A narrow VGG's compiled distance with its gradient by y, and its random parameters."""

    def total(y, x, params):
        distance = LPIPS().apply({"params": params}, x, y)
        return distance.sum(), distance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "VGG_BLOCKS", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
        params = random_params(LPIPS(), X, Y)
        run = jax.jit(jax.grad(total, has_aux=True)).lower(Y, X, params).compile()
    # The learned weights of the channels are not negative.
    return run, {k: np.abs(v) if k != "vgg" else v for k, v in params.items()}


@pytest.fixture(scope="module")
def distance(narrow):
    run, params = narrow
    return lambda x, y: np.asarray(run(y, x, params)[1])


def test_distance_is_zero_to_itself_positive_and_symmetric(distance):
    np.testing.assert_allclose(distance(X, X), np.zeros(3), rtol=0, atol=1e-12)
    forth, back = distance(X, Y), distance(Y, X)
    assert forth.shape == (3,) and (forth > 1e-3).all()
    np.testing.assert_allclose(forth, back, rtol=1e-5)


def test_distance_grows_with_the_disturbance(distance):
    small, large = distance(X, X + 0.05 * Y), distance(X, X + 0.5 * Y)
    assert (small > 0).all() and (small < 0.5 * large).all()


def test_distances_of_a_batch_are_those_of_its_pairs(distance):
    together = distance(X, Y)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(distance(X[order], Y[order]), together[order], rtol=1e-5)


@pytest.mark.parametrize("layer", ["conv_0_1", "conv_4_2"])
def test_gradients_are_finite_where_every_feature_is_zero(narrow, layer):
    """The norm's square root has no derivative there."""
    run, params = narrow
    convolution = params["vgg"][layer]
    dead = params["vgg"] | {layer: convolution | {"bias": convolution["bias"] - 100.0}}
    gradient, distance = run(Y, X, params | {"vgg": dead})
    assert np.isfinite(distance).all() and np.isfinite(gradient).all()


def test_vgg_halves_the_size_from_block_to_block():
    images = jnp.zeros((2, 32, 64, 3))
    features, _ = jax.eval_shape(lambda: VGG16().init_with_output(jax.random.key(0), images))
    assert [f.shape for f in features] == [
        (2, 32, 64, 64),
        (2, 16, 32, 128),
        (2, 8, 16, 256),
        (2, 4, 8, 512),
        (2, 2, 4, 512),
    ]
