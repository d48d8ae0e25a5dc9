"""InceptionV3: parity with torch-fidelity's, whose own tests hold it to TensorFlow's graph."""

import importlib
import importlib.util
import sys

import jax
import numpy as np
import pytest
import torch

from latent_diffusion_jax.models.inception import InceptionV3, resize
from latent_diffusion_jax.weights import inception as inception_weights


def fidelity(name: str):
    """A module of torch-fidelity, without the package's own __init__ that needs torchvision."""
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"torch_fidelity.{name}")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file like the published one, with random weights and statistics."""
    module = fidelity("feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:  # there is nothing to load yet
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        tensors = module.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("bn.weight"):
            tensor.uniform_(0.8, 1.6, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0.0, 0.2, generator=generator)
        else:
            torch.nn.init.kaiming_normal_(tensor, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def reference(weights_file):
    """Images uint8 [B, H, W, 3] -> features, logits without and with their bias."""
    network = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased", "logits"], str(weights_file)
    )
    return lambda images: network(torch.tensor(images).permute(0, 3, 1, 2))


def levels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(2, 48, 80, 3), (1, 320, 303, 3)])  # enlarged, shrunk
def test_features_and_logits_equal_torch_fidelity(reference, weights_file, shape):
    images = levels(*shape)
    params = inception_weights.load(weights_file)
    found = jax.jit(InceptionV3().apply)({"params": params}, images)
    expected = [x.numpy() for x in reference(images)]
    assert found.features.shape == (shape[0], 2048) and found.logits.shape == (shape[0], 1008)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 1.0  # nothing has died on the way
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("size", [(299, 299), (32, 32), (17, 300), (512, 256), (598, 897)])
def test_resize_equals_tensorflows(size):
    images = levels(2, *size, 3)
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    expected = theirs(
        torch.tensor(images).permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False
    )
    found = np.asarray(resize(images, 299))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=2e-4)
    np.testing.assert_array_equal(found, resize(images.astype(np.float32), 299))
    if size == (299, 299):
        np.testing.assert_array_equal(found, images)
