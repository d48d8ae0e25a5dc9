"""The first stage: an autoencoder against a patch discriminator, updated in one step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latent_diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderVQ
from latent_diffusion_jax.models.discriminator import PatchDiscriminator
from latent_diffusion_jax.runtime import trees
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.runtime.sharding import gathered
from latent_diffusion_jax.training import codebook as codebooks
from latent_diffusion_jax.training import ema
from latent_diffusion_jax.training.adversary import Adversary, update_if
from latent_diffusion_jax.training.autoencoder_losses import (
    AutoencoderLosses,
    adaptive_weight,
    reconstruction_loss,
)
from latent_diffusion_jax.training.gradients import accumulate, map_parts
from latent_diffusion_jax.training.latents import Latents
from latent_diffusion_jax.training.optimizer import train_only
from latent_diffusion_jax.training.state import Stage, State, sample_keys

Perceptual = Callable[[Any, jax.Array, jax.Array], jax.Array]

PREVIEWS = 16  # images that are shown with their reconstructions
TRAINED = {"all": None, "decoder": ("decoder", "post_quant_conv")}  # parts of an autoencoder


def make_stage(
    autoencoder: AutoencoderKL | AutoencoderVQ,
    discriminator: PatchDiscriminator,
    optimizers: dict[str, optax.GradientTransformation],
    image_shape: tuple[int, int, int],
    losses: AutoencoderLosses,
    *,
    perceptual: Perceptual | None = None,
    trained: str = "all",
    ema_decay: float = 0.0,
    codebook_average: codebooks.CodebookAverage | None = None,
    accumulation: int = 1,
    param_dtype: str = "float32",
    ema_dtype: str = "float32",
) -> Stage:
    """Builds the stage.

    Args:
      autoencoder: the network to train.
      discriminator: its adversary; there is none where `losses.disc_weight` is 0.
      optimizers: by the keys `autoencoder` and `discriminator`.
      image_shape: (H, W, C).
      losses: which of them, and their weights.
      perceptual: (parameters, images, reconstructions) -> distance [B], or None to go without.
        Its parameters are `State.frozen`.
      trained: a key of `TRAINED`. With `decoder` the encoder, and with it the latents, stay.
      ema_decay: of the moving average of the autoencoder, `State.ema`, with which it is
        evaluated; 0 for none.
      codebook_average: learns the codebook by moving averages; None by its gradient.
      accumulation: micro-batches that a batch is worked on in, one after the other. Batch
        statistics and the adaptive weight are those of a micro-batch.
      param_dtype, ema_dtype: of the networks' parameters, and of the moving average.
    """
    h, w, c = image_shape
    factor = autoencoder.downsampling_factor
    latent_shape = (h // factor, w // factor, autoencoder.embed_dim)
    adversary = Adversary(discriminator, losses) if losses.disc_weight else None
    parts = TRAINED[trained]
    optimizer = optimizers["autoencoder"]
    if parts is not None:
        prefixes = [f"autoencoder/{part}/" for part in parts]
        optimizer = train_only(optimizer, (*prefixes, "logvar"))
    latents = Latents(autoencoder, losses, latent_shape, parts is not None, codebook_average)

    def fresh(network: Any, key: jax.Array, images: jax.Array) -> Any:
        return trees.in_dtype(network.init(key, images)["params"], param_dtype)

    def init(key: jax.Array) -> State:
        key_autoencoder, key_discriminator = jax.random.split(key)
        images = jnp.zeros((1, h, w, c))
        params = {"autoencoder": fresh(autoencoder, key_autoencoder, images)}
        if losses.learn_logvar:
            params["logvar"] = jnp.float32(losses.logvar)
        opt = {"autoencoder": optimizer.init(params)}
        average, averages = None, {}
        if ema_decay:
            average = {"autoencoder": trees.in_dtype(params["autoencoder"], ema_dtype)}
        if codebook_average is not None:
            codes = params["autoencoder"]["quantizer"]["codebook"]
            averages["codebook"] = codebook_average.init(codes)
        if adversary is not None:
            params["discriminator"] = fresh(discriminator, key_discriminator, images)
            opt["discriminator"] = optimizers["discriminator"].init(params["discriminator"])
            averages |= adversary.init_averages()
        step = jnp.zeros((), jnp.int32)
        return State(step, params, average, opt, averages=averages or None)

    def generator_grads(
        params: Any, disc_params: Any, frozen: Any, part: Any, started: jax.Array
    ) -> tuple[Any, dict[str, jax.Array], jax.Array, Any]:
        """Gradients, figures, reconstructions and latents of a micro-batch.

        One forward and one backward pass through the autoencoder: each loss is differentiated
        with respect to the reconstructions, and the weighted sum is pulled back once.
        """
        images = to_float(part["image"])
        (fake, regularizer), pullback, found = jax.vjp(
            lambda params: latents.autoencode(params["autoencoder"], images, part["key"]),
            params,
            has_aux=True,
        )

        def reconstruct(fake: jax.Array, logvar: jax.Array) -> tuple[jax.Array, Any]:
            weighted, figures = None, {}
            if perceptual is not None:
                distance = perceptual(frozen, images, fake)
                weighted = losses.perceptual_weight * distance
                figures["lpips"] = jnp.mean(distance)
            loss = reconstruction_loss(
                *(images, fake, weighted, logvar),
                pixel_loss=losses.pixel_loss,
                reduction=losses.reduction,
            )
            return loss, figures

        def last_layer(grad: jax.Array) -> jax.Array:
            # All but the last layer's gradient is dead code that the compiler removes.
            (grads,) = pullback((grad, jnp.zeros_like(regularizer)))
            kernel = grads["autoencoder"]["decoder"]["conv_out"]["kernel"]
            return kernel.astype(jnp.float32)

        logvar = params.get("logvar", jnp.float32(losses.logvar))
        (rec_loss, figures), (fake_grad, logvar_grad) = jax.value_and_grad(
            reconstruct, (0, 1), has_aux=True
        )(fake, logvar)
        loss = rec_loss + latents.weight * regularizer
        if adversary is not None:
            g_loss, g_grad = adversary.generator_grad(disc_params, fake)
            weight = jnp.float32(losses.disc_weight)
            if losses.adaptive_weight:
                weight = weight * adaptive_weight(last_layer(fake_grad), last_layer(g_grad))
            weight = jnp.where(started, weight, 0.0)
            fake_grad, loss = fake_grad + weight * g_grad, loss + weight * g_loss
            figures |= {"g_loss": g_loss, "d_weight": weight}
        (grads,) = pullback((fake_grad, jnp.full_like(regularizer, latents.weight)))
        if losses.learn_logvar:
            grads = grads | {"logvar": logvar_grad}
        figures |= {
            "loss": loss,
            "rec_loss": rec_loss,
            "l1": jnp.mean(jnp.abs(images - fake)),
            latents.regularizer: regularizer,
        }
        return grads, figures, fake, found

    def train_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        keys = sample_keys(key, state.step, batch["image"].shape[0])
        inputs = {"image": batch["image"], "key": keys}
        started = state.step >= losses.disc_start
        averages = dict(state.averages or {})
        params = dict(state.params)
        disc_params = params.pop("discriminator", None)
        if adversary is not None:
            disc_params = adversary.initialized(disc_params, to_float(batch["image"]), state.step)

        def discriminator_grads(part: Any, fake: jax.Array) -> Any:
            assert adversary is not None
            return adversary.grads(disc_params, averages, to_float(part["image"]), fake, started)

        together = adversary is not None and losses.update_order == "together"

        def micro_batch(part: Any) -> tuple[Any, Any]:
            grads, figures, fake, found = generator_grads(
                params, disc_params, state.frozen, part, started
            )
            codes, candidates = latents.statistics(found)
            mean = {"grads": grads, "figures": figures, "codes": codes}
            if together:
                mean["discriminator"] = discriminator_grads(part, fake)
            return mean, candidates

        mean, candidates = accumulate(micro_batch, inputs, accumulation)
        metrics = mean["figures"] | {"grad_norm": optax.tree.norm(mean["grads"])}
        updates, opt = optimizer.update(mean["grads"], state.opt["autoencoder"], params)
        params, opts = optax.apply_updates(params, updates), {"autoencoder": opt}
        if codebook_average is not None:
            revival_key = jax.random.fold_in(key, state.step)
            codes, averages["codebook"] = codebook_average.update(
                averages["codebook"], mean["codes"], candidates, revival_key
            )
            new = trees.in_dtype({"quantizer": {"codebook": codes}}, param_dtype)
            params["autoencoder"] = params["autoencoder"] | new
        if mean["codes"]:
            metrics |= codebooks.usage_figures(mean["codes"]["shares"])
        if losses.learn_logvar:
            metrics["logvar"] = params["logvar"]

        if adversary is not None:
            if together:
                d_grads, figures = mean["discriminator"]
            else:
                new_params = params["autoencoder"]  # of the autoencoder that was just updated

                def new_fake(part: Any) -> jax.Array:
                    images = to_float(part["image"])
                    return latents.autoencode(new_params, images, part["key"])[0][0]

                other_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
                (d_grads, figures), _ = accumulate(
                    lambda part: (discriminator_grads(part, new_fake(part)), ()),
                    inputs | {"key": other_keys},
                    accumulation,
                )
            metrics |= figures | {"d_grad_norm": optax.tree.norm(d_grads)}
            averages |= adversary.update_averages(averages, figures, started)
            params["discriminator"], opts["discriminator"] = update_if(
                *(started, optimizers["discriminator"]),
                *(d_grads, state.opt["discriminator"], disc_params),
            )

        average = state.ema
        if ema_decay:
            new = {"autoencoder": params["autoencoder"]}
            average = ema.update(state.ema, new, state.step, ema_decay)
        new_state = State(state.step + 1, params, average, opts, state.frozen, averages or None)
        return new_state, metrics

    def reconstruct_mode(state: State, images: jax.Array) -> jax.Array:
        params = gathered((state.ema or state.params)["autoencoder"], autoencoder.dtype)
        return jnp.clip(autoencoder.apply({"params": params}, images), -1.0, 1.0)

    def eval_step(state: State, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        del key  # reconstructs from the posterior's mean

        def figures_of(part: Any) -> dict[str, jax.Array]:
            images = to_float(part["image"])
            reconstructions = reconstruct_mode(state, images)
            difference = reconstructions - images
            mse = jnp.mean(jnp.square(difference / 2.0), axis=(1, 2, 3))  # on [0, 1]
            figures = {
                "l1": jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
                "psnr": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10)),
            }
            if perceptual is not None:
                figures["lpips"] = perceptual(state.frozen, images, reconstructions)
            return figures

        return map_parts(figures_of, {"image": batch["image"]}, accumulation)

    def preview(state: State, batch: Any, key: jax.Array) -> jax.Array:
        del key
        images = to_float(batch["image"][:PREVIEWS])
        pairs = jnp.stack([images, reconstruct_mode(state, images)], axis=1)
        return pairs.reshape(-1, h, w, c)

    return Stage(init, train_step, eval_step, preview)


def start_from(state: State, params: Any) -> State:
    """A fresh state whose autoencoder, and all that follows it, is another's.

    `params` are laid out over devices, and rounded, as the state's own.
    """
    own = state.params["autoencoder"]
    params = jax.tree.map(
        lambda new, old: jax.device_put(jnp.array(new, old.dtype), old.sharding), params, own
    )
    average, averages = state.ema, state.averages
    if average is not None:
        average = jax.tree.map(
            lambda new, old: jnp.array(new, old.dtype), {"autoencoder": params}, average
        )
    if averages is not None and "codebook" in averages:
        codes, shares = params["quantizer"]["codebook"], averages["codebook"]["shares"]
        sums = codes * shares[:, None]
        averages = averages | {"codebook": {"shares": shares, "sums": sums}}
    return dataclasses.replace(
        state, params=state.params | {"autoencoder": params}, ema=average, averages=averages
    )
