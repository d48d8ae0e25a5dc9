"""The second stage's loss and the gradient of every weight, against PyTorch.

The networks are those of diffusers and transformers with the same weights, in float64; the losses
are written here after the papers.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from safetensors.torch import load_file
from torch import nn

from latent_diffusion_jax.conditioning.base import Conditioning
from latent_diffusion_jax.diffusion.losses import Objective, denoising_loss
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.randomness import normal_per_key
from latent_diffusion_jax.sampling import Request, Settings, make_draw, make_plan
from latent_diffusion_jax.training import diffusion_stage
from latent_diffusion_jax.training.state import State, sample_keys
from latent_diffusion_jax.weights import autoencoders, clip_text, ldm_bert, unets
from tests.clip_files import text_model
from tests.torch_networks import nchw, nhwc

TOLERANCE = 5e-5  # relative, of values and of norms
NUM_TIMESTEPS, BETAS = 1000, dict(beta_start=0.00085, beta_end=0.012)
VOCABULARY, LENGTH, WIDTH, SIZE = 20, 6, 12, 4
SCHEDULE = make_schedule("scaled_linear", NUM_TIMESTEPS, **BETAS)
SCHEDULER = DDPMScheduler(NUM_TIMESTEPS, beta_schedule="scaled_linear", **BETAS)
# Its own product is rounded to float32, so that 1 - alpha_bar is wrong by 2e-5 at first.
SCHEDULER.alphas_cumprod = torch.cumprod(1 - SCHEDULER.betas.double(), dim=0)

rng = np.random.default_rng(0)
T = np.array([0, 1, 30, 300, 700, 999])
TOKENS = rng.integers(0, VOCABULARY, (len(T), LENGTH))
EPSILON = rng.normal(size=(len(T), SIZE, SIZE, 3)).astype(np.float32)
Z_0 = rng.uniform(-1, 1, EPSILON.shape).astype(np.float32)
Z_0[0, 0, 0] = [1.0, -1.0, 0.0]  # at t = 0, where the bins at the ends have no bounds


class Networks(NamedTuple):
    """The same networks twice, and how our weights, or their gradients, become theirs."""

    unet: nn.Module
    text: nn.Module
    ldm: LatentDiffusion
    params: dict[str, Any]
    predict: Any
    to_theirs: Any


def randomised(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network.eval()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By kind of text encoder; not to be changed."""

    @functools.cache
    def make(kind: str) -> Networks:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("networks")
        if kind == "bert":
            text = LDMBertModel(
                LDMBertConfig(
                    vocab_size=VOCABULARY, max_position_embeddings=LENGTH, d_model=WIDTH,
                    encoder_layers=2, encoder_ffn_dim=4 * WIDTH, encoder_attention_heads=2,
                    head_dim=5,
                )
            )  # fmt: skip
        else:
            text = text_model(
                VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=LENGTH,
            )  # fmt: skip
        levels = 2 if kind == "bert" else 1
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=6,  # the last three for variances
            block_out_channels=(8, 16)[:levels],
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:],
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        randomised(unet).save_pretrained(folder / "unet")
        randomised(text).save_pretrained(folder / "text")
        our_unet = unets.load(folder / "unet")
        weights = ldm_bert if kind == "bert" else clip_text
        network = TextTransformer if kind == "bert" else ClipTextEncoder
        our_text = weights.load(folder / "text")
        ldm = LatentDiffusion(
            None, network(**our_text.fields), UNet(**our_unet.fields), SCHEDULE, SIZE
        )

        def to_theirs(tree: Any) -> dict[str, torch.Tensor]:
            out = folder / "gradients"
            unets.save_diffusers(out / "unet", our_unet.fields, tree["unet"])
            save = weights.save_diffusers if kind == "bert" else weights.save_hf
            save(out / "text", our_text.fields, tree["conditioner"])
            tensors = {}
            for part in ("unet", "text"):
                (file,) = (out / part).glob("*.safetensors")
                tensors |= {
                    f"{part}.{name.removeprefix('text_model.')}": gradient
                    for name, gradient in load_file(file).items()
                    if "to_logits" not in name
                }
            return tensors

        params = {"unet": our_unet.params, "conditioner": our_text.params}
        return Networks(unet.double(), text.double(), ldm, params, predictor(ldm), to_theirs)

    return make


