"""LPIPS weights: parity with the published formula through a file, and the loader's errors.

The reference is VGG16 and LPIPS in plain PyTorch, with the names of torchvision and of `lpips`.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import lpips as lpips_weights

# torchvision's configuration "D" up to relu5_3; "M" is max pooling.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's `features`
WIDTHS = (64, 128, 256, 512, 512)


def vgg_features() -> nn.Sequential:
    layers, channels = [], 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


class TorchLPIPS(nn.Module):
    """`lpips.LPIPS(net="vgg", version="0.1", lpips=True)` in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.features = vgg_features()
        for k, width in enumerate(WIDTHS):
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            setattr(self, f"lin{k}", lin)
        self.eval()

    def unit_features(self, x):
        shift = x.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = x.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        x, out = (x - shift) / scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                out.append(x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10))
        return out

    def forward(self, x, y):
        pairs = zip(self.unit_features(x), self.unit_features(y), strict=True)
        return sum(
            getattr(self, f"lin{k}").model((a - b) ** 2).mean(dim=(1, 2, 3))
            for k, (a, b) in enumerate(pairs)
        )


@pytest.fixture(scope="module")
def reference() -> TorchLPIPS:
    torch.manual_seed(0)
    model = TorchLPIPS().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("lin"):
                parameter.uniform_(0, 1)  # learned weights are not negative
            elif name.endswith("weight"):
                nn.init.kaiming_normal_(parameter)
            else:
                parameter.uniform_(-0.2, 0.2)
    return model


@pytest.fixture(scope="module")
def weights_file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    safetensors.numpy.save_file(tensors, str(path))
    return path


def test_distances_and_gradients_equal_torch(reference, weights_file):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    y[1] = x[1] + 0.05 * y[1]
    params = lpips_weights.load(weights_file)

    def total(y, x, params):
        distance = LPIPS().apply({"params": params}, x, y)
        return distance.sum(), distance

    quickly = {"xla_backend_optimization_level": 0}  # compiled
    run = jax.jit(jax.grad(total, has_aux=True), compiler_options=quickly)
    gradient, distance = run(y, x, params)

    x, y = (torch.tensor(images).permute(0, 3, 1, 2) for images in (x, y))
    y.requires_grad_()
    expected = reference(x, y)
    expected.sum().backward()
    assert distance.shape == (2,)
    np.testing.assert_allclose(distance, expected.detach().numpy(), rtol=1e-5)
    expected = y.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_the_loaded_tree_is_that_of_the_module(weights_file):
    images = np.zeros((1, 16, 16, 3), np.float32)
    wanted = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    loaded = lpips_weights.load(str(weights_file))  # a string works as well as a path
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    assert jax.tree.leaves(jax.tree.map(np.shape, loaded)) == jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf.shape, wanted)
    )


def zeros() -> dict[str, np.ndarray]:
    """A complete file's tensors, small in half precision."""
    names = TorchLPIPS().state_dict()
    return {name: np.zeros(tensor.shape, np.float16) for name, tensor in names.items()}


def test_half_precision_files_load_as_float32(tmp_path):
    path = tmp_path / "half.safetensors"
    safetensors.numpy.save_file(zeros(), str(path))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(lpips_weights.load(path))}
    assert dtypes == {np.dtype("float32")}


@pytest.mark.parametrize(
    "name", ["features.0.weight", "features.28.bias", "lin0.model.1.weight", "lin4.model.1.weight"]
)
def test_a_missing_tensor_is_named(tmp_path, name):
    path = tmp_path / "partial.safetensors"
    tensors = zeros()
    del tensors[name]
    safetensors.numpy.save_file(tensors, str(path))
    with pytest.raises(UserError) as error:
        lpips_weights.load(path)
    assert repr(name) in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("features.0.weight", (3, 3, 3, 64), "(64, 3, 3, 3)"),  # Flax's layout
        ("features.5.bias", (64,), "(128,)"),
        ("lin3.model.1.weight", (512,), "(1, 512, 1, 1)"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, name, shape, expected):
    path = tmp_path / "misshapen.safetensors"
    safetensors.numpy.save_file(zeros() | {name: np.zeros(shape, np.float16)}, str(path))
    with pytest.raises(UserError) as error:
        lpips_weights.load(path)
    for part in (repr(name), str(shape), expected, str(path)):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a pickle perhaps", b"\xff" * 64])
