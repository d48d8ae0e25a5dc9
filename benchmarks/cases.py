"""What is measured: networks, sizes, and the names of the files that both sides share.

Imports nothing that takes long, or memory: peak memory is measured by process.
"""

import dataclasses
from collections.abc import Sequence

VARIANTS = ("eager", "channels_last", "compile")  # of PyTorch
AUTOENCODER = "autoencoder"  # a folder of diffusers
DISCRIMINATOR = "discriminator.npz"  # PyTorch's names and layout
LPIPS = "lpips.safetensors"
INPUTS = "inputs.npz"  # images or latents, NHWC
NOISE = "noise.npz"  # of the posterior, for the steps that are compared

KL_WEIGHT, DISC_WEIGHT, LEARNING_RATE, BETAS = 1e-6, 0.5, 1e-4, (0.5, 0.9)
FIGURES = ("rec_loss", "kl", "g_loss", "d_loss", "d_weight")  # of a step, compared
COMPARED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      task: `encode`, `decode` or `train`.
      channels, channel_multipliers, z_channels, num_res_blocks, num_groups: of the autoencoder,
        which has attention in the middle; Stable Diffusion's first stage and smaller ones.
      discriminator: channels and strided convolutions of the discriminator.
      image_size: side in pixels.
      batch_size: images.
      perceptual: whether the train step has LPIPS, with random weights.
      tolerance: of the comparison, relative to the largest value.
      variants: of PyTorch that it is measured against.
    """

    task: str
    channels: int
    channel_multipliers: Sequence[int]
    z_channels: int
    image_size: int
    batch_size: int = 1
    num_res_blocks: int = 2
    num_groups: int = 32
    discriminator: tuple[int, int] = (64, 3)
    perceptual: bool = False
    tolerance: float = 1e-4
    variants: Sequence[str] = VARIANTS

    @property
    def repeats(self) -> int:
        """Steps of one turn: a train step follows on another."""
        return 4 if self.task == "train" else 1

    @property
    def factor(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.factor
        return side, side, self.z_channels


SD = dict(channels=128, channel_multipliers=(1, 2, 4, 4), z_channels=4)
SMALL = dict(channels=64, channel_multipliers=(1, 2, 4), z_channels=3)
MINIATURE = dict(z_channels=3, num_res_blocks=1, num_groups=8, discriminator=(32, 2))
DIGITS = dict(channels=16, channel_multipliers=(1, 2, 2), **MINIATURE)  # configs/txt2img.py
PHOTOS = dict(channels=16, channel_multipliers=(1, 2, 4), **MINIATURE)  # autoencoder_kl.py:photos
CASES = {
    "sd_encode_512": Case("encode", image_size=512, **SD),
    "sd_decode_512": Case("decode", image_size=512, **SD),
    "train_digits_b8": Case("train", image_size=32, batch_size=8, tolerance=1e-3, **DIGITS),
    "train_digits_b32": Case("train", image_size=32, batch_size=32, tolerance=1e-3, **DIGITS),
    "train_photos": Case("train", image_size=64, batch_size=8, tolerance=1e-3, **PHOTOS),
    "train_small": Case("train", image_size=64, batch_size=8, tolerance=1e-3, **SMALL),
    "train_small_lpips": Case(
        "train", image_size=64, batch_size=8, tolerance=1e-3, perceptual=True, **SMALL
    ),
    "tiny_decode": Case("decode", 32, (1, 2), 3, 32),
    "tiny_train": Case("train", 32, (1, 2), 3, 32, batch_size=2, perceptual=True, tolerance=1e-3),
}
DEFAULT_CASES = tuple(name for name in CASES if not name.startswith("tiny"))
