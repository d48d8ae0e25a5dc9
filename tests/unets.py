"""Small UNets of diffusers with random weights, and how they are run and compared."""

import functools
from typing import Any

import jax
import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights.unets import Loaded
from tests.torch_networks import nchw, nhwc

QUICKLY = {"xla_backend_optimization_level": 0}  # compiled


def types(*attends: bool, prefix: str = "CrossAttn", plain: str = "") -> dict[str, list[str]]:
    """Types of the levels' blocks, the highest resolution first."""
    down, up = f"{plain or 'Down'}Block2D", f"{plain.replace('Down', 'Up') or 'Up'}Block2D"
    return {
        "down_block_types": [f"{prefix}DownBlock2D" if a else down for a in attends],
        "up_block_types": [f"{prefix}UpBlock2D" if a else up for a in reversed(attends)],
    }


# Configs of diffusers; all levels' widths can be divided into 32 groups.
CONFIGS = {
    "stable_diffusion_1": dict(
        block_out_channels=[32, 64], layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=24, **types(True, False),
    ),
    "stable_diffusion_2": dict(
        block_out_channels=[32, 64], layers_per_block=1, attention_head_dim=[2, 4],
        cross_attention_dim=40, use_linear_projection=True, upcast_attention=True,
        in_channels=5, transformer_layers_per_block=[1, 2], **types(True, True),
    ),
    "text2im": dict(
        block_out_channels=[32, 64], layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=48, num_class_embeds=7, **types(False, True),
    ),
    "vectors": dict(
        block_out_channels=[32, 32, 96], layers_per_block=1, attention_head_dim=2,
        cross_attention_dim=16, class_embed_type="projection", dropout=0.1,
        projection_class_embeddings_input_dim=6, resnet_time_scale_shift="scale_shift",
        **types(False, True, False),
    ),
    "unconditional": dict(
        block_out_channels=[32, 64], layers_per_block=1, attention_head_dim=8, norm_eps=1e-6,
        **types(False, True, prefix="Attn"),
    ),
    "res_blocks": dict(
        block_out_channels=[32, 32, 64], layers_per_block=1, attention_head_dim=None,
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32,
        downsample_type="resnet", upsample_type="resnet",
        **types(True, False, False, prefix="Attn", plain="ResnetDownsample"),
    ),
}  # fmt: skip
TRANSFORMERS = ("stable_diffusion_1", "stable_diffusion_2", "text2im", "vectors")


@functools.cache
def model(name: str) -> torch.nn.Module:
    """A model of diffusers whose every tensor is random: norms and biases too."""
    torch.manual_seed(len(name))
    kind = UNet2DConditionModel if name in TRANSFORMERS else UNet2DModel
    network = kind(sample_size=8, **CONFIGS[name])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


Arguments = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


def arguments(loaded: Loaded, size: int = 8) -> Arguments:
    """Random latents, timesteps, context and vector for a network."""
    rng = np.random.default_rng(0)
    fields, vector, context = loaded.fields, None, None
    z_t = rng.normal(size=(2, size, size, loaded.in_channels)).astype(np.float32)
    if loaded.context_dim is not None:
        context = rng.normal(size=(2, 5, loaded.context_dim)).astype(np.float32)
    if fields.get("num_classes"):
        vector = rng.integers(fields["num_classes"], size=2)
    elif fields.get("vector_dim"):
        vector = rng.normal(size=(2, fields["vector_dim"])).astype(np.float32)
    return z_t, np.array([10, 700]), context, vector


def in_jax(loaded: Loaded, *arguments: np.ndarray | None) -> np.ndarray:
    """What our network makes of them."""
    network = jax.jit(UNet(**loaded.fields).apply, compiler_options=QUICKLY)
    return np.asarray(network({"params": loaded.params}, *arguments))


def in_torch(
    network: torch.nn.Module,
    z_t: np.ndarray,
    t: np.ndarray,
    context: np.ndarray | None,
    vector: np.ndarray | None,
) -> np.ndarray:
    """What a network of diffusers makes of the same."""
    tokens = [] if isinstance(network, UNet2DModel) else [None]
    if context is not None:
        tokens = [torch.tensor(context)]
    labels = None if vector is None else torch.tensor(vector)
    with torch.no_grad():
        out = network(nchw(z_t).float(), torch.tensor(t), *tokens, class_labels=labels)
    return nhwc(out.sample)


def assert_same_tree(a: Any, b: Any) -> None:
    """Two trees of parameters have the same names and bits."""
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)