def test_no_file_or_another_kind_of_file_is_named(tmp_path, content):
    path = tmp_path / "vgg.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read LPIPS weights") as error:
        lpips_weights.load(path)
    assert str(path) in str(error.value)


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="cannot read LPIPS weights"):
        lpips_weights.load(tmp_path)


# The files that the weights are published in, made with the reference's weights.


def split(reference) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """States of torchvision's VGG16 and of the linear layers."""
    state = reference.state_dict()
    vgg = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    vgg |= {
        f"classifier.{i}.{kind}": torch.zeros(3) for i in (0, 3, 6) for kind in ("weight", "bias")
    }
    return vgg, {name: tensor for name, tensor in state.items() if name.startswith("lin")}


def of_the_module(reference) -> dict[str, torch.Tensor]:
    """State of `lpips.LPIPS(net="vgg")`: VGG in five slices, linear layers twice."""
    state = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith("features."):
            index = int(name.split(".")[1])
            part = 1 + sum(index > tap for tap in TAPS)
            state[name.replace("features.", f"net.slice{part}.")] = tensor
        else:
            state[name] = state[f"lins.{name[3]}{name[4:]}"] = tensor
    state["scaling_layer.shift"] = state["scaling_layer.scale"] = torch.zeros(1, 3, 1, 1)
    return state


def assert_same(path, expected):
    ours, theirs = lpips_weights.load(path), lpips_weights.load(expected)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("legacy", [False, True])
def test_torchvisions_and_lpips_files_make_one(reference, weights_file, tmp_path, legacy):
    paths = [tmp_path / "vgg16.pth", tmp_path / "vgg.pth"]
    for path, state in zip(paths, split(reference), strict=True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / "new" / "lpips.safetensors"
    lpips_weights.convert(paths[::-1], out)
    assert_same(out, weights_file)
    written = safetensors.numpy.load_file(out)
    original = safetensors.numpy.load_file(weights_file)
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, original[name], err_msg=name)


@pytest.mark.parametrize(
    "prefix", ["", "loss.perceptual_loss.", "first_stage_model.loss.perceptual_loss."]
)
def test_one_file_with_both_is_enough(reference, weights_file, tmp_path, prefix):
    """The module's own state, and the checkpoint of an autoencoder that was trained with it."""
    state = {prefix + name: tensor for name, tensor in of_the_module(reference).items()}
    if prefix:
        state |= {"encoder.conv_in.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    lpips_weights.convert([tmp_path / "model.ckpt"], tmp_path / "lpips.safetensors")
    assert_same(tmp_path / "lpips.safetensors", weights_file)
    assert_same(tmp_path / "model.ckpt", weights_file)  # it need not even be converted


def test_sources_that_are_not_enough_or_too_much_are_refused(reference, tmp_path):
    vgg, linear = tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    for path, state in zip((vgg, linear), split(reference), strict=True):
        torch.save(state, path)
    out = tmp_path / "lpips.safetensors"
    with pytest.raises(
        UserError, match=r"5 missing: 'lin0\.model\.1\.weight' \(1, 64, 1, 1\)"
    ) as error:
        lpips_weights.convert([vgg], out)
    assert str(vgg) in str(error.value)
    with pytest.raises(UserError, match=r"26 missing: 'features\..* and 6 more"):
        lpips_weights.convert([linear], out)
    with pytest.raises(UserError, match=r"has tensor 'features\.0\.bias', and so has a source"):
        lpips_weights.convert([vgg, linear, vgg], out)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1), "lin9.a": torch.zeros(2)}, linear)
    with pytest.raises(UserError, match=r"1 extra: 'lin9\.a' \(2,\)"):
        lpips_weights.convert([vgg, linear], out)
    with pytest.raises(UserError, match=r"written as \.safetensors, not to .*lpips\.pth"):
        lpips_weights.convert([vgg, linear], tmp_path / "lpips.pth")
    assert not out.exists()
