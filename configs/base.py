"""What every config starts from: data, devices, logging, checkpoints. Not a config by itself."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
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
    config.data.check_images = 10_000  # so many are decoded before the first step
    config.data.latents = ""  # folder that encode wrote, for stage 2; "": encode images each time
    config.data.num_threads = 8  # that read and decode, for each process

    config.mesh = ConfigDict()  # devices along each axis; one may be -1: what is left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.log_every = 50  # steps
    config.eval_every = 1_000  # steps between figures and pictures of the held-out split
    config.eval_examples = 1_000
    config.checkpoint_every = 1_000  # steps
    config.keep_checkpoints = 2  # of each stage
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
    section.weight_decay = 0.01
    section.clip_norm = 0.0  # of the gradients' global norm; 0: no clipping
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
    section.autoencoder.remat = False  # recompute blocks in the backward pass, to save memory
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
    section.optimizer = optimizer(learning_rate=4.5e-6 * section.batch_size)
    section.optimizer.betas = (0.5, 0.9)
    section.optimizer.weight_decay = 0.0
    section.discriminator_optimizer = section.optimizer.copy_and_resolve_references()
    section.ema_decay = 0.0  # of a moving average of the weights; 0: none
    section.num_steps = 250_000
    section.scale_examples = 1_024  # images that the latents' scale is measured on
    return section


def open_images(config: ConfigDict) -> None:
    """Data as the references' autoencoders had it: OpenImages, short side 384, crops of 256."""
    config.data.name = ""  # a prepared TFDS dataset or a folder; give yours
    config.data.caption_key = ""  # none are needed
    config.data.resize = 384
    config.data.random_flip = True


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

    first = config.first_stage
    first.autoencoder.channels = 8
    first.autoencoder.channel_multipliers = (1, 1, 1)
    first.autoencoder.num_groups = 4
    first.autoencoder.mid_attention = False
    first.discriminator.channels = 8
    first.loss.disc_start = 2
    first.batch_size = 8
    first.num_steps = 4
    first.scale_examples = 32
