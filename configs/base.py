"""What every config starts from: data, devices, logging, checkpoints. Not a config by itself."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.version = 1  # of these keys, see latent_diffusion_jax/older_configs.py
    config.seed = 0  # of initial weights, noise, order of the data
    config.stages = ("first_stage", "diffusion")  # what to train, in this order

    config.data = ConfigDict()
    config.data.name = "handwritten_digits"  # a prepared TFDS dataset, or a folder with captions
    config.data.data_dir = ""  # where TFDS keeps its datasets; "" is its default
    config.data.train_split = "train"
    config.data.test_split = "test"  # held out: never trained on
    config.data.image_key = "image"  # TFDS features
    config.data.caption_key = "captions"  # text, texts, or a class label; "": there are none
    config.data.caption_template = "{}"  # what becomes of a caption: "a photo of a {}", say
    config.data.holdout_share = 0.05  # of a folder without a test subfolder
    config.data.image_size = 256  # pixels; the side of the square that images are cropped to
    config.data.resize = 0  # pixels; short side before the crop; 0: image_size, -1: as it is
    config.data.random_flip = False  # left to right, half of the time
    config.data.max_damaged_share = 0.01  # of the images may be skipped; more stops the run
    config.data.retry_seconds = 60.0  # for which data that cannot be read any more is waited for
    config.data.check_images = 10_000  # so many are decoded before the first step
    config.data.latents = ""  # folder that encode wrote, for stage 2; "": encode images each time
    config.data.num_threads = 8  # that read and decode, for each process

    config.mesh = ConfigDict()  # devices along each axis; one may be -1: what is left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.mesh.dcn_data = -1  # slices of TPUs along each axis; one may be -1
    config.mesh.dcn_fsdp = 1
    config.mesh.dcn_tensor = 1

    config.log_every = 50  # steps
    config.eval_every = 1_000  # steps between figures and pictures of the held-out split
    config.eval_examples = 1_000
    config.checkpoint_every = 1_000  # steps; before figures of held-out data there is one, too
    config.keep_checkpoints = (
        2  # of each stage, the last ones of checkpoint_every, and the very last
    )
    config.keep_every = 0  # steps; the checkpoints of its multiples stay as well; 0: none
    config.grace_seconds = 0.0  # for saving, after SIGTERM or Ctrl-C; 0: as long as it takes
    config.max_skipped_steps = 10  # in a row, as they were not finite; more end the run
    config.profile = ConfigDict()  # a trace for XProf, in the workdir's profile/
    config.profile.after = 10  # steps of this call
    config.profile.steps = 0  # that it holds; 0: none
    return config


def optimizer(learning_rate: float) -> ConfigDict:
    """AdamW as in LDM: constant learning rate, no clipping."""
    section = ConfigDict()
    section.learning_rate = learning_rate
    section.warmup_steps = 0
    section.final_fraction = (
        1.0  # of the learning rate, reached by a cosine at the end; 1: constant
    )
    section.betas = (0.9, 0.999)
    section.eps = 1e-8
    section.weight_decay = 0.01
    section.clip_norm = 0.0  # of the gradients' global norm; 0: no clipping
    section.mu_dtype = "float32"  # that the first moment is stored in; or "bfloat16"
    section.nu_dtype = "float32"  # the second; in bfloat16 it needs a second beta below 0.995
    return section


def first_stage(kind: str) -> ConfigDict:
    """An autoencoder, `kl` or `vq`, and its training as CompVis' configs have them (f = 4)."""
    section = ConfigDict()
    section.kind = kind
    section.init_from = ""  # weights to start from: a workdir, a diffusers folder, a CompVis file
    section.trained = "all"  # "decoder": encoder and latents stay as they are
    section.autoencoder = ConfigDict()
    section.autoencoder.image_channels = 3
    section.autoencoder.z_channels = 3
    section.autoencoder.embed_dim = 3  # channels of a latent
    section.autoencoder.channels = 128
    section.autoencoder.channel_multipliers = (1, 2, 4)  # one level each; f = 2^(levels - 1)
    section.autoencoder.num_res_blocks = 2
    section.autoencoder.attention_levels = ()  # 0 is full resolution
    section.autoencoder.mid_attention = True
    section.autoencoder.num_groups = 32
    # Computed anew in the backward pass, to save memory: dots, blocks, full or offload.
    section.autoencoder.remat = "none"
    section.autoencoder.dtype = "float32"  # of the computation; or "bfloat16"
    if kind == "vq":
        section.autoencoder.codebook_size = 8_192
        section.autoencoder.levels = ()  # (8, 5, 5), say: finite scalar quantisation instead
        section.codebook = ConfigDict()
        section.codebook.decay = 0.0  # of moving averages that learn the codes; 0: gradients do
        section.codebook.revive_below = 0.0  # share of even use below which a code is moved
    section.discriminator = ConfigDict()
    section.discriminator.channels = 64
    section.discriminator.num_layers = 3
    section.discriminator.norm = "batch"  # or "activation"
    section.discriminator.dtype = "float32"

    loss = section.loss = ConfigDict()
    loss.pixel_loss = "l1"  # or "l2"
    loss.reduction = "sum" if kind == "kl" else "mean"  # over an image
    loss.kl_weight = 1e-6
    loss.codebook_weight = 1.0
    loss.beta = 0.25
    loss.beta_on_codebook = True  # as in every checkpoint of LDM; False: on the commitment term
    loss.perceptual_weight = 1.0
    loss.lpips_weights = ""  # a .safetensors file; "": train without the perceptual term
    loss.lpips_dtype = "float32"  # of its network
    loss.logvar = 0.0
    loss.learn_logvar = False
    loss.disc_start = 50_001  # step from which the adversarial term counts
    loss.disc_weight = 0.5  # 0: no discriminator
    loss.adaptive_weight = True  # balance the adversarial term at the decoder's last layer
    loss.generator_loss = "linear"  # or "non_saturating"
    loss.discriminator_loss = "hinge"  # or "vanilla"
    loss.r1_weight = 0.0
    loss.lecam_weight = 0.0
    loss.lecam_decay = 0.999
    loss.update_order = "generator_first"  # as in the references; "together" saves a forward pass

    section.batch_size = 32
    section.accumulation = 1  # micro-batches that a batch is worked on in
    section.precision = "high"  # of float32 products on TPUs; "default" (as in bfloat16), "highest"
    section.param_dtype = "float32"  # of the trained parameters; or "bfloat16"
    # Of the moving average; bfloat16 does not follow where ema_decay is near 1.
    section.ema_dtype = "float32"
    section.optimizer = optimizer(learning_rate=4.5e-6 * section.batch_size)
    section.optimizer.betas = (0.5, 0.9)
    section.optimizer.weight_decay = 0.0
    section.discriminator_optimizer = section.optimizer.copy_and_resolve_references()
    section.ema_decay = 0.0  # of a moving average of the weights; 0: none
    section.num_steps = 250_000
    section.keep_best = ""  # held-out figure whose best checkpoint stays: "l1", "-psnr" (highest)
    section.scale_examples = 1_024  # images that the latents' scale is measured on
    return section


