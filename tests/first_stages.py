"""What the tests of the first stage's training share: tiny networks and their losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.training import autoencoder_stage
from latent_diffusion_jax.training.autoencoder_losses import AutoencoderLosses
from latent_diffusion_jax.training.state import Stage, State, sample_keys
from tests.torch_networks import draw_params

SIZE = 16
TINY: dict[str, Any] = dict(
    channels=4, channel_multipliers=(1, 1), num_res_blocks=0, num_groups=2, mid_attention=False
)
KL = AutoencoderKL(**TINY)
VQ = AutoencoderVQ(**TINY, codebook_size=20)
DISCRIMINATOR = PatchDiscriminator(channels=4, num_layers=1)
ACTIVATION = PatchDiscriminator(channels=4, num_layers=1, norm="activation")
KEY = jax.random.key(3)

LOSSES = AutoencoderLosses(
    pixel_loss="l1",
    reduction="sum",
    kl_weight=0.01,
    codebook_weight=1.0,
    beta=0.25,
    beta_on_codebook=True,
    perceptual_weight=0.5,
    logvar=0.0,
    learn_logvar=False,
    disc_start=0,
    disc_weight=0.7,
    adaptive_weight=True,
    generator_loss="linear",
    discriminator_loss="hinge",
    r1_weight=0.0,
    lecam_weight=0.0,
    lecam_decay=0.9,
    update_order="together",
)


def sgd(learning_rate: float) -> optax.GradientTransformation:
    """Gradient descent whose state shows the gradients."""
    return optax.sgd(learning_rate, momentum=0.0)


def make_stage(
    network: Any = KL,
    discriminator: PatchDiscriminator = DISCRIMINATOR,
    optimizer: optax.GradientTransformation | None = None,
    *,
    fields: dict[str, Any] | None = None,
    **changes: Any,
) -> Stage:
    """A stage with these changes to `LOSSES`; `fields` are further arguments."""
    optimizer = optimizer or sgd(1e-3)
    return autoencoder_stage.make_stage(
        network,
        discriminator,
        {"autoencoder": optimizer, "discriminator": optimizer},
        (SIZE, SIZE, network.image_channels),
        dataclasses.replace(LOSSES, **changes),
        **(fields or {}),
    )


def random_state(
    stage: Stage, network: Any, discriminator: PatchDiscriminator, logvar: float = 0.0
) -> State:
    """A state before its first step with random parameters; nothing is compiled for it."""
    images = np.zeros((1, SIZE, SIZE, network.image_channels), np.float32)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    drawn = {"autoencoder": draw_params(network, images), "logvar": jnp.float32(logvar)}
    drawn["discriminator"] = draw_params(discriminator, images, seed=1)
    params = {name: drawn[name] for name in state.params}
    average, averages = state.ema, state.averages
    if average is not None:
        average = {"autoencoder": drawn["autoencoder"]}
    if averages is not None and "codebook" in averages:
        codebook = drawn["autoencoder"]["quantizer"]["codebook"]
        n = len(codebook)
        averages = averages | {"codebook": {"shares": jnp.full(n, 1 / n), "sums": codebook / n}}
    return state.replace(params=params, ema=average, averages=averages)


def draw_batch(size: int, channels: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (size, SIZE, SIZE, channels), dtype=np.uint8)}


def posterior_noise(state: State, batch: Any, network: Any, again: bool = False) -> jax.Array:
    """What a step draws by example; `again` for the forward pass after the update."""
    keys = sample_keys(KEY, jnp.asarray(state.step), len(batch["image"]))
    if again:
        keys = [jax.random.fold_in(key, 1) for key in keys]
    side = SIZE // network.downsampling_factor
    return jnp.stack([jax.random.normal(key, (side, side, network.embed_dim)) for key in keys])


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    equal = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(equal)
