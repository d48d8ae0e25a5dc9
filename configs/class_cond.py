r"""Images of classes: a VQ or KL autoencoder, then a UNet with an embedding of the labels.

  python -m latent_diffusion_jax.train --config=configs/class_cond.py --workdir=runs/digit_classes
  python -m latent_diffusion_jax.sample --workdir=runs/digit_classes --label=3,7 --num_images=8

Labels are a TFDS dataset's ClassLabel, or the subfolders of a folder.

Variants, as in --config=configs/class_cond.py:VARIANT
  digits        (default) handwritten digits, 32x32, in miniature; ten minutes on 2 CPU cores
  smoke         the same in seconds, to see that everything runs; draws nothing that can be read
  imagenet      256x256, LDM-4 of the paper (tables 13 and 15, 401 million parameters), with
                guidance: add --config.data.name=FOLDER --config.first_stage.init_from=PATH
  imagenet_f8   LDM-8 (395 million parameters)
"""

from ml_collections import ConfigDict

from configs import autoencoder_vq, base

VARIANTS = ("digits", "smoke", "imagenet", "imagenet_f8")


def get_config(variant: str = "digits") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if variant in ("digits", "smoke"):
        return base.miniature("class", smoke=variant == "smoke")
    config = base.get_config()
    config.first_stage = autoencoder_vq.get_config(
        "f4" if variant == "imagenet" else "f8"
    ).first_stage
    base.second_stage(config, "class")
    base.own_images(config)
    config.schedule.beta_start = 0.0015
    config.schedule.beta_end = 0.0195
    config.optimizer.warmup_steps = 0
    unet = config.unet
    unet.num_heads = 1
    if variant == "imagenet":
        unet.channels = 192
        unet.channel_multipliers = (1, 2, 3, 5)
        unet.attention_levels = (1, 2, 3)
        config.batch_size, config.num_steps = 1_200, 178_000
        config.sample.steps = 250
        config.sample.guidance_scale = 1.5
    else:
        unet.channels = 256
        unet.channel_multipliers = (1, 2, 4)
        unet.attention_levels = (0, 1, 2)
        config.batch_size, config.num_steps = 64, 4_800_000
        config.optimizer.learning_rate = 6.4e-5
        config.condition_dropout = 0.0
        config.sample.steps = 200
        config.sample.eta = 1.0
        config.sample.guidance_scale = 1.0
    return config
