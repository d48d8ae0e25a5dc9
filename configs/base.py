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
    config.data.caption_key = "captions"  # text, a sequence of texts, or a class label
    config.data.caption_template = "{}"  # what becomes of a caption: "a photo of a {}", say
    config.data.holdout_share = 0.05  # of a folder without a test subfolder
    config.data.image_size = 256  # pixels; short side resized, then cropped to a square
    config.data.random_flip = False  # left to right, half of the time
    config.data.max_damaged_share = 0.01  # of the images may be skipped; more stops the run
    config.data.check_images = 10_000  # so many are decoded before the first step
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
