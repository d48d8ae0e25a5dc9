r"""Images without a condition: a VQ or KL autoencoder, then a UNet, both trained here.

  python -m latent_diffusion_jax.train --config=configs/unconditional.py --workdir=runs/digits_free

Variants, as in --config=configs/unconditional.py:VARIANT
  digits          (default) handwritten digits, 32x32, in miniature; ten minutes on 2 CPU cores
  smoke           the same in seconds, to see that everything runs; draws nothing that can be read
  celebahq        256x256, the models of the paper (table 12; 274 million parameters, churches
  ffhq            295) for your own images on accelerators: add --config.data.name=FOLDER, and
  lsun_bedrooms   --config.first_stage.init_from=PATH --config.stages="('diffusion',)" where the
  lsun_churches   first stage is there already
"""

from ml_collections import ConfigDict

from configs import autoencoder_kl, autoencoder_vq, base

# Batch size, steps and learning rate of each (table 12).
TRAINING = {
    "celebahq": (48, 410_000, 9.6e-5),
    "ffhq": (42, 635_000, 8.4e-5),
    "lsun_bedrooms": (48, 1_900_000, 9.6e-5),
    "lsun_churches": (96, 500_000, 5e-5),
}
VARIANTS = ("digits", "smoke", *TRAINING)


def get_config(variant: str = "digits") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if variant in ("digits", "smoke"):
        return base.miniature("none", smoke=variant == "smoke")
    config = base.get_config()
    churches = variant == "lsun_churches"
    source = autoencoder_kl.get_config("f8") if churches else autoencoder_vq.get_config("f4")
    config.first_stage = source.first_stage
    base.second_stage(config, "none")
    base.own_images(config)
    config.schedule.beta_start = 0.0015
    config.schedule.beta_end = 0.0155 if churches else 0.0195
    config.batch_size, config.num_steps, config.optimizer.learning_rate = TRAINING[variant]
    config.optimizer.warmup_steps = 10_000 if churches else 0
    unet = config.unet
    if churches:
        unet.channels = 192
        unet.channel_multipliers = (1, 2, 2, 4, 4)
        unet.attention_levels = (0, 1, 2, 3)
        unet.num_heads = 8
        unet.scale_shift_norm = True
        unet.resblock_updown = True
        config.objective.loss = "l1"
    else:
        unet.channels = 224
        unet.channel_multipliers = (1, 2, 3, 4)
        unet.attention_levels = (1, 2, 3)
        unet.num_heads, unet.head_dim = 0, 32
    config.sample.steps = 200
    return config
