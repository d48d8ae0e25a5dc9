r"""Text to image: a KL autoencoder, then a UNet with a text transformer, both trained here.

  python -m latent_diffusion_jax.train --config=configs/txt2img.py --workdir=runs/digits

Variants, as in --config=configs/txt2img.py:VARIANT
  digits  (default) handwritten digits, 32x32, the model in miniature. Ten minutes on 2 CPU cores;
          PSNR 30 dB or more, 95 % or more of the samples read as the digit in the prompt.
  smoke   the same in seconds, to see that everything runs; draws nothing that can be read.
  paper   256x256, the text-to-image model of the paper (LDM-KL-8, 1.5 billion parameters; tables
          15 and 17), for your own images on accelerators: add --config.data.name=FOLDER.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("digits", "smoke", "paper")


def get_config(variant: str = "digits") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if variant in ("digits", "smoke"):
        return base.miniature("text", smoke=variant == "smoke")
    config = base.get_config()
    first = config.first_stage = base.first_stage("kl")
    first.autoencoder.z_channels = 4
    first.autoencoder.embed_dim = 4
    first.autoencoder.channel_multipliers = (1, 2, 4, 4)  # f = 8
    base.second_stage(config, "text")
    config.mesh.data, config.mesh.fsdp = 1, -1  # the state of 1.5 billion parameters, split
    return config
