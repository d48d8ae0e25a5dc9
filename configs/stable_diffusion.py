r"""Stable Diffusion 1.x and 2.x: a UNet on the latents and the frozen text encoder of a checkpoint.

  python -m latent_diffusion_jax.train --config=configs/stable_diffusion.py:v1 --workdir=runs/sd \
      --config.data.name=FOLDER --config.init_from=CHECKPOINT \
      --config.first_stage.init_from=CHECKPOINT --config.clip.path=CHECKPOINT

CHECKPOINT is a folder of diffusers. With init_from the UNet starts from its weights (finetuning),
without from fresh ones; first stage and text encoder always come from it and stay as they are.
Parameters, their average and the optimizer's moments are split over all devices, as they do not fit
one of 16 GiB, and batches of 2,048 are worked on in 16 parts: 8 images a chip on v5e:4x4.
On 256 chips, --config.mesh.data=16 --config.mesh.fsdp=16 gathers over fewer, and
--config.accumulation=1 is 8 images a chip at once.

Variants, as in --config=configs/stable_diffusion.py:VARIANT
  v1        (default) 512x512, 860 million parameters in the UNet
  v2        768x768, 866 million, predicts v
  v2_base   512x512, 866 million, predicts epsilon
"""

from ml_collections import ConfigDict

from configs import autoencoder_kl, base

VARIANTS = ("v1", "v2", "v2_base")


def get_config(variant: str = "v1") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config()
    config.stages = ("diffusion",)
    config.first_stage = autoencoder_kl.get_config("f8").first_stage
    base.second_stage(config, "clip")
    base.own_images(config)
    config.data.caption_key = "captions"
    config.data.image_size = 768 if variant == "v2" else 512
    config.data.random_flip = False
    config.batch_size, config.accumulation, config.num_steps = 2_048, 16, 225_000
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.sample.guidance_scale = 7.5
    config.sample.batch_size = 4
    if variant != "v1":
        config.clip.model = "ViT-H/14"
        config.unet.num_heads, config.unet.head_dim = 0, 64
        config.objective.prediction_type = "v" if variant == "v2" else "epsilon"
    return config
