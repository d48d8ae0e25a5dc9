"""The denoising UNet (LDM, section 3.3; figure 3), with the options of the published models."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.models import remat
from latent_diffusion_jax.models.attention import PixelAttention, SpatialTransformer
from latent_diffusion_jax.models.layers import Dense, GroupNorm, conv, timestep_embedding
from latent_diffusion_jax.models.precision import precise
from latent_diffusion_jax.models.unet_blocks import TimeResBlock, downsample, upsample

ATTENTIONS = ("transformer", "self")
HEAD_DIM = 32  # LDM's usual, where neither number nor channels of the heads are given


class UNet(nn.Module):
    """Noisy latents, timesteps and conditions to a prediction of the latents' shape.

    What is said of levels is said for all of them at once by a number, or for each by a sequence.
    Conditions that have the latents' height and width are concatenated to them beforehand.
    """

    out_channels: int = 3
    channels: int = 192  # of the highest resolution
    channel_multipliers: Sequence[int] = (1, 2, 3, 5)  # one level each
    num_res_blocks: int = 2
    attention_levels: Sequence[int] = (1, 2, 3)  # 0 is the highest resolution; the middle always
    attention: str = "transformer"  # which attends to a context; "self": to the pixels alone
    num_heads: int | Sequence[int] = 0  # of each attention; 0: by head_dim
    head_dim: int | Sequence[int] = 0  # channels of a head; 0: by num_heads
    transformer_depth: int | Sequence[int] = 1
    num_classes: int = 0  # labels that are embedded and added to the timestep's embedding
    vector_dim: int = 0  # of a vector that is, after a network of two layers; or 0
    scale_shift_norm: bool = False  # embeddings scale and shift normalised features
    resblock_updown: bool = False  # residual blocks change the resolution, not convolutions
    conv_resample: bool = True  # or averages and repeated pixels do, without parameters
    as_in_ddpm: bool = False  # timesteps' sinusoids and padding of Ho et al., not of LDM
    dropout: float = 0.0  # in residual blocks, where keys are given for it
    num_groups: int = 32
    norm_epsilon: float = 1e-5  # of all norms but the transformers'
    remat: str = "none"  # what the backward pass computes anew, to save memory; see `remat`
    dtype: Any = jnp.float32  # of the computation; parameters have their own
    precision: str = "high"  # of products in float32; see `precision`

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Number and channels of the heads on each level; the middle's are the last level's.

        Raises:
          ValueError: both fields are given, or they do not fit the levels or the widths.
        """
        numbers = self._by_level("num_heads", self.num_heads)
        dims = self._by_level("head_dim", self.head_dim)
        if any(numbers) and any(dims):
            raise ValueError(
                f"num_heads={self.num_heads} and head_dim={self.head_dim}: one of them must be 0"
            )
        if not any((*numbers, *dims)):
            dims = (HEAD_DIM,) * len(dims)
        attended, found = {*self.attention_levels, len(dims) - 1}, []
        for level, multiplier in enumerate(self.channel_multipliers):
            width, given = self.channels * multiplier, max(numbers[level], dims[level])
            if level in attended and (given < 1 or width % given):
                field = "num_heads" if any(numbers) else "head_dim"
                raise ValueError(
                    f"{field}={given} does not divide the {width} channels of level {level}"
                )
            other = width // max(given, 1)
            found.append((given, other) if any(numbers) else (other, given))
        return tuple(found)

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        """Blocks of the transformers on each level; the middle's are the last level's."""
        return self._by_level("transformer_depth", self.transformer_depth)

    def _by_level(self, field: str, value: int | Sequence[int]) -> tuple[int, ...]:
        levels = len(self.channel_multipliers)
        values = (value,) * levels if isinstance(value, int) else tuple(value)
        if len(values) != levels:
            raise ValueError(f"{field}={values} must have one entry for each of {levels} levels")
        return values

    def _check_call(
        self, z_t: jax.Array, context: jax.Array | None, vector: jax.Array | None
    ) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}; known: {ATTENTIONS}")
        if self.num_classes and self.vector_dim:
            raise ValueError(
                f"num_classes={self.num_classes} and vector_dim={self.vector_dim}: one of them "
                f"must be 0"
            )
        if self.attention == "self" and context is not None:
            raise ValueError("a UNet with attention='self' takes no context")
        if (vector is None) == bool(self.num_classes or self.vector_dim):
            raise ValueError(
                f"a UNet with num_classes={self.num_classes} and vector_dim={self.vector_dim} "
                f"{'needs a' if vector is None else 'takes no'} vector"
            )
        factor = 2 ** (len(self.channel_multipliers) - 1)
        if z_t.shape[1] % factor or z_t.shape[2] % factor:
            raise ValueError(
                f"height and width of {z_t.shape[1]}x{z_t.shape[2]} latents must be multiples of "
                f"{factor}"
            )

    def _embed(self, t: jax.Array, vector: jax.Array | None) -> jax.Array:
        """Timesteps [B], and labels or vectors, to embeddings [B, 4 * channels]."""

        def layers(x: jax.Array, name: str) -> jax.Array:
            x = Dense(4 * self.channels, dtype=self.dtype, name=f"{name}_0")(x.astype(self.dtype))
            return Dense(4 * self.channels, dtype=self.dtype, name=f"{name}_1")(nn.silu(x))

        sinusoids = timestep_embedding(t, self.channels, as_in_ddpm=self.as_in_ddpm)
        embedding = layers(sinusoids, "time_embed")
        if self.num_classes:
            labels = nn.Embed(
                self.num_classes,
                4 * self.channels,
                dtype=self.dtype,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embed",
            )
            embedding += labels(vector)
        elif vector is not None:
            embedding += layers(vector, "vector_embed")
        return embedding

    @precise
    @nn.compact
    def __call__(
        self,
        z_t: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        vector: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts epsilon (or what the objective asks for).

        Args:
          z_t: noisy latents [B, h, w, c]; h and w divisible by 2^(levels - 1).
          t: timesteps [B].
          context: tokens to attend to [B, L, D], or None: attention to the latents themselves.
          vector: labels [B] in [0, num_classes), or vectors [B, vector_dim]; None without both.
          dropout_keys: random keys of the examples [B], with which dropout is active; an example's
            mask depends on its own alone.

        Returns:
          [B, h, w, out_channels], float32.

        Raises:
          ValueError: fields contradict each other, or an argument does not fit them.
        """
        self._check_call(z_t, context, vector)
        heads, depths = self.heads, self.transformer_depths
        res_block, transformer, pixel_attention = (
            remat.of_block(module, self.remat)
            for module in (TimeResBlock, SpatialTransformer, PixelAttention)
        )
        embedding = self._embed(t, vector)
        context = None if context is None else context.astype(self.dtype)

        def res(x: jax.Array, width: int, name: str, resample: str = "") -> jax.Array:
            y = res_block(
                width,
                self.num_groups,
                self.dtype,
                resample,
                self.scale_shift_norm,
                self.dropout,
                self.norm_epsilon,
                name=name,
            )(x, embedding, dropout_keys)
            return remat.named(y)

        def attend(x: jax.Array, level: int, name: str) -> jax.Array:
            number, dim = heads[level]
            if self.attention == "self":
                y = pixel_attention(
                    self.num_groups,
                    self.dtype,
                    number,
                    self.norm_epsilon,
                    zero_init=True,
                    name=f"{name}_attention",
                )(x)
            else:
                y = transformer(
                    number,
                    dim,
                    depths[level],
                    self.num_groups,
                    self.dtype,
                    name=f"{name}_transformer",
                )(x, context)
            return remat.named(y)

        def block(x: jax.Array, level: int, name: str) -> jax.Array:
            x = res(x, self.channels * self.channel_multipliers[level], f"{name}_res")
            return attend(x, level, name) if level in self.attention_levels else x

        last = len(self.channel_multipliers) - 1

        def down(_: nn.Module, h: jax.Array, level: int) -> list[jax.Array]:
            """What the level's blocks give, and what goes to the next level: all are skips."""
            found = []
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_{i}")
                found.append(h)
            if level == last:
                return found
            name = f"down_{level}_downsample"
            if self.resblock_updown:
                h = res(h, h.shape[-1], name, "down")
            else:
                padding = (0, 1) if self.as_in_ddpm else (1, 1)
                h = remat.named(downsample(h, self.conv_resample, self.dtype, name, padding))
            return [*found, h]

        def middle(_: nn.Module, h: jax.Array) -> jax.Array:
            width = h.shape[-1]
            h = res(h, width, "mid_0_res")
            h = attend(h, last, "mid_0")
            return res(h, width, "mid_1_res")

        def up(_: nn.Module, h: jax.Array, skips: list[jax.Array], level: int) -> jax.Array:
            for i, skip in enumerate(reversed(skips)):
                h = jnp.concatenate([h, skip], axis=-1)
                h = block(h, level, f"up_{level}_{i}")
            if level == 0:
                return h
            name = f"up_{level}_upsample"
            if self.resblock_updown:
                return res(h, h.shape[-1], name, "up")
            return remat.named(upsample(h, self.conv_resample, self.dtype, name))

        def levels(network: nn.Module, z_t: jax.Array) -> jax.Array:
            def through(function: Any, *arrays: Any, **static: int) -> Any:
                function = functools.partial(function, **static)
                return remat.of_level(function, self.remat)(network, *arrays)

            h = remat.named(conv(self.channels, 3, self.dtype, "conv_in")(z_t))
            skips = [h]
            for level in range(last + 1):
                skips += through(down, skips[-1], level=level)
            h = through(middle, skips[-1])
            for level in reversed(range(last + 1)):
                first = len(skips) - self.num_res_blocks - 1
                skips, own = skips[:first], skips[first:]
                h = through(up, h, own, level=level)
            return h

        h = remat.of_network(levels, self.remat)(self, z_t.astype(self.dtype))
        h = nn.silu(GroupNorm(self.num_groups, self.norm_epsilon, name="norm_out")(h))
        return conv(self.out_channels, 3, self.dtype, "conv_out", zero_init=True)(h).astype(
            jnp.float32
        )