# --- the losses, after the papers ----------------------------------------------------------------


def at_t(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return values[t].reshape(-1, 1, 1, 1)


def error_weights(objective: Objective, t: torch.Tensor) -> torch.Tensor:
    """What the error of a prediction counts, by example."""
    alpha_bar = SCHEDULER.alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    if objective.weighting == "none":
        return torch.ones_like(snr)
    if objective.weighting == "min_snr":
        bounded = torch.clamp(snr, max=objective.min_snr_gamma)
        # Hang et al. (2023) have it for each of the predictions.
        return {"z_0": bounded, "epsilon": bounded / snr, "v": bounded / (snr + 1)}[
            objective.prediction_type
        ]
    # Choi et al. (2022), equation 8, lowers the weight 1 of errors of epsilon. These are
    # alpha / sigma times those of z_0, and alpha times those of v.
    before = {"epsilon": torch.ones_like(snr), "z_0": snr, "v": alpha_bar}
    return before[objective.prediction_type] / (objective.p2_k + snr) ** objective.p2_gamma


def penalty(objective: Objective, found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if objective.loss == "huber":  # PyTorch's is half of the square near zero
        delta = objective.huber_delta
        return 2 * nn.functional.huber_loss(found, target, reduction="none", delta=delta)
    loss = {"l2": nn.functional.mse_loss, "l1": nn.functional.l1_loss}[objective.loss]
    return loss(found, target, reduction="none")


def bound_of(
    z_0: torch.Tensor, z_t: torch.Tensor, guess: torch.Tensor, choice: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Terms of the variational bound in bits per dimension, as Nichol and Dhariwal (2021) learn."""
    alphas, alpha_bar = 1 - SCHEDULER.betas.double(), SCHEDULER.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta_tilde = (1 - before) / (1 - alpha_bar) * (1 - alphas)
    beta_tilde[0] = beta_tilde[1]  # of which the logarithm is taken, as in the authors' code

    def mean(z: torch.Tensor) -> torch.Tensor:  # DDPM, equation 7
        return (
            at_t(before.sqrt() * (1 - alphas), t) * z + at_t(alphas.sqrt() * (1 - before), t) * z_t
        ) / at_t(1 - alpha_bar, t)

    share = (choice + 1) / 2
    log_variance = share * at_t((1 - alphas).log(), t) + (1 - share) * at_t(beta_tilde.log(), t)
    ours = torch.distributions.Normal(mean(guess), torch.exp(0.5 * log_variance))
    true = torch.distributions.Normal(mean(z_0), at_t(beta_tilde.sqrt(), t))
    divergence = torch.distributions.kl_divergence(true, ours)
    above = torch.where(z_0 > 0.999, 1.0, ours.cdf(z_0 + 1 / 255))
    below = torch.where(z_0 < -0.999, 0.0, ours.cdf(z_0 - 1 / 255))
    likelihood = -torch.log(torch.clamp(above - below, min=1e-12))
    nats = torch.where(t.reshape(-1, 1, 1, 1) == 0, likelihood, divergence)
    return nats.mean((1, 2, 3)) / math.log(2)


def their_loss(
    networks: Networks, objective: Objective, z_0: Any, epsilon: Any, t: Any, tokens: Any
) -> torch.Tensor:
    """The loss of each example."""
    z_0, epsilon, t, tokens = nchw(z_0), nchw(epsilon), torch.tensor(t), torch.tensor(tokens)
    z_t = SCHEDULER.add_noise(z_0, epsilon, t)
    context = networks.text(tokens, return_dict=True).last_hidden_state
    found, choice = networks.unet(z_t, t, context).sample.split(3, dim=1)
    target = {"epsilon": epsilon, "z_0": z_0, "v": SCHEDULER.get_velocity(z_0, epsilon, t)}[
        objective.prediction_type
    ]
    loss = error_weights(objective, t) * penalty(objective, found, target).mean((1, 2, 3))
    if objective.learned_variance:
        alpha_bar, frozen = at_t(SCHEDULER.alphas_cumprod, t), found.detach()
        guess = {
            "epsilon": (z_t - (1 - alpha_bar).sqrt() * frozen) / alpha_bar.sqrt(),
            "z_0": frozen,
            "v": alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * frozen,
        }[objective.prediction_type]
        bound = bound_of(z_0, z_t, guess, choice, t)
        loss = loss + objective.vlb_weight * NUM_TIMESTEPS * bound
    return loss


def theirs(networks: Networks, *arguments: Any) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The loss of each example, and the gradient of their mean by weight."""
    modules = {"unet": networks.unet, "text": networks.text}
    for module in modules.values():
        module.zero_grad(set_to_none=True)
    loss = their_loss(networks, *arguments)
    loss.mean().backward()
    gradients = {
        f"{part}.{name}": parameter.grad
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        if "to_logits" not in name  # which nothing uses
    }
    return loss.detach().numpy(), gradients


# --- ours ----------------------------------------------------------------------------------------


def outputs(objective: Objective) -> int:
    """Channels that an objective asks for."""
    return 6 if objective.learned_variance else 3


def predictor(ldm: LatentDiffusion) -> Any:
    """(params, z_t, t, tokens) -> prediction, one program for all objectives."""

    @jax.jit
    def predict(params: Any, z_t: jax.Array, t: jax.Array, tokens: jax.Array) -> jax.Array:
        return ldm.predict(params, z_t, t, ldm.condition(params, {"tokens": tokens}))

    return predict


def ours(
    networks: Networks, objective: Objective, z_0: Any, epsilon: Any, t: Any, tokens: Any
) -> tuple[np.ndarray, Any]:
    """The loss of each example, and the gradient of their mean."""

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        loss, _ = denoising_loss(
            lambda z_t, t: networks.predict(params, z_t, t, tokens)[..., : outputs(objective)],
            networks.ldm.schedule, objective, z_0, epsilon, jnp.asarray(t),
        )  # fmt: skip
        return jnp.mean(loss), loss

    gradient, loss = jax.grad(loss_fn, has_aux=True)(networks.params)
    return np.asarray(loss), gradient


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Of every weight, relative to its norm."""
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        norm = gradient.norm()
        if name.endswith("k_proj.bias"):  # which attention does not depend on
            norm = largest
        assert norm > 1e-7 * largest, name
        error = float((found[name] - gradient).norm() / norm)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


CASES = {
    "epsilon": dict(),
    "z_0": dict(prediction_type="z_0"),
    "v": dict(prediction_type="v"),
    "l1": dict(loss="l1"),
    "huber": dict(loss="huber", huber_delta=0.7),
    "v_l1_p2": dict(prediction_type="v", loss="l1", weighting="p2"),
    "z_0_huber_min_snr": dict(prediction_type="z_0", loss="huber", weighting="min_snr"),
    **{
        f"{prediction_type}_{weighting}": dict(prediction_type=prediction_type, weighting=weighting)
        for prediction_type in ("epsilon", "z_0", "v")
        for weighting in ("min_snr", "p2")
    },
    "other_constants": dict(weighting="p2", p2_gamma=0.5, p2_k=2.0),
    "other_bound": dict(prediction_type="v", weighting="min_snr", min_snr_gamma=1.5),
    **{
        f"learned_{prediction_type}": dict(prediction_type=prediction_type, learned_variance=True)
        for prediction_type in ("epsilon", "z_0", "v")
    },
    "learned_v_min_snr": dict(
        prediction_type="v", weighting="min_snr", learned_variance=True, vlb_weight=0.02
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_torch(case, networks):
    objective = Objective(**CASES[case])
    pair = networks("bert")
    given = (objective, Z_0, EPSILON, T, TOKENS)
    (found, gradients), (loss, expected) = ours(pair, *given), theirs(pair, *given)
    np.testing.assert_allclose(found, loss, rtol=TOLERANCE)
    assert_same_gradients(pair.to_theirs(gradients), expected)


def test_gradients_reach_clips_text_encoder(networks):
    pair, objective = networks("clip"), Objective("v", weighting="min_snr")
    given = (objective, Z_0, EPSILON, T, TOKENS)
    (found, gradients), (loss, expected) = ours(pair, *given), theirs(pair, *given)
    np.testing.assert_allclose(found, loss, rtol=TOLERANCE)
    assert_same_gradients(pair.to_theirs(gradients), expected)


# --- a step of training --------------------------------------------------------------------------


def recorder() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def first_step(ldm: LatentDiffusion, objective: Objective, frozen: Any, params: Any, batch: Any):
    """(metrics, gradient) of a stage's first step, with the key 5; no caption is dropped."""
    optimizer = recorder()
    stage = diffusion_stage.make_stage(
        ldm,
        optimizer,
        Conditioning(lambda record, rng: {}, {"tokens": np.zeros(LENGTH, np.int32)}, {}),
        Request(np.zeros(1, np.uint32)),
        objective=objective,
        condition_dropout=0.0,
        ema_decay=0.9,
        draw=make_draw(ldm, ldm.image_size, ldm.image_size),
        plan=make_plan(SCHEDULE, objective.prediction_type, Settings(steps=1)),
    )
    state = State(jnp.zeros((), jnp.int32), params, params, optimizer.init(params), frozen)
    state, metrics = jax.jit(stage.train_step)(state, batch, jax.random.key(5))
    return metrics, state.opt


def drawn_by_first_step(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(posterior noise, noise, timesteps) of that step."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(
        sample_keys(jax.random.key(5), jnp.zeros((), jnp.int32), size)
    )
    noises = jax.vmap(jax.random.split)(keys[:, 0])
    t = [jax.random.randint(key, (), 0, NUM_TIMESTEPS) for key in keys[:, 1]]
    posterior, noise = (normal_per_key(noises[:, i], (SIZE, SIZE, 3)) for i in (0, 1))
    return np.asarray(posterior), np.asarray(noise), np.asarray(t)


def test_a_step_of_training_equals_torch(networks, tmp_path):
    """From images of 8-bit pixels to the gradients that the optimizer is given."""
    pair = networks("bert")
    vae = randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    )
    vae.save_pretrained(tmp_path)
    loaded, scale = autoencoders.load(tmp_path), np.float32(0.7)
    objective = Objective("v", weighting="min_snr", learned_variance=True)
    ldm = dataclasses.replace(
        pair.ldm,
        autoencoder=autoencoders.NETWORKS[loaded.kind](**loaded.fields),
        image_size=8,
        prediction_type="v",
    )
    size = len(TOKENS)
    images = np.random.default_rng(1).integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    batch = {"image": images, "tokens": TOKENS}
    frozen = {"autoencoder": loaded.params, "scale_factor": scale}
    metrics, gradients = first_step(ldm, objective, frozen, pair.params, batch)

    posterior_noise, epsilon, t = drawn_by_first_step(size)
    assert len(set(t)) == size
    with torch.no_grad():
        posterior = vae.double().encode(nchw(images) / 127.5 - 1).latent_dist
    z_0 = float(scale) * (posterior.mean + posterior.std * nchw(posterior_noise))
    loss, expected = theirs(pair, objective, nhwc(z_0), epsilon, t, TOKENS)
    np.testing.assert_allclose(metrics["loss"], loss.mean(), rtol=TOLERANCE)
    assert_same_gradients(pair.to_theirs(gradients), expected)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=TOLERANCE)
