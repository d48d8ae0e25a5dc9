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
    config = paper()
    if variant in ("digits", "smoke"):
        config = digits(config)
    if variant == "smoke":
        config = smoke(config)
    return config


def paper() -> ConfigDict:
    config = base.get_config()

    # First stage.
    first = config.first_stage = base.first_stage("kl")
    first.autoencoder.z_channels = 4
    first.autoencoder.embed_dim = 4
    first.autoencoder.channel_multipliers = (1, 2, 4, 4)  # f = 8

    # Second stage.
    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 30_522
    config.tokenizer.max_length = 77  # tokens
    config.tokenizer.num_examples = 1_000_000  # whose captions it is trained on
    config.text_encoder = ConfigDict()
    config.text_encoder.width = 1_280
    config.text_encoder.depth = 32
    config.text_encoder.num_heads = 8
    config.text_encoder.head_dim = 64
    config.text_encoder.dtype = "bfloat16"
    config.unet = ConfigDict()
    config.unet.channels = 320
    config.unet.channel_multipliers = (1, 2, 4, 4)
    config.unet.num_res_blocks = 2
    config.unet.attention_levels = (0, 1, 2)  # 0 is the highest resolution
    config.unet.num_heads = 8  # of an attention; one of it and head_dim is 0
    config.unet.head_dim = 0  # channels of a head
    config.unet.transformer_depth = 1
    config.unet.scale_shift_norm = False  # timesteps scale and shift normalised features
    config.unet.resblock_updown = False  # residual blocks change the resolution, not convolutions
    config.unet.conv_resample = True  # or averages and repeated pixels do
    config.unet.dropout = 0.0  # share of a residual block's features
    config.unet.num_groups = 32
    config.unet.remat = False  # compute blocks anew in the backward pass, to save memory
    config.unet.dtype = "bfloat16"
    config.schedule = ConfigDict()
    config.schedule.name = "scaled_linear"
    config.schedule.num_timesteps = 1_000
    config.schedule.beta_start = 0.00085
    config.schedule.beta_end = 0.012
    config.schedule.zero_terminal_snr = False  # end in pure noise; for prediction_type "v"
    config.objective = ConfigDict()
    config.objective.prediction_type = "epsilon"  # or "v", "z_0"
    config.objective.loss = "l2"  # or "l1", "huber"
    config.objective.huber_delta = 0.1
    config.objective.weighting = "none"  # of timesteps; or "min_snr", "p2"
    config.objective.min_snr_gamma = 5.0
    config.objective.p2_gamma = 1.0
    config.objective.p2_k = 1.0
    config.objective.offset_noise = 0.0  # standard deviation; 0.1 for very dark and bright images
    config.objective.learned_variance = False
    config.objective.vlb_weight = 0.001  # of the bound that learned variances are trained with
    config.optimizer = base.optimizer(learning_rate=1e-4)
    config.optimizer.warmup_steps = 10_000
    config.caption_dropout = 0.1  # share of captions replaced by the empty one, for guidance
    config.ema_decay = 0.9999
    config.batch_size = 256
    config.num_steps = 390_000

    # Samples: what the commands and previews use where nothing else is said.
    config.sample = ConfigDict()
    config.sample.sampler = "ddim"
    config.sample.steps = 50
    config.sample.guidance_scale = 5.0
    config.sample.guidance_rescale = 0.0  # 0.7 with zero_terminal_snr
    config.sample.guidance_interval = (0.0, 1.0)  # of the timesteps; no guidance outside
    config.sample.eta = 0.0  # noise of ddim
    config.sample.variance = "posterior"  # of ddpm; or "beta", "learned"
    config.sample.spacing = "trailing"  # of timesteps; or "leading", "linspace"
    config.sample.sigmas = "schedule"  # or "karras"
    config.sample.batch_size = 16  # images drawn at once
    config.sample.prompts = ("a photograph of a mountain lake", "a painting of a city at night")
    return config


def digits(config: ConfigDict) -> ConfigDict:
    config.data.image_size = 32
    config.log_every = 20
    config.eval_every = 200
    config.eval_examples = 297
    config.checkpoint_every = 200

    first = config.first_stage
    first.autoencoder.z_channels = 3
    first.autoencoder.embed_dim = 3
    first.autoencoder.channels = 16
    first.autoencoder.channel_multipliers = (1, 2, 2)  # f = 4
    first.autoencoder.num_res_blocks = 1
    first.autoencoder.num_groups = 8
    first.discriminator.channels = 32
    first.discriminator.num_layers = 2
    first.loss.disc_start = 280
    first.loss.update_order = "together"
    first.optimizer.learning_rate = 2e-3
    first.optimizer.warmup_steps = 50
    first.optimizer.final_fraction = 0.05
    first.discriminator_optimizer.learning_rate = 5e-4
    first.batch_size = 32
    first.num_steps = 400

    config.tokenizer.vocab_size = 512
    config.tokenizer.max_length = 16
    config.text_encoder.width = 64
    config.text_encoder.depth = 2
    config.text_encoder.num_heads = 2
    config.text_encoder.head_dim = 32
    config.text_encoder.dtype = "float32"
    config.unet.channels = 32
    config.unet.channel_multipliers = (1, 2)
    config.unet.attention_levels = (0, 1)
    config.unet.num_heads = 0
    config.unet.head_dim = 32
    config.unet.num_groups = 8
    config.unet.dtype = "float32"
    config.schedule.beta_start = 0.0015
    config.schedule.beta_end = 0.0195
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.05
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.995
    config.batch_size = 64
    config.num_steps = 1_000

    config.sample.guidance_scale = 2.0
    config.sample.batch_size = 50
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    config.sample.prompts = tuple(f"a handwritten {word}" for word in words)
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    base.smoke_first_stage(config)
    config.text_encoder.width = 16
    config.text_encoder.depth = 1
    config.text_encoder.head_dim = 8
    config.unet.channels = 8
    config.unet.num_res_blocks = 1
    config.unet.attention_levels = (1,)
    config.unet.head_dim = 8
    config.unet.num_groups = 4
    config.optimizer.warmup_steps = 1
    config.batch_size = 8
    config.num_steps = 4
    config.sample.steps = 4
    config.sample.batch_size = 8
    return config
