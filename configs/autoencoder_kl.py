r"""KL autoencoders: every one of the paper and of CompVis' code, and Stable Diffusion's.

  python -m latent_diffusion_jax.train --config=configs/autoencoder_kl.py:f8 --workdir=runs/kl_f8 \
      --config.data.name=FOLDER --config.first_stage.loss.lpips_weights=FILE

Variants, as in --config=configs/autoencoder_kl.py:VARIANT
  f4       64x64x3 latents of 256x256 images, 55 million parameters
  f8       32x32x4, 84 million; the network of Stable Diffusion 1 and 2
  f16      16x16x16, 70 million
  f32      8x8x64, 104 million
  photos   (default) f4 in miniature on 64x64 crops of the photographs that come with scikit-learn
           and scikit-image; ten minutes on 2 CPU cores
  smoke    the same in seconds, to see that everything runs
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("photos", "f4", "f8", "f16", "f32", "smoke")


def get_config(variant: str = "photos") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config()
    config.stages = ("first_stage",)
    first = config.first_stage = base.first_stage("kl")
    if variant in ("photos", "smoke"):
        base.photos(config)
        if variant == "smoke":
            base.smoke_first_stage(config)
            config.data.image_size, config.data.resize = 32, 64
        return config
    base.open_images(config)
    network = first.autoencoder
    if variant == "f8":
        network.z_channels = network.embed_dim = 4
        network.channel_multipliers = (1, 2, 4, 4)
    elif variant == "f16":
        network.z_channels = network.embed_dim = 16
        network.channel_multipliers = (1, 1, 2, 2, 4)
        network.attention_levels = (4,)  # 16x16 of 256x256
    elif variant == "f32":
        network.z_channels = network.embed_dim = 64
        network.channel_multipliers = (1, 1, 2, 2, 4, 4)
        network.attention_levels = (4, 5)  # 16x16 and 8x8
    return config
