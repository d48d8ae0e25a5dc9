"""One step of the first stage against PyTorch, written as the references' training loop is.

Two optimizers in turn, each with its own backward pass; the adaptive weight from two more. The
networks are diffusers' autoencoders and pix2pix' discriminator with the same weights, in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.first_stages import (
    ACTIVATION,
    DISCRIMINATOR,
    KEY,
    KL,
    LOSSES,
    VQ,
    draw_batch,
    make_stage,
    posterior_noise,
    random_state,
)
from tests.torch_networks import (
    PatchDiscriminator,
    check_gradients,
    diffusers_autoencoder,
    in_diffusers,
    nchw,
    torch_names,
)

LEARNING_RATE = 1e-3
AVERAGES = {"real": 0.3, "fake": -0.2}
OF_GRADIENTS = (
    "d_weight",
    "grad_norm",
    "d_grad_norm",
    "r1",
    "loss",
)  # the loss by its adaptive weight

# The references' KL and VQ autoencoders, and all that departs from them.
CASES = {
    "kl": (KL, DISCRIMINATOR, dict(update_order="generator_first")),
    "vq": (VQ, DISCRIMINATOR, dict(update_order="generator_first", reduction="mean")),
    "kl_options": (
        KL,
        ACTIVATION,
        dict(
            pixel_loss="l2",
            reduction="mean",
            logvar=-0.5,
            learn_logvar=True,
            generator_loss="non_saturating",
            discriminator_loss="vanilla",
            r1_weight=0.3,
            lecam_weight=0.2,
        ),
    ),
    "vq_together": (
        VQ,
        DISCRIMINATOR,
        dict(beta=0.4, beta_on_codebook=False, codebook_weight=2.0, adaptive_weight=False,
             r1_weight=0.1, lecam_weight=0.2),
    ),
}  # fmt: skip


def perceptual_toy(params, x, y):
    return params * jnp.mean(jnp.square(x.mean(-1) - y.mean(-1)), axis=(1, 2))


def torch_perceptual_toy(x, y):
    return 2.0 * torch.mean((x.mean(1) - y.mean(1)) ** 2, dim=(1, 2))


def autoencode(network, images, noise, losses):
    """Reconstructions, and the regularising term."""
    if not hasattr(network, "quantize"):
        posterior = network.encode(images).latent_dist
        fake = network.decode(posterior.mean + posterior.std * noise).sample
        return fake, torch.sum(posterior.kl()) / images.shape[0]
    network.quantize.beta, network.quantize.legacy = losses.beta, losses.beta_on_codebook
    quantized, loss, _ = network.quantize(network.encode(images).latents)
    return network.decode(quantized, force_not_quantize=True).sample, loss


def step_generator(network, logvar, discriminator, images, noise, losses):
    """Updates the autoencoder. Returns what it reconstructed, and figures."""
    fake, regularizer = autoencode(network, images, noise, losses)
    rec = (images - fake).abs() if losses.pixel_loss == "l1" else (images - fake) ** 2
    distance = torch_perceptual_toy(images, fake)
    rec = rec + losses.perceptual_weight * distance[:, None, None, None]
    nll = rec / torch.exp(logvar) + logvar
    nll = torch.mean(nll) if losses.reduction == "mean" else torch.sum(nll) / nll.shape[0]
    logits = discriminator(fake)
    g_loss = -logits.mean()
    if losses.generator_loss == "non_saturating":
        g_loss = -torch.log(torch.sigmoid(logits)).mean()
    d_weight = torch.tensor(losses.disc_weight, dtype=torch.float64)
    if losses.adaptive_weight:
        last = network.decoder.conv_out.weight
        nll_grad = torch.autograd.grad(nll, last, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last, retain_graph=True)[0]
        ratio = torch.norm(nll_grad) / (torch.norm(g_grad) + 1e-4)
        d_weight = d_weight * torch.clamp(ratio, 0.0, 1e4)
    weight = losses.codebook_weight if hasattr(network, "quantize") else losses.kl_weight
    total = nll + weight * regularizer + d_weight * g_loss
    total.backward()
    parameters = [p for p in (*network.parameters(), logvar) if p.requires_grad]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
    return fake.detach(), {
        "loss": total,
        "rec_loss": nll,
        "quantization" if hasattr(network, "quantize") else "kl": regularizer,
        "l1": (images - fake).abs().mean(),
        "lpips": distance.mean(),
        "g_loss": g_loss,
        "d_weight": d_weight,
        "grad_norm": norm,
    }


def step_discriminator(discriminator, images, fake, losses):
    """Updates the discriminator. Returns figures."""
    discriminator.zero_grad()
    images = images.clone().requires_grad_()
    real_logits, fake_logits = discriminator(images), discriminator(fake)
    if losses.discriminator_loss == "hinge":
        loss = 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    else:
        loss = 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
    figures = {"d_loss": loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
    if losses.r1_weight:
        by_image = real_logits.mean(dim=(1, 2, 3)).sum()
        (grad,) = torch.autograd.grad(by_image, images, create_graph=True)
        figures["r1"] = 0.5 * (grad**2).sum(dim=(1, 2, 3)).mean()
        loss = loss + losses.r1_weight * figures["r1"]
    if losses.lecam_weight:
        figures["lecam"] = (F.relu(real_logits - AVERAGES["fake"]) ** 2).mean() + (
            F.relu(AVERAGES["real"] - fake_logits) ** 2
        ).mean()
        loss = loss + losses.lecam_weight * figures["lecam"]
    loss.backward()
    squares = [parameter.grad.square().sum() for parameter in discriminator.parameters()]
    figures["d_grad_norm"] = torch.stack(squares).sum().sqrt()
    torch.optim.SGD(discriminator.parameters(), lr=LEARNING_RATE).step()
    return figures


def check_moved(ours, theirs: dict[str, torch.Tensor], old) -> None:
    """Parameters after the step, as precise as float32 holds them."""
    assert ours.keys() <= theirs.keys()
    for name, value in ours.items():
        expected = theirs[name].detach().numpy()
        moved = np.abs(expected - old[name].numpy()).max()
        atol = 1e-4 * moved + 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_step_equals_that_of_torch(case):
    network, discriminator, changes = CASES[case]
    losses = dataclasses.replace(LOSSES, **changes)
    stage = make_stage(network, discriminator, fields={"perceptual": perceptual_toy}, **changes)
    batch = draw_batch(3)
    state = random_state(stage, network, discriminator, losses.logvar)
    state = state.replace(frozen=jnp.float32(2.0))
    if losses.lecam_weight:
        averages = {name: jnp.float32(value) for name, value in AVERAGES.items()}
        state = state.replace(averages={"logits": averages})
    new, metrics = jax.jit(stage.train_step)(state, batch, KEY)

    images = nchw(batch["image"]) / 127.5 - 1.0
    theirs = diffusers_autoencoder(network, state.params["autoencoder"])
    logvar = torch.tensor(losses.logvar, dtype=torch.float64, requires_grad=losses.learn_logvar)
    norm, layers = discriminator.norm, discriminator.num_layers
    their_discriminator = PatchDiscriminator(3, discriminator.channels, layers, norm)
    their_discriminator.load(state.params["discriminator"])
    their_discriminator.start_from(images)
    noise = nchw(posterior_noise(state, batch, network))
    old = in_diffusers(state.params["autoencoder"], theirs)
    fake, figures = step_generator(theirs, logvar, their_discriminator, images, noise, losses)
    if losses.update_order == "generator_first":
        noise = nchw(posterior_noise(state, batch, network, again=True))
        with torch.no_grad():
            fake = autoencode(theirs, images, noise, losses)[0]
    old_disc = {k: v.detach().clone() for k, v in their_discriminator.state_dict().items()}
    figures |= step_discriminator(their_discriminator, images, fake, losses)

    for name, value in figures.items():
        tolerance = 1e-4 if name in OF_GRADIENTS else 1e-5
        np.testing.assert_allclose(metrics[name], value.item(), tolerance, 1e-6, err_msg=name)
    extra = {"codebook_usage", "perplexity"} if network is VQ else set()
    extra |= {"logvar"} if losses.learn_logvar else set()
    assert set(metrics) == set(figures) | extra
    gradients = new.opt["autoencoder"][0].trace
    check_gradients(in_diffusers(gradients["autoencoder"], theirs), theirs, 1e-4)
    check_moved(in_diffusers(new.params["autoencoder"], theirs), theirs.state_dict(), old)
    if losses.learn_logvar:
        np.testing.assert_allclose(gradients["logvar"], logvar.grad.item(), rtol=1e-4)
        np.testing.assert_allclose(new.params["logvar"], logvar.item(), rtol=1e-5)
    gradients = new.opt["discriminator"][0].trace
    check_gradients(torch_names(gradients, []), their_discriminator, 1e-4)
    ours = torch_names(new.params["discriminator"], [])
    check_moved(ours, their_discriminator.state_dict(), old_disc)
    if losses.lecam_weight:
        for name, old_average in AVERAGES.items():
            expected = 0.9 * old_average + 0.1 * figures[f"logits_{name}"].item()
            np.testing.assert_allclose(new.averages["logits"][name], expected, rtol=1e-4)
    assert int(new.step) == 1 and new.ema is None
