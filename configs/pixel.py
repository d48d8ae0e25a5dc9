r"""Diffusion in the space of pixels, without a first stage: what latent diffusion is compared with.

  python -m latent_diffusion_jax.train --config=configs/pixel.py --workdir=runs/digit_pixels

Variants, as in --config=configs/pixel.py:VARIANT
  digits     (default) handwritten digits, 32x32, by class, in miniature
  smoke      the same in seconds, to see that everything runs; draws nothing that can be read
  ddpm       32x32, unconditional: DDPM for CIFAR-10 (Ho et al. 2020, appendix B; 35.7 million
             parameters); for your own images on accelerators: add --config.data.name=FOLDER
  celebahq   256x256, unconditional: LDM-1 of the paper (table 14; 270 million parameters)
  imagenet   256x256, by class: LDM-1 of the paper (table 13; 396 million parameters)
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("digits", "smoke", "ddpm", "celebahq", "imagenet")


def get_config(variant: str = "digits") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config()
    config.stages = ("diffusion",)
    config.data.image_channels = 3
    base.second_stage(config, "none" if variant in ("ddpm", "celebahq") else "class")
    config.sample.clip = 1.0
    unet = config.unet
    if variant in ("digits", "smoke"):
        base.digits(config)
        unet.channel_multipliers = (1, 2, 2, 2)  # down to 4x4
        unet.attention_levels = (2, 3)
        if variant == "smoke":
            base.smoke_first_stage(config)
            base.smoke_second_stage(config)
            unet.channel_multipliers, unet.attention_levels = (1, 2), (1,)
        return config
    base.own_images(config)
    config.optimizer.warmup_steps = 0
    if variant == "ddpm":
        config.data.image_size = 32
        unet.channels = 128
        unet.channel_multipliers = (1, 2, 2, 2)
        unet.attention_levels = (1,)
        unet.num_heads = 1
        unet.dropout = 0.1
        unet.as_in_ddpm = True
        config.schedule.name = "linear"
        config.schedule.beta_start, config.schedule.beta_end = 0.0001, 0.02
        config.optimizer.learning_rate = 2e-4
        config.optimizer.warmup_steps = 5_000
        config.optimizer.weight_decay = 0.0
        config.optimizer.clip_norm = 1.0
        config.batch_size, config.num_steps = 128, 800_000
        config.sample.sampler = "ddpm"
        config.sample.steps = 1_000
        config.sample.variance = "beta"
        return config
    config.schedule.beta_start, config.schedule.beta_end = 0.0015, 0.0195
    unet.channels = 192
    unet.channel_multipliers = (1, 1, 2, 2, 4, 4)
    unet.attention_levels = (3, 4, 5)
    if variant == "celebahq":
        unet.num_heads, unet.head_dim = 0, 32
        config.optimizer.learning_rate = 9e-5
        config.batch_size, config.num_steps = 9, 500_000
    else:
        unet.num_heads = 1
        config.optimizer.learning_rate = 4.9e-5
        config.batch_size, config.num_steps = 7, 2_000_000
        config.sample.guidance_scale = 1.5
    return config
