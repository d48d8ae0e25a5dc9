"""The first stage: an autoencoder against a patch discriminator, updated in one step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.diffusion.samplers import normal_per_key
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.training.autoencoder_losses import (
    adaptive_weight,
    generator_loss,
    hinge_loss,
    reconstruction_loss,
)
from latent_diffusion_jax.training.state import Stage, State, sample_keys, to_float

Perceptual = Callable[[Any, jax.Array, jax.Array], jax.Array]


def make_stage(
    autoencoder: AutoencoderKL,
    discriminator: PatchDiscriminator,
    optimizers: dict[str, optax.GradientTransformation],
    image_shape: tuple[int, int, int],
    *,
    kl_weight: float,
    perceptual: Perceptual | None,
    perceptual_weight: float,
    disc_start: int,
    disc_weight: float,
) -> Stage:
    """Builds the stage.

    Args:
      autoencoder: the network to train.
      discriminator: its adversary.
      optimizers: by the keys `autoencoder` and `discriminator`.
      image_shape: (H, W, C).
      kl_weight: weight of the KL term (summed over a latent), 1e-6 in the paper.
      perceptual: (parameters, images, reconstructions) -> distance [B], or None to go without.
        Its parameters are `State.frozen`.
      perceptual_weight: its weight.
      disc_start: the step from which the adversarial term counts; before it neither network
        sees it and the discriminator is not trained.
      disc_weight: weight of the adversarial term, on top of the adaptive weight.
    """
    h, w, c = image_shape
    factor = autoencoder.downsampling_factor
    latent_shape = (h // factor, w // factor, autoencoder.embed_dim)

    def init(key: jax.Array) -> State:
        key_autoencoder, key_discriminator = jax.random.split(key)
        images, noise = jnp.zeros((1, h, w, c)), jnp.zeros((1, *latent_shape))
        params = {
            "autoencoder": autoencoder.init(key_autoencoder, images, noise)["params"],
            "discriminator": discriminator.init(key_discriminator, images)["params"],
        }
        opt = {name: optimizers[name].init(params[name]) for name in params}
        return State(step=jnp.zeros((), jnp.int32), params=params, ema=None, opt=opt)

    def discriminate(params: Any, images: jax.Array) -> jax.Array:
        return discriminator.apply({"params": params}, images)

    def train_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        images = to_float(batch["image"])
        keys = sample_keys(key, state.step, images.shape[0])
        noise = normal_per_key(keys, latent_shape)

        def autoencode(params: Any) -> tuple[jax.Array, jax.Array]:
            reconstructions, posterior = autoencoder.apply({"params": params}, images, noise)
            return reconstructions, jnp.mean(posterior.kl())

        def reconstruct(reconstructions: jax.Array) -> jax.Array:
            distance = None
            if perceptual is not None:
                distance = perceptual_weight * perceptual(state.frozen, images, reconstructions)
            return reconstruction_loss(images, reconstructions, distance)

        # One forward and one backward pass through the autoencoder: each loss is differentiated
        # with respect to the reconstructions, and the weighted sum is pulled back once.
        (fake, kl), pullback = jax.vjp(autoencode, state.params["autoencoder"])
        rec_loss, rec_grad = jax.value_and_grad(reconstruct)(fake)

        def last_layer(grad: jax.Array) -> jax.Array:
            # All but the last layer's gradient is dead code that the compiler removes.
            return pullback((grad, jnp.zeros_like(kl)))[0]["decoder"]["conv_out"]["kernel"]

        # Always computed, and selected below: a tenth of the step's cost. Under `lax.cond` XLA's
        # CPU backend takes a hundred times as long for the weight gradients of convolutions.
        started = state.step >= disc_start
        disc_params = state.params["discriminator"]
        g_loss, g_grad = jax.value_and_grad(lambda x: generator_loss(discriminate(disc_params, x)))(
            fake
        )
        d_weight = disc_weight * adaptive_weight(last_layer(rec_grad), last_layer(g_grad))
        d_weight = jnp.where(started, d_weight, 0.0)

        def discriminator_loss(params: Any) -> jax.Array:
            loss = hinge_loss(discriminate(params, images), discriminate(params, fake))
            return jnp.where(started, loss, 0.0)

        d_loss, d_grads = jax.value_and_grad(discriminator_loss)(disc_params)
        (ae_grads,) = pullback((rec_grad + d_weight * g_grad, jnp.full_like(kl, kl_weight)))

        params, opt = {}, {}
        for name, grads in (("autoencoder", ae_grads), ("discriminator", d_grads)):
            updates, new_opt = optimizers[name].update(grads, state.opt[name], state.params[name])
            new_params = optax.apply_updates(state.params[name], updates)
            if name == "discriminator":  # frozen, its moments too, until it starts
                new_params, new_opt = jax.tree.map(
                    lambda new, old: jnp.where(started, new, old),
                    (new_params, new_opt),
                    (state.params[name], state.opt[name]),
                )
            params[name], opt[name] = new_params, new_opt
        metrics = {
            "loss": rec_loss + kl_weight * kl + d_weight * g_loss,
            "rec_loss": rec_loss,
            "l1": jnp.mean(jnp.abs(images - fake)),
            "kl": kl,
            "grad_norm": optax.tree.norm(ae_grads),
            "g_loss": g_loss,
            "d_loss": d_loss,
            "d_weight": d_weight,
        }
        return State(state.step + 1, params, None, opt, state.frozen), metrics

    def reconstruct_mode(state: State, images: jax.Array) -> jax.Array:
        noise = jnp.zeros((images.shape[0], *latent_shape))
        reconstructions, _ = autoencoder.apply(
            {"params": state.params["autoencoder"]}, images, noise
        )
        return jnp.clip(reconstructions, -1.0, 1.0)

    def eval_step(state: State, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        del key  # reconstructs from the posterior's mean
        images = to_float(batch["image"])
        difference = reconstruct_mode(state, images) - images
        mse = jnp.mean(jnp.square(difference / 2.0), axis=(1, 2, 3))  # on [0, 1]
        return {
            "l1": jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
            "psnr": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10)),
        }

    def preview(state: State, batch: Any, key: jax.Array) -> jax.Array:
        del key
        images = to_float(batch["image"])
        pairs = jnp.stack([images, reconstruct_mode(state, images)], axis=1)
        return pairs.reshape(-1, h, w, c)

    return Stage(init, train_step, eval_step, preview)
