"""Small Stable Diffusion pipelines of diffusers with random weights."""

import pathlib

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.clip_files import make_tokenizer_folder

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make_pipeline(
    path: pathlib.Path,
    *,
    in_channels: int = 4,
    prediction_type: str = "epsilon",
    version: int = 1,
    groups: int = 4,
    width: int = 32,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Writes a pipeline's folder and returns the pipeline.

    Posteriors of the first stage have hardly any variance, so that what is sampled of them does not
    matter to a comparison.

    Args:
      path: the folder, which is made.
      in_channels: of the UNet; 9 for a model that sees a mask.
      prediction_type: in the words of diffusers.
      version: of Stable Diffusion, 1 or 2.
      groups: of normalisation; 32 for what CompVis' code can be.
      width: of the text encoder, 1024 for what its code takes for version 2.
      seed: of the weights.
    """
    torch.manual_seed(seed)
    second = version == 2
    make_tokenizer_folder(path / "words", pad="!" if second else "<|endoftext|>")
    tokenizer = CLIPTokenizer.from_pretrained(path / "words")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=max(width // 64, 1),
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(4 * groups, 8 * groups),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=[2, 4] if second else 2,
        use_linear_projection=second,
        norm_num_groups=groups,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(2 * groups, 4 * groups, 4 * groups),
        layers_per_block=1,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    with torch.no_grad():
        for network in (unet, vae, text_encoder):
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-30.0)
    scheduler = diffusers.PNDMScheduler(
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        **BETAS,
    )
    if second:
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    kind = StableDiffusionPipeline
    if in_channels == 9:
        kind = diffusers.StableDiffusionInpaintPipeline
    pipeline = kind(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return pipeline
