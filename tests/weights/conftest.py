"""What the weight tests share: diffusers' models with random weights, and CompVis' names."""

import functools
import re

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from latent_diffusion_jax.weights import autoencoders

torch.set_num_threads(1)

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def blocks(*attends: bool) -> dict[str, list[str]]:
    """Types of the levels' blocks, the highest resolution first."""
    return {
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
    }


# Configs of diffusers; all levels' widths can be divided into 32 groups.
CONFIGS = {
    "kl": dict(
        block_out_channels=[32, 64],
        layers_per_block=1,
        latent_channels=3,
        scaling_factor=0.25,
        **blocks(False, False),
    ),
    "kl_attention": dict(
        in_channels=1,
        out_channels=1,
        block_out_channels=[32, 32, 96],
        layers_per_block=2,
        mid_block_add_attention=False,
        **blocks(False, True, False),
    ),
    "vq": dict(
        block_out_channels=[32, 64],
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=17,
        vq_embed_dim=5,
        **blocks(True, True),
    ),
    "vq_plain": dict(
        block_out_channels=[32],
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
        **blocks(False),
    ),
}


def draw_model(name: str) -> torch.nn.Module:
    """A model of diffusers whose every tensor is random: norms and biases too."""
    torch.manual_seed(len(name))
    model = (VQModel if name.startswith("vq") else AutoencoderKL)(**CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if name.startswith("vq"):
            model.quantize.embedding.weight.normal_()
    return model.eval()


def in_compvis(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a diffusers model as CompVis' code names and shapes it."""
    levels = len(model.config.block_out_channels)
    state = {}
    for name, tensor in model.state_dict().items():
        if "attentions" in name:
            for theirs, compvis in ATTENTION.items():
                name = name.replace(f".{theirs}.", f".{compvis}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        state[name] = tensor
    return state


@pytest.fixture(scope="session")
def model():
    """Diffusers' models by name of their config, made once."""
    return functools.cache(draw_model)


@pytest.fixture(scope="session")
def compvis_state():
    return in_compvis


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    """Folders that diffusers saved, by name of their config; not to be changed."""

    @functools.cache
    def save(name: str):
        path = tmp_path_factory.mktemp("diffusers") / name
        model(name).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def loaded_from(folder):
    """What we load from the folders, by name of their config; not to be changed."""
    return functools.cache(lambda name: autoencoders.load(folder(name)))
