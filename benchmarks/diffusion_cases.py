"""What is measured of the second stage: networks, sizes, and what both sides share.

Imports nothing that takes long, or memory: peak memory is measured by process.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cases import VARIANTS

INPUTS = "inputs.npz"  # arrays by name, NHWC
NOISE = "noise.npz"  # all that is random in the train steps that are compared

FIGURES = ("loss", "grad_norm")  # of a train step, compared
COMPARED_STEPS = 3
TIMESTEPS = 1000
PROMPT, GUIDANCE_SCALE = "a red circle above the blue square", 7.5
# Those of configs/txt2img.py:digits, with a constant learning rate.
OPTIMIZER = dict(
    learning_rate=2e-3,
    warmup_steps=0,
    final_fraction=1.0,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    clip_norm=1.0,
)
EMA_DECAY, CAPTION_DROPOUT, SCALE_FACTOR = 0.995, 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class Model:
    """Networks, as arguments of the configs of diffusers and transformers.

    Attributes:
      unet: of `UNet2DConditionModel`.
      context_length: tokens that it attends to.
      schedule: of `DDIMScheduler`.
      text: of `CLIPTextConfig`, its vocabulary left to the tokenizer, or of `LDMBertConfig`.
      autoencoder: of `AutoencoderKL`; None where none is needed.
      config: variant of configs/txt2img.py with the same networks; "" without one.
    """

    unet: Mapping[str, Any]
    context_length: int
    schedule: Mapping[str, Any]
    text: Mapping[str, Any]
    autoencoder: Mapping[str, Any] | None = None
    config: str = ""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet["sample_size"]
        return side, side, self.unet["in_channels"]

    @property
    def image_size(self) -> int:
        assert self.autoencoder is not None
        return self.unet["sample_size"] * 2 ** (len(self.autoencoder["block_out_channels"]) - 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      task: `forward` of the UNet; `txt2img`, from tokens to pixels; `train`, a step of it; `ddim`,
        a loop over the UNet without guidance.
      model: the networks.
      batch_size: latents, or images.
      dtype: of parameters and computation.
      steps: of sampling.
      repeats: runs of one turn.
      tolerance: of the comparison, relative to the largest value.
      variants: of PyTorch that it is measured against.
    """

    task: str
    model: Model
    batch_size: int
    dtype: str = "float32"
    steps: int = 0
    repeats: int = 1
    tolerance: float = 1e-3
    variants: Sequence[str] = VARIANTS


def levels(*attends: bool) -> dict[str, Any]:
    """Types of a UNet's blocks, the highest resolution first."""
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    }


SD_SCHEDULE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
SD15 = Model(
    unet=dict(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        **levels(True, True, True, False),
    ),
    context_length=77,
    schedule=SD_SCHEDULE,
    text=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    autoencoder=dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        latent_channels=4,
    ),
)
TINY_SD = Model(
    unet=dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        **levels(True, False),
    ),
    context_length=77,
    schedule=SD_SCHEDULE,
    text=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
    autoencoder=dict(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
    ),
)
DIGITS_SCHEDULE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.0015,
    beta_end=0.0195,
    clip_sample=False,
    timestep_spacing="trailing",
)
DIGITS = Model(
    unet=dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=2,
        attention_head_dim=(1, 2),  # diffusers' name for the number of heads
        cross_attention_dim=64,
        norm_num_groups=8,
        **levels(True, True),
    ),
    context_length=16,
    schedule=DIGITS_SCHEDULE,
    text=dict(
        vocab_size=512,
        max_position_embeddings=16,
        d_model=64,
        encoder_layers=2,
        encoder_ffn_dim=256,
        encoder_attention_heads=2,
        head_dim=32,
        dropout=0.0,
    ),
    config="digits",
)
SMOKE = Model(
    unet=dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
        **levels(False, True),
    ),
    context_length=16,
    schedule=DIGITS_SCHEDULE,
    text=dict(
        vocab_size=512,
        max_position_embeddings=16,
        d_model=16,
        encoder_layers=1,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=8,
        dropout=0.0,
    ),
    config="smoke",
)

TWO = ("eager", "compile")
BFLOAT16 = dict(dtype="bfloat16", tolerance=5e-2)
CASES = {
    "sd15_unet_f32": Case("forward", SD15, 2),
    "sd15_unet_bf16": Case("forward", SD15, 2, **BFLOAT16),
    "sd15_txt2img": Case("txt2img", SD15, 1, steps=4, variants=("eager",)),
    "digits_unet": Case("forward", DIGITS, 64, repeats=8, variants=TWO),
    "digits_train": Case("train", DIGITS, 64, repeats=4, variants=TWO),
    "digits_ddim50_b64": Case("ddim", DIGITS, 64, steps=50, variants=TWO),
    "digits_ddim50_b1": Case("ddim", DIGITS, 1, steps=50, variants=TWO),
    "tiny_unet": Case("forward", TINY_SD, 2),
    "tiny_unet_bf16": Case("forward", TINY_SD, 2, **BFLOAT16),
    "tiny_txt2img": Case("txt2img", TINY_SD, 2, steps=4, variants=("eager",)),
    "tiny_train": Case("train", SMOKE, 4, repeats=2, variants=TWO),
    "tiny_ddim": Case("ddim", SMOKE, 2, steps=5, variants=TWO),
}
DEFAULT_CASES = tuple(name for name in CASES if not name.startswith("tiny"))
