"""PyTorch's side: `torch_side.py CASE FOLDER VARIANT THREADS`, started by autoencoder.py."""

import pathlib
import sys

import child
from cases import (
    AUTOENCODER,
    BETAS,
    CASES,
    COMPARED_STEPS,
    DISC_WEIGHT,
    DISCRIMINATOR,
    FIGURES,
    INPUTS,
    KL_WEIGHT,
    LEARNING_RATE,
    LPIPS,
    NOISE,
    Case,
)

if __name__ == "__main__":
    CHANNEL = child.open_channel()
    child.limit_threads(int(sys.argv[4]))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from torch_tools import facts, from_nhwc, prepared, to_nhwc, wait

VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Discriminator(nn.Module):
    """The patch discriminator of pix2pix with batch normalisation."""

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.num_layers, width = num_layers, 3
        for i in range(num_layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            self.add_module(f"conv_{i}", nn.Conv2d(width, wider, 4, stride, 1, bias=i == 0))
            if i:
                self.add_module(f"norm_{i}", nn.BatchNorm2d(wider))
            width = wider
        self.add_module(f"conv_{num_layers + 1}", nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv_0(x), 0.2)
        for i in range(1, self.num_layers + 1):
            x = F.leaky_relu(getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x)), 0.2)
        return getattr(self, f"conv_{self.num_layers + 1}")(x)


class Perceptual(nn.Module):
    """LPIPS with VGG16, its parameters under the names that our loader reads."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for widths in VGG_BLOCKS:
            for wider in widths:
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        for i, widths in enumerate(VGG_BLOCKS):
            linear = nn.Sequential(nn.Dropout(), nn.Conv2d(widths[-1], 1, 1, bias=False))
            linear[1].weight.data.uniform_()
            self.add_module(f"lin{i}", nn.ModuleDict({"model": linear}))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Two passes, as in the `lpips` package: there is no gradient to find in the first.
        distances = []
        for i, (a, b) in enumerate(zip(self.taps(x), self.taps(y), strict=True)):
            linear = getattr(self, f"lin{i}")["model"][1]
            distances.append(linear((a - b).square()).mean((1, 2, 3)))
        return torch.stack(distances).sum(0)

    def taps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features at the end of each block, of unit length."""
        h, found = (x - self.shift) / self.scale, []
        for layer in [*self.features, None]:
            if layer is None or isinstance(layer, nn.MaxPool2d):
                found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
            h = layer(h) if layer is not None else h
        return found


def write_shared(case: Case, folder: pathlib.Path) -> None:
    """Random weights and inputs for both sides."""
    torch.manual_seed(0)
    widths = [case.channels * multiplier for multiplier in case.channel_multipliers]
    autoencoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=case.num_res_blocks,
        norm_num_groups=case.num_groups,
        latent_channels=case.z_channels,
        sample_size=case.image_size,
    )
    autoencoder.save_pretrained(folder / AUTOENCODER)
    rng = np.random.default_rng(0)
    if case.task == "decode":
        inputs = rng.normal(size=(case.batch_size, *case.latent_shape)).astype(np.float32)
    else:
        shape = (case.batch_size, case.image_size, case.image_size, 3)
        inputs = rng.integers(0, 256, shape, dtype=np.uint8)
        if case.task == "encode":
            inputs = (inputs / 127.5 - 1).astype(np.float32)
    np.savez(folder / INPUTS, inputs=inputs)
    if case.task == "train":
        state = Discriminator(*case.discriminator).state_dict()
        np.savez(folder / DISCRIMINATOR, **{name: x.numpy() for name, x in state.items()})
        save_file(Perceptual().state_dict(), folder / LPIPS)


def inference(case: Case, folder: pathlib.Path, variant: str):
    """A function that encodes or decodes once; its result is saved first."""
    network = prepared(AutoencoderKL.from_pretrained(folder / AUTOENCODER).eval(), variant)
    inputs = from_nhwc(np.load(folder / INPUTS)["inputs"], variant)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return network.encode(x).latent_dist.mean if case.task == "encode" else network.decode(x)[0]

    if variant == "compile":
        apply = torch.compile(apply)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return apply(inputs)

    np.savez(folder / f"{variant}.npz", outputs=to_nhwc(run()))
    return run


def training(case: Case, folder: pathlib.Path, variant: str):
    """A function that makes one update of both networks; the first figures are saved."""
    autoencoder = prepared(AutoencoderKL.from_pretrained(folder / AUTOENCODER).train(), variant)
    discriminator = Discriminator(*case.discriminator)
    state = dict(np.load(folder / DISCRIMINATOR))
    discriminator.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    discriminator = prepared(discriminator.train(), variant)
    perceptual = None
    if case.perceptual:
        perceptual = Perceptual().eval().requires_grad_(False)
        perceptual.load_state_dict(load_file(folder / LPIPS))
        perceptual = prepared(perceptual, variant)
    optimizers = [
        torch.optim.Adam(network.parameters(), LEARNING_RATE, BETAS, fused=True)
        for network in (autoencoder, discriminator)
    ]
    pixels = from_nhwc(np.load(folder / INPUTS)["inputs"], variant)
    noises = [from_nhwc(x, variant) for x in np.load(folder / NOISE)["noise"]]

    def autoencode(x: torch.Tensor, noise: torch.Tensor):
        posterior = autoencoder.encode(x).latent_dist
        return autoencoder.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()

    discriminate, measure = discriminator, perceptual
    if variant == "compile":
        autoencode, discriminate = torch.compile(autoencode), torch.compile(discriminator)
        measure = perceptual and torch.compile(perceptual)

    def step(noise: torch.Tensor) -> list[torch.Tensor]:
        images = pixels.float() / 127.5 - 1
        fake, kl = autoencode(images, noise)
        distance = (images - fake).abs()
        if measure is not None:
            distance = distance + measure(images, fake)[:, None, None, None]
        rec_loss, kl = distance.sum() / len(images), kl.mean()
        discriminator.requires_grad_(False)
        g_loss = -discriminate(fake).mean()
        last = autoencoder.decoder.conv_out.weight
        (rec_grad,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
        (g_grad,) = torch.autograd.grad(g_loss, last, retain_graph=True)
        weight = (rec_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4) * DISC_WEIGHT
        (rec_loss + KL_WEIGHT * kl + weight * g_loss).backward()
        discriminator.requires_grad_(True)
        real_logits, fake_logits = discriminate(images), discriminate(fake.detach())
        d_loss = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
        d_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [rec_loss, kl, g_loss, d_loss, weight]

    figures = [[figure.item() for figure in step(noise)] for noise in noises]
    assert len(figures) == COMPARED_STEPS and len(figures[0]) == len(FIGURES)
    np.savez(folder / f"{variant}.npz", outputs=np.array(figures))

    return lambda: step(torch.randn_like(noises[0]))


if __name__ == "__main__":
    CASE, FOLDER, VARIANT = CASES[sys.argv[1]], pathlib.Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(int(sys.argv[4]))
    if VARIANT == "shared":
        write_shared(CASE, FOLDER)
        child.reply(CHANNEL, {})
    else:
        prepare = training if CASE.task == "train" else inference
        child.serve(prepare(CASE, FOLDER, VARIANT), wait, CASE.repeats, facts, CHANNEL)
