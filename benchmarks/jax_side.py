"""Our side: `jax_side.py CASE FOLDER VARIANT THREADS`, started by autoencoder.py."""

import functools
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

import jax
import numpy as np
import optax
from jax_tools import facts

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from latent_diffusion_jax.models import lpips
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.runtime.compilation import compiler_options
from latent_diffusion_jax.runtime.memory import keep_freed_memory
from latent_diffusion_jax.runtime.randomness import normal_per_key
from latent_diffusion_jax.runtime.trees import path_name
from latent_diffusion_jax.training.autoencoder_losses import AutoencoderLosses
from latent_diffusion_jax.training.autoencoder_stage import make_stage
from latent_diffusion_jax.training.state import sample_keys
from latent_diffusion_jax.weights import autoencoders
from latent_diffusion_jax.weights import lpips as lpips_weights


def discriminator_params(network: PatchDiscriminator, tensors: dict, images: jax.Array):
    """Parameters from PyTorch's tensors, by our names with dots."""

    def take(path, leaf):
        name = path_name(path).replace("/", ".")
        name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        tensor = tensors[name]
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor

    shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    return jax.tree_util.tree_map_with_path(take, shapes)


def inference(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that encodes or decodes once; its result is saved first."""
    loaded = autoencoders.load(folder / AUTOENCODER)
    network = AutoencoderKL(**loaded.fields)
    inputs = jax.device_put(np.load(folder / INPUTS)["inputs"])
    params = jax.device_put(loaded.params)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def apply(params, inputs):
        y = network.apply({"params": params}, inputs, method=case.task)
        return y.mean if case.task == "encode" else y

    np.savez(save, outputs=np.asarray(apply(params, inputs)))
    return lambda: apply(params, inputs)


def training(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that makes one update; the figures of the first ones are saved."""
    loaded = autoencoders.load(folder / AUTOENCODER)
    network = AutoencoderKL(**loaded.fields)
    discriminator = PatchDiscriminator(*case.discriminator)
    images = np.load(folder / INPUTS)["inputs"]
    perceptual = None
    if case.perceptual:

        def perceptual(params, x, y):
            return lpips.LPIPS().apply({"params": params}, x, y)

    adam = optax.adam(LEARNING_RATE, *BETAS)
    stage = make_stage(
        network,
        discriminator,
        {"autoencoder": adam, "discriminator": adam},
        images.shape[1:],
        AutoencoderLosses(
            pixel_loss="l1",
            reduction="sum",
            kl_weight=KL_WEIGHT,
            codebook_weight=1.0,
            beta=0.25,
            beta_on_codebook=True,
            perceptual_weight=1.0,
            logvar=0.0,
            learn_logvar=False,
            disc_start=0,
            disc_weight=DISC_WEIGHT,
            adaptive_weight=True,
            generator_loss="linear",
            discriminator_loss="hinge",
            r1_weight=0.0,
            lecam_weight=0.0,
            lecam_decay=0.999,
            update_order="together",
        ),
        perceptual=perceptual,
    )
    key = jax.random.key(1)
    state = jax.eval_shape(stage.init, key)
    params = {
        "autoencoder": loaded.params,
        "discriminator": discriminator_params(
            discriminator, dict(np.load(folder / DISCRIMINATOR)), images
        ),
    }
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    frozen = lpips_weights.load(folder / LPIPS) if case.perceptual else None
    state = jax.device_put(zeros.replace(params=params, frozen=frozen))
    batch = jax.device_put({"image": images})
    step = jax.jit(stage.train_step, donate_argnums=0, compiler_options=compiler_options())

    figures = []
    for _ in range(COMPARED_STEPS):
        state, metrics = step(state, batch, key)
        figures.append([float(metrics[name]) for name in FIGURES])
    np.savez(save, outputs=np.array(figures))

    def run():
        nonlocal state
        state, metrics = step(state, batch, key)
        return state, metrics

    return run


def write_noise(case: Case, path: pathlib.Path) -> None:
    """The posterior's noise in the first steps of `training`, for the other side."""
    noise = [
        normal_per_key(
            sample_keys(jax.random.key(1), np.int32(step), case.batch_size), case.latent_shape
        )
        for step in range(COMPARED_STEPS)
    ]
    np.savez(path, noise=np.stack(noise))


if __name__ == "__main__":
    CASE, FOLDER = CASES[sys.argv[1]], pathlib.Path(sys.argv[2])
    if CASE.task == "train":
        keep_freed_memory()  # as the train command does, before JAX starts
    if sys.argv[3] == "noise":
        write_noise(CASE, FOLDER / NOISE)
        child.reply(CHANNEL, {})
    else:
        prepare = training if CASE.task == "train" else inference
        run = prepare(CASE, FOLDER, FOLDER / "ours.npz")
        child.serve(run, jax.block_until_ready, CASE.repeats, facts, CHANNEL)
