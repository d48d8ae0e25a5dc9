r"""Finetunes the decoder of an autoencoder alone: its latents, and what was trained on them, stay.

As Stable Diffusion's two improved decoders were made (sd-vae-ft-ema and sd-vae-ft-mse):

  python -m latent_diffusion_jax.train --config=configs/decoder_finetune.py:ft_ema \
      --workdir=runs/ft_ema --config.first_stage.init_from=path/to/vae --config.data.name=FOLDER \
      --config.first_stage.loss.lpips_weights=FILE

`init_from` is a diffusers folder, a CompVis file or a workdir. Variants:
  ft_ema   (default) L1 + LPIPS + adversarial, as the autoencoder was trained
  ft_mse   from there on: squared error + 0.1 LPIPS, for smoother images
  photos   the decoder of runs/kl_f4 (configs/autoencoder_kl.py:photos), some more minutes
  smoke    the same in seconds, to see that everything runs
"""

from ml_collections import ConfigDict

from configs import autoencoder_kl

VARIANTS = ("ft_ema", "ft_mse", "photos", "smoke")


def get_config(variant: str = "ft_ema") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if variant in ("photos", "smoke"):
        config = autoencoder_kl.get_config(variant)
        first = config.first_stage
        first.init_from = "runs/kl_f4"
        first.loss.disc_start //= 2
        first.ema_decay = 0.99
    else:
        config = autoencoder_kl.get_config("f8")
        first = config.first_stage
        first.init_from = "stable-diffusion-vae"  # a folder or file; give yours
        first.batch_size = 192
        first.optimizer.learning_rate = 4.5e-6 * 192
        first.discriminator_optimizer.learning_rate = 4.5e-6 * 192
        first.ema_decay = 0.9999
        first.num_steps = 313_198
        if variant == "ft_mse":
            first.num_steps = 280_000
            first.loss.pixel_loss = "l2"
            first.loss.perceptual_weight = 0.1
            first.loss.disc_weight = 0.0
    first.trained = "decoder"
    return config
