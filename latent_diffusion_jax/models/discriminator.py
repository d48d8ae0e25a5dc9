"""PatchGAN discriminator (Isola et al., 2017), as VQGAN and LDM use it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models.precision import precise

NORMS = ("batch", "activation")


class BatchNorm(nn.Module):
    """Normalises by the statistics of the batch at hand, over all devices.

    The discriminator only ever runs in training, so no running averages are kept.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def around_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return 1.0 + 0.02 * jax.random.normal(key, shape)

        scale = self.param("scale", around_one, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=(0, 1, 2))
        variance = jnp.var(y, axis=(0, 1, 2))
        return ((y - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


class ActNorm(nn.Module):
    """Scale and shift of each channel that start from the data (Glow; Kingma and Dhariwal, 2018).

    `initialize=True` sets the parameters, which must be mutable then, so that this input comes out
    with mean 0 and standard deviation 1.
    """

    @nn.compact
    def __call__(self, x: jax.Array, initialize: bool = False) -> jax.Array:
        shift = self.param("shift", nn.initializers.zeros_init(), x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        y = x.astype(jnp.float32)
        if initialize:
            shift = -jnp.mean(y, axis=(0, 1, 2))
            scale = 1.0 / (jnp.std(y, axis=(0, 1, 2), ddof=1) + 1e-6)
            self.put_variable("params", "shift", shift)
            self.put_variable("params", "scale", scale)
        return ((y + shift) * scale).astype(x.dtype)


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> logits [B, h, w, 1], one for each patch."""

    channels: int = 64
    num_layers: int = 3  # strided convolutions; the receptive field is 34 for two, 70 for three
    norm: str = "batch"  # or "activation"
    dtype: Any = jnp.float32
    precision: str = "high"  # of products in float32; see `precision`

    @precise
    @nn.compact
    def __call__(self, x: jax.Array, initialize: bool = False) -> jax.Array:
        """`initialize`: let activation norms start from these images (parameters mutable)."""
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")

        def layer(features: int, strides: int, use_bias: bool, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (4, 4),
                strides=strides,
                padding=((1, 1), (1, 1)),
                use_bias=use_bias,
                kernel_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
                name=name,
            )

        h = nn.leaky_relu(layer(self.channels, 2, True, "conv_0")(x), 0.2)
        for i in range(1, self.num_layers + 1):
            strides = 2 if i < self.num_layers else 1
            batch_norm = self.norm == "batch"  # brings its own bias
            h = layer(self.channels * min(2**i, 8), strides, not batch_norm, f"conv_{i}")(h)
            if batch_norm:
                h = BatchNorm(name=f"norm_{i}")(h)
            else:
                h = ActNorm(name=f"norm_{i}")(h, initialize)
            h = nn.leaky_relu(h, 0.2)
        return layer(1, 1, True, f"conv_{self.num_layers + 1}")(h).astype(jnp.float32)
