"""PyTorch's side of the parity tests: the same networks, and parameters under its names."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from latent_diffusion_jax.runtime.trees import flatten_names, path_name

torch.set_num_threads(1)  # tensors here are so small that more threads only wait for each other


def draw_params(module: Any, *arguments: Any, seed: int = 0) -> Any:
    """Parameters of a Flax module, every leaf random: zero-initialised ones and norms' too."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path).rsplit("/", 1)[-1]
        noise = rng.normal(size=leaf.shape)
        if name == "scale":
            noise = 1.0 + 0.3 * noise
        elif name == "kernel":
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            noise = 0.3 * noise
        return noise.astype(leaf.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_names(tree: Any, renames: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Flax parameters, or their gradients, by PyTorch name and in its layout, float64.

    `renames` are (pattern, replacement) pairs applied in turn to names like `a/b/kernel`.
    """
    out = {}
    for name, leaf in flatten_names(tree).items():
        leaf = np.array(leaf, np.float64)
        if name.endswith("/kernel"):
            # HWIO -> OIHW, and [in, out] -> [out, in].
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        name = re.sub(r"/dense/", "/", name)
        name = re.sub(r"/(kernel|scale)$", "/weight", name)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        name = name.replace("/", ".")
        assert name not in out, name
        out[name] = torch.tensor(leaf)
    return out


def check_gradients(ours: dict[str, torch.Tensor], module: nn.Module, tolerance: float):
    """Every parameter's gradient, relative to its largest element (or to 0.1 % of the overall)."""
    theirs = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        error = (ours[name] - grad).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def nchw(x: Any) -> torch.Tensor:
    """[B, H, W, C] -> float64 [B, C, H, W]."""
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def diffusers_names(levels: int) -> list[tuple[str, str]]:
    """Our names to those of `diffusers`' autoencoders, as (pattern, replacement) pairs."""
    return [
        (r"^quantizer/codebook$", "quantize/embedding/weight"),
        (r"/norm_out/", "/conv_norm_out/"),
        (r"/mid/block_1/", "/mid_block/resnets/0/"),
        (r"/mid/block_2/", "/mid_block/resnets/1/"),
        (r"/mid/attn_1/", "/mid_block/attentions/0/"),
        (r"/down_(\d)_block_(\d)/", r"/down_blocks/\1/resnets/\2/"),
        (r"/down_(\d)_attn_(\d)/", r"/down_blocks/\1/attentions/\2/"),
        (r"/down_(\d)_downsample/", r"/down_blocks/\1/downsamplers/0/conv/"),
        # diffusers counts up blocks from the lowest resolution.
        *((rf"/up_{level}_", f"/up_blocks/{levels - 1 - level}/") for level in range(levels)),
        (r"(/up_blocks/\d)/block_(\d)/", r"\1/resnets/\2/"),
        (r"(/up_blocks/\d)/attn_(\d)/", r"\1/attentions/\2/"),
        (r"(/up_blocks/\d)/upsample/", r"\1/upsamplers/0/conv/"),
        (r"/shortcut/", "/conv_shortcut/"),
        (r"(/attentions/\d)/norm/", r"\1/group_norm/"),
        (r"(/attentions/\d)/([qkv])/", r"\1/to_\2/"),
        (r"(/attentions/\d)/proj_out/", r"\1/to_out/0/"),
    ]


def in_diffusers(tree: Any, reference: nn.Module) -> dict[str, torch.Tensor]:
    """Our parameters, or their gradients, as a state of a diffusers autoencoder."""
    names = diffusers_names(len(reference.config.block_out_channels))
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    # A 1x1 convolution over pixels there is a linear layer on tokens.
    return {name: x.reshape(shapes[name]) for name, x in torch_names(tree, names).items()}


def diffusers_autoencoder(model: Any, params: Any) -> nn.Module:
    """The network of diffusers that an AutoencoderKL or AutoencoderVQ is, in float64."""
    levels = range(len(model.channel_multipliers))
    attends = [level in model.attention_levels for level in levels]
    fields = dict(
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        down_block_types=[f"{'Attn' * attend}DownEncoderBlock2D" for attend in attends],
        up_block_types=[f"{'Attn' * attend}UpDecoderBlock2D" for attend in attends[::-1]],
        block_out_channels=[model.channels * m for m in model.channel_multipliers],
        layers_per_block=model.num_res_blocks,
        latent_channels=model.z_channels,
        norm_num_groups=model.num_groups,
        mid_block_add_attention=model.mid_attention,
    )
    if hasattr(model, "codebook_size"):
        codes = dict(num_vq_embeddings=model.codebook_size, vq_embed_dim=model.embed_dim)
        reference = VQModel(**fields, **codes).double()
    else:
        reference = AutoencoderKL(**fields).double()
    reference.load_state_dict(in_diffusers(params, reference), strict=True)
    return reference


class ActNorm(nn.Module):
    """Scale and shift of each channel as taming-transformers has them, started from data."""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.ones(width))
        self.start = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.start:
            self.start = False
            with torch.no_grad():
                by_channel = x.transpose(0, 1).flatten(1)
                self.shift.copy_(-by_channel.mean(1))
                self.weight.copy_(1 / (by_channel.std(1) + 1e-6))
        return self.weight[:, None, None] * (x + self.shift[:, None, None])


class PatchDiscriminator(nn.Sequential):
    """NLayerDiscriminator of pix2pix in float64, its layers under our names."""

    def __init__(self, in_channels: int, channels: int, num_layers: int, norm: str):
        super().__init__()

        def add(i: int, before: int, width: int, stride: int, bias: bool = True):
            self.add_module(f"conv_{i}", nn.Conv2d(before, width, 4, stride, 1, bias=bias))

        add(0, in_channels, width := channels, 2)
        self.add_module("relu_0", nn.LeakyReLU(0.2))
        for i in range(1, num_layers + 1):
            before, width = width, channels * min(2**i, 8)
            add(i, before, width, 2 if i < num_layers else 1, norm == "activation")
            kind = ActNorm if norm == "activation" else nn.BatchNorm2d
            self.add_module(f"norm_{i}", kind(width))
            self.add_module(f"relu_{i}", nn.LeakyReLU(0.2))
        add(num_layers + 1, width, 1, 1)
        self.double().train()

    def load(self, params: Any) -> "PatchDiscriminator":
        """Takes over the parameters of our discriminator."""
        missing, unexpected = self.load_state_dict(torch_names(params, []), strict=False)
        assert not unexpected
        assert all(name.split(".")[1].startswith(("running", "num_batches")) for name in missing)
        return self

    def start_from(self, images: torch.Tensor) -> None:
        """Lets activation norms start from these images."""
        for layer in self:
            if isinstance(layer, ActNorm):
                layer.start = True
        with torch.no_grad():
            self(images)