def second_stage(config: ConfigDict, conditioning: str) -> None:
    """A UNet and its training, on `conditioning`: none, class, text or clip."""
    config.conditioning = conditioning
    config.init_from = ""  # a model to start from: a workdir, or a folder of diffusers
    if conditioning == "class":
        config.class_embedding = ConfigDict()
        config.class_embedding.width = 512  # of a token to attend to; 0: added to the timesteps'
    if conditioning == "clip":
        config.clip = ConfigDict()
        config.clip.path = ""  # folder of diffusers with text_encoder/ and tokenizer/
        config.clip.model = (
            "ViT-L/14"  # that is expected there; or "ViT-H/14", Stable Diffusion 2's
        )
        config.clip.dtype = "bfloat16"
    if conditioning == "text":
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
    # A transformer also attends to the condition; "self" does to pixels alone.
    config.unet.attention = "self" if conditioning == "none" else "transformer"
    config.unet.scale_shift_norm = False  # timesteps scale and shift normalised features
    config.unet.resblock_updown = False  # residual blocks change the resolution, not convolutions
    config.unet.conv_resample = True  # or averages and repeated pixels do
    config.unet.as_in_ddpm = False  # sinusoids and padding of DDPM's code, not of LDM's
    config.unet.dropout = 0.0  # share of a residual block's features
    config.unet.num_groups = 32
    # Computed anew in the backward pass, to save memory: dots, blocks, full or offload.
    config.unet.remat = "none"
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
    config.optimizer = optimizer(learning_rate=1e-4)
    config.optimizer.warmup_steps = 10_000
    config.condition_dropout = 0.1  # share of conditions replaced by none, for guidance
    config.ema_decay = 0.9999
    config.batch_size = 256
    config.accumulation = 1  # micro-batches that a batch is worked on in
    config.precision = "high"  # of float32 products on TPUs; "default" (as in bfloat16), "highest"
    config.param_dtype = "float32"  # of the trained parameters; or "bfloat16"
    # Of the moving average; bfloat16 does not follow where ema_decay is near 1.
    config.ema_dtype = "float32"
    config.num_steps = 390_000
    config.keep_best = ""  # held-out figure whose best checkpoint stays: "loss"

    # Samples: what the commands and previews use where nothing else is said.
    config.sample = ConfigDict()
    config.sample.sampler = "ddim"
    config.sample.steps = 50
    config.sample.guidance_scale = 1.0 if conditioning == "none" else 5.0
    config.sample.guidance_rescale = 0.0  # 0.7 with zero_terminal_snr
    config.sample.guidance_interval = (0.0, 1.0)  # of the timesteps; no guidance outside
    config.sample.eta = 0.0  # noise of ddim
    config.sample.variance = "posterior"  # of ddpm; or "beta", "learned"
    config.sample.spacing = "trailing"  # of timesteps; or "leading", "linspace"
    config.sample.sigmas = "schedule"  # or "karras"
    config.sample.clip = 0.0  # bound on the predicted image; 1 for models in the space of pixels
    config.sample.batch_size = 16  # images drawn at once by each device
    if conditioning in ("text", "clip"):
        config.sample.prompts = ("a photograph of a mountain lake", "a painting of a city at night")
    if conditioning == "class":
        config.sample.labels = (0, 1, 2, 3)  # that previews draw


