"""The first stage's discriminator in training: its losses, penalties and update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.runtime import trees
from latent_diffusion_jax.runtime.sharding import gathered
from latent_diffusion_jax.training.autoencoder_losses import (
    AutoencoderLosses,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from latent_diffusion_jax.training.gradients import run_if

Params = Any


class Adversary(NamedTuple):
    """A discriminator with its losses.

    Attributes:
      network: the discriminator.
      losses: which of them, and their weights.
    """

    network: PatchDiscriminator
    losses: AutoencoderLosses

    def logits(self, params: Params, images: jax.Array) -> jax.Array:
        return self.network.apply({"params": gathered(params, self.network.dtype)}, images)

    def generator_grad(self, params: Params, fake: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The generator's loss and its gradient with respect to the reconstructions."""

        def loss(fake: jax.Array) -> jax.Array:
            return generator_loss(self.logits(params, fake), self.losses.generator_loss)

        return jax.value_and_grad(loss)(fake)

    def init_averages(self) -> dict[str, Any]:
        """Moving averages of the logits, where LeCam needs them."""
        if not self.losses.lecam_weight:
            return {}
        return {"logits": {"real": jnp.zeros(()), "fake": jnp.zeros(())}}

    def initialized(self, params: Params, images: jax.Array, step: jax.Array) -> Params:
        """Parameters with the normalisation that the first images ask for (activation norm)."""
        if self.network.norm != "activation":
            return params

        def initialize(params: Params) -> Params:
            _, updated = self.network.apply(
                {"params": params}, images, initialize=True, mutable=["params"]
            )
            return trees.in_dtypes_of(updated["params"], params)

        return run_if(step == self.losses.disc_start, initialize, params, params)

    def grads(
        self, params: Params, averages: Any, images: jax.Array, fake: jax.Array, started: jax.Array
    ) -> tuple[Params, dict[str, jax.Array]]:
        """Gradients of the discriminator's loss, and figures; all zero before it has started.

        `averages` holds what `init_averages` gave.
        """

        def loss_fn(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            # Two passes, so that batch statistics are those of real and of fake images each.
            real_logits, fake_logits = self.logits(params, images), self.logits(params, fake)
            loss = discriminator_loss(real_logits, fake_logits, self.losses.discriminator_loss)
            figures = {
                "d_loss": loss,
                "logits_real": jnp.mean(real_logits),
                "logits_fake": jnp.mean(fake_logits),
            }
            if self.losses.r1_weight:
                image_grads = jax.grad(lambda x: jnp.sum(_means(self.logits(params, x))))(images)
                figures["r1"] = r1_penalty(image_grads)
                loss = loss + self.losses.r1_weight * figures["r1"]
            if self.losses.lecam_weight:
                logits = averages["logits"]
                figures["lecam"] = lecam_penalty(
                    real_logits, fake_logits, logits["real"], logits["fake"]
                )
                loss = loss + self.losses.lecam_weight * figures["lecam"]
            return loss, figures

        def found(params: Params) -> tuple[Params, dict[str, jax.Array]]:
            (_, figures), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            return grads, figures

        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(found, params))
        return run_if(started, found, nothing, params)

    def update_averages(
        self, averages: Any, figures: dict[str, jax.Array], started: jax.Array
    ) -> dict[str, Any]:
        """The averages after a step with these figures."""
        if not self.losses.lecam_weight:
            return {}
        rate = jnp.where(started, 1.0 - self.losses.lecam_decay, 0.0)
        old = averages["logits"]
        return {"logits": {k: old[k] + rate * (figures[f"logits_{k}"] - old[k]) for k in old}}


def _means(logits: jax.Array) -> jax.Array:
    """The mean logit of each image: [B]."""
    return jnp.mean(logits, axis=(1, 2, 3))


def update_if(
    started: jax.Array, optimizer: optax.GradientTransformation, grads: Any, opt: Any, params: Any
) -> tuple[Any, Any]:
    """(params, opt) after an update; as they are, the moments too, before it has started."""
    updates, new_opt = optimizer.update(grads, opt, params)
    new_params = optax.apply_updates(params, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(started, new, old), (new_params, new_opt), (params, opt)
    )
