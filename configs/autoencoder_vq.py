r"""VQ autoencoders: every one of CompVis' code, and newer codebooks.

  python -m latent_diffusion_jax.train --config=configs/autoencoder_vq.py:f4 --workdir=runs/vq_f4 \
      --config.data.name=FOLDER --config.first_stage.loss.lpips_weights=FILE

Variants, as in --config=configs/autoencoder_vq.py:VARIANT
  f4          64x64x3 latents of 256x256 images, 8,192 codes, 55 million parameters
  f4_noattn   the same without attention
  f8          32x32x4, 16,384 codes
  f8_n256     32x32x4, 256 codes
  f16         16x16x8, 16,384 codes
  f4_ema      f4 with a codebook of moving averages, in which dead codes are revived
  f4_fsq      f4 with finite scalar quantisation, 15,360 codes
  photos      (default) f4 in miniature on 64x64 crops of the photographs that come with
              scikit-learn and scikit-image; ten minutes on 2 CPU cores
  smoke       the same in seconds, to see that everything runs
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = (
    *("photos", "f4", "f4_noattn", "f8", "f8_n256", "f16", "f4_ema", "f4_fsq"),
    "smoke",
)


def get_config(variant: str = "photos") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config()
    config.stages = ("first_stage",)
    first = config.first_stage = base.first_stage("vq")
    network, loss = first.autoencoder, first.loss
    if variant in ("photos", "smoke"):
        base.photos(config)
        network.codebook_size = 1_024
        first.codebook.decay = 0.99
        first.codebook.revive_below = 0.1
        if variant == "smoke":
            base.smoke_first_stage(config)
            config.data.image_size, config.data.resize = 32, 64
            network.codebook_size = 64
        return config
    base.open_images(config)
    loss.disc_weight = 0.75
    loss.disc_start = 0
    if variant == "f4_noattn":
        network.mid_attention = False
        loss.disc_start = 11
    elif variant in ("f8", "f8_n256"):
        network.z_channels = network.embed_dim = 4
        network.channel_multipliers = (1, 2, 2, 4)
        network.attention_levels = (3,)  # 32x32 of 256x256
        network.codebook_size = 16_384
        loss.disc_start, loss.disc_weight = 1, 0.6
        first.discriminator.num_layers = 2
        if variant == "f8_n256":
            network.codebook_size = 256
            loss.disc_start, loss.disc_weight = 250_001, 0.75
            first.discriminator.num_layers = 3
            first.num_steps = 1_600_000
    elif variant == "f16":
        network.z_channels = network.embed_dim = 8
        network.channel_multipliers = (1, 1, 2, 2, 4)
        network.attention_levels = (4,)  # 16x16
        network.codebook_size = 16_384
        loss.disc_start = 250_001
        first.discriminator.num_layers = 2
        first.num_steps = 1_100_000
    elif variant == "f4_ema":
        first.codebook.decay = 0.99
        first.codebook.revive_below = 0.03
        loss.beta_on_codebook = False
    elif variant == "f4_fsq":
        network.z_channels = network.embed_dim = 5
        network.levels = (8, 8, 8, 6, 5)
    return config