def own_images(config: ConfigDict) -> None:
    """Data of the user's, in crops of 256 pixels, flipped half of the time, without captions."""
    config.data.name = ""  # a prepared TFDS dataset or a folder; give yours
    config.data.caption_key = ""  # none are needed
    config.data.random_flip = True


def open_images(config: ConfigDict) -> None:
    """Data as the references' autoencoders had it: OpenImages, short side 384, crops of 256."""
    own_images(config)
    config.data.resize = 384


def miniature(conditioning: str, *, smoke: bool = False) -> ConfigDict:
    """Both stages on handwritten digits; `smoke`: a few steps of networks that learn nothing."""
    config = get_config()
    config.first_stage = first_stage("kl")
    second_stage(config, conditioning)
    digits(config)
    if smoke:
        smoke_first_stage(config)
        smoke_second_stage(config)
    return config


def digits(config: ConfigDict) -> None:
    """The handwritten digits that come with scikit-learn, for ten minutes on 2 CPU cores."""
    config.data.image_size = 32
    config.log_every = 20
    config.eval_every = 200
    config.eval_examples = 297
    config.checkpoint_every = 200
    if "first_stage" in config:
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
    config.sample.batch_size = 50
    if config.conditioning != "none":
        config.sample.guidance_scale = 2.0
    if config.conditioning == "class":
        config.sample.labels = tuple(range(10))
        if config.class_embedding.width:
            config.class_embedding.width = 64
    if config.conditioning == "text":
        config.tokenizer.vocab_size = 512
        config.tokenizer.max_length = 16
        config.text_encoder.width = 64
        config.text_encoder.depth = 2
        config.text_encoder.num_heads = 2
        config.text_encoder.head_dim = 32
        config.text_encoder.dtype = "float32"
        words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        config.sample.prompts = tuple(f"a handwritten {word}" for word in words)


def photos(config: ConfigDict) -> None:
    """Small networks on 64x64 crops of a few photographs, for ten minutes on 2 CPU cores."""
    config.data.name = "bundled_photos"
    config.data.image_size = 64
    config.data.resize = 128
    config.data.random_flip = True
    config.log_every = 10
    config.eval_every = 200
    config.eval_examples = 128
    config.checkpoint_every = 400

    first = config.first_stage
    first.autoencoder.channels = 16
    first.autoencoder.channel_multipliers = (1, 2, 4)
    first.autoencoder.num_res_blocks = 1
    first.autoencoder.num_groups = 8
    first.discriminator.channels = 32
    first.discriminator.num_layers = 2
    first.loss.disc_start = 1_400
    first.loss.disc_weight = 0.1
    first.loss.update_order = "together"
    first.optimizer.learning_rate = 2e-3
    first.optimizer.warmup_steps = 50
    first.optimizer.final_fraction = 0.05
    first.optimizer.betas = (0.9, 0.99)
    first.discriminator_optimizer.learning_rate = 1e-4
    first.batch_size = 8
    first.num_steps = 2_000


def smoke_first_stage(config: ConfigDict) -> None:
    """A few steps of networks that learn nothing."""
    config.log_every = 2
    config.eval_every = 4
    config.eval_examples = 16
    config.checkpoint_every = 2
    if "first_stage" not in config:
        return
    first = config.first_stage
    first.autoencoder.channels = 8
    first.autoencoder.channel_multipliers = (1, 1, 1)
    first.autoencoder.num_groups = 4
    first.autoencoder.mid_attention = False
    first.discriminator.channels = 8
    first.discriminator.num_layers = 1
    first.loss.disc_start = 2
    first.batch_size = 8
    first.num_steps = 4
    first.scale_examples = 32


def smoke_second_stage(config: ConfigDict) -> None:
    """A few steps of a UNet that learns nothing."""
    config.unet.channels = 8
    config.unet.channel_multipliers = (1,)
    config.unet.num_res_blocks = 1
    config.unet.attention_levels = (0,)
    config.unet.head_dim = 8
    config.unet.num_groups = 4
    config.optimizer.warmup_steps = 1
    config.batch_size = 8
    config.num_steps = 4
    config.sample.steps = 4
    config.sample.batch_size = 8
    if config.conditioning == "text":
        config.text_encoder.width = 16
        config.text_encoder.depth = 1
        config.text_encoder.head_dim = 8
    if config.conditioning == "class" and config.class_embedding.width:
        config.class_embedding.width = 16
