"""Small pipelines of diffusers as CompVis' and Google's first checkpoints have them.

The layouts are those of CompVis/ldm-text2im-large-256, CompVis/ldm-celebahq-256 and
google/ddpm-cifar10-32, the networks small and their weights random.
"""

import json
import pathlib
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from safetensors.torch import load_file
from transformers import BertTokenizer

from tests.clip_files import make_bert_tokenizer_folder

TEXT_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FACES_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
# What a config of diffusers 0.0.4 to 0.2 says, by class; all else came later.
PUBLISHED_KEYS: dict[str, tuple[str, ...]] = {
    "AutoencoderKL": (
        "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
        "layers_per_block", "out_channels", "sample_size", "up_block_types",
    ),
    "VQModel": (
        "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
        "layers_per_block", "num_vq_embeddings", "out_channels", "sample_size", "up_block_types",
    ),
    "UNet2DConditionModel": (
        "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample",
        "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos",
        "freq_shift", "in_channels", "layers_per_block", "mid_block_scale_factor", "norm_eps",
        "norm_num_groups", "out_channels", "sample_size", "up_block_types",
    ),
    "UNet2DModel": (
        "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample",
        "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels",
        "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups",
        "out_channels", "sample_size", "time_embedding_type", "up_block_types",
    ),
    "DDIMScheduler": ("beta_end", "beta_schedule", "beta_start", "clip_sample", "trained_betas"),
    "DDPMScheduler": (
        "beta_end", "beta_schedule", "beta_start", "clip_sample", "num_train_timesteps",
        "trained_betas", "variance_type",
    ),
}  # fmt: skip
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def make_text_to_image(
    path: pathlib.Path,
) -> diffusers.LDMTextToImagePipeline:
    """Writes the folder of LDM's text-to-image model and returns the pipeline."""
    torch.manual_seed(0)
    make_bert_tokenizer_folder(path / "words")
    tokenizer = BertTokenizer.from_pretrained(path / "words")
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            d_model=24,
            encoder_layers=2,
            encoder_ffn_dim=96,
            encoder_attention_heads=2,
            head_dim=8,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    vqvae = AutoencoderKL(  # its factor is 8, as the pipeline takes for granted
        block_out_channels=(32,) * 4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=32,
    )
    _spread(unet, vqvae, bert)
    scheduler = diffusers.DDIMScheduler(**TEXT_BETAS, clip_sample=False)
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=vqvae.eval(), bert=bert.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler,
    )  # fmt: skip
    return _saved(pipeline, path)


def make_unconditional(path: pathlib.Path, scaling_factor: float = 1.0) -> diffusers.LDMPipeline:
    """Writes the folder of an unconditional model with a VQ first stage; returns the pipeline."""
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = VQModel(
        block_out_channels=(32, 32, 32),
        latent_channels=3,
        num_vq_embeddings=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=scaling_factor,
        sample_size=32,
    )
    _spread(unet, vqvae)
    with torch.no_grad():
        vqvae.quantize.embedding.weight.normal_()
    scheduler = diffusers.DDIMScheduler(**FACES_BETAS, clip_sample=False)
    pipeline = diffusers.LDMPipeline(vqvae=vqvae.eval(), unet=unet.eval(), scheduler=scheduler)
    return _saved(pipeline, path)


def make_pixels(
    path: pathlib.Path, kind: str, scheduler: Any, **changes: Any
) -> diffusers.DiffusionPipeline:
    """Writes the folder of a pipeline in the space of pixels and returns the pipeline.

    Args:
      path: the folder, which is made.
      kind: of the pipeline, `DDPMPipeline` or `DDIMPipeline`.
      scheduler: of diffusers.
      changes: in the UNet's config.
    """
    torch.manual_seed(2)
    fields: dict[str, Any] = dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=None,
        norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = UNet2DModel(**(fields | changes))
    _spread(unet)
    return _saved(getattr(diffusers, kind)(unet=unet.eval(), scheduler=scheduler), path)


def as_published(path: pathlib.Path) -> None:
    """Makes a pipeline's folder one of 2022: pickled weights, old names, configs that say less."""
    index = json.loads((path / "model_index.json").read_text())
    index["_diffusers_version"] = "0.0.4"
    (path / "model_index.json").write_text(json.dumps(index))
    for part, (library, _) in ((k, x) for k, x in index.items() if not k.startswith("_")):
        if library != "diffusers":
            continue
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = json.loads((path / part / name).read_text())
        kept = {k: x for k, x in config.items() if k in PUBLISHED_KEYS[config["_class_name"]]}
        if config["_class_name"] == "DDIMScheduler":
            kept |= {"timesteps": 1000, "timestep_values": None}
        kept |= {"_class_name": config["_class_name"], "_diffusers_version": "0.0.4"}
        (path / part / name).write_text(json.dumps(kept))
        file = path / part / "diffusion_pytorch_model.safetensors"
        if file.exists():
            old = index["_class_name"] != "LDMTextToImagePipeline" or part != "unet"
            tensors = {_old(k) if old else k: x for k, x in load_file(file).items()}
            torch.save(tensors, file.with_suffix(".bin"))
            file.unlink()
    if "bert" in index:
        file = path / "bert" / "model.safetensors"
        torch.save(load_file(file), path / "bert" / "pytorch_model.bin")
        file.unlink()


def _old(name: str) -> str:
    for current, before in OLD_ATTENTION.items():
        name = name.replace(f".{current}.", f".{before}.")
    return name


def _spread(*networks: torch.nn.Module) -> None:
    """Larger weights than initial ones, so that the pictures show something."""
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))


def _saved(pipeline: Any, path: pathlib.Path) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return pipeline
