"""The programs that a config makes, to be compiled without weights, data or devices."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.conditioning.base import UNCONDITIONAL, Conditioning
from latent_diffusion_jax.data import latents
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.autoencoder import ENCODER, param_shapes
from latent_diffusion_jax.models.clip_text import PUBLISHED
from latent_diffusion_jax.models.lpips import LPIPS
from latent_diffusion_jax.runtime import sharding, trees
from latent_diffusion_jax.runtime.compilation import offload_options
from latent_diffusion_jax.runtime.flops import traced_flops
from latent_diffusion_jax.sampling import Request, make_draw
from latent_diffusion_jax.training.state import Stage, jit_train_step

SAMPLE = "sample"
# Start, end and padding of Stable Diffusion's tokenizers.
CLIP_TOKENS = {"ViT-L/14": (49_406, 49_407, 49_407), "ViT-H/14": (49_406, 49_407, 0)}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: `first_stage` and `diffusion`, train steps, or `sample`.
      function: jitted.
      arguments: shapes, with shardings.
      mesh: that it is compiled for.
      images: of a call.
      rounds: of its loops whose number is an argument: a sampler's calls of the network.
      resident: bytes on each chip while it runs, by kind, beside what it allocates itself.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    images: int
    rounds: int
    resident: dict[str, float]

    @property
    def argument_bytes(self) -> float:
        """On each chip."""
        return bytes_of_device(self.arguments)

    def trace(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments)

    def model_flops(self, traced: Any) -> float:
        """The model's operations in one call, on all chips (see `runtime.flops`)."""
        return traced_flops(traced.jaxpr, rounds=self.rounds)


def make(
    config: ConfigDict,
    name: str,
    mesh: Mesh,
    batch_size: int,
    num_labels: int,
    dtype: str = "float32",
) -> Program:
    """A program of a config.

    Args:
      config: of a run.
      name: of the program.
      mesh: to compile it for.
      batch_size: images of a step, or of a call of the sampler, on all chips.
      num_labels: of the data, with conditioning "class".
      dtype: that the sampler is asked for, as by `sample --dtype`.
    """
    if name == SAMPLE:
        return _sampler(config, mesh, batch_size, num_labels, dtype)
    stage, batch, frozen = _STAGES[name](config, batch_size, num_labels)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(stage.init, key).replace(frozen=frozen)
    shardings = sharding.state_sharding(state, mesh)
    if name == "first_stage":  # as `train` has it
        shardings = shardings.replace(
            frozen=jax.tree.map(lambda _: sharding.replicated(mesh), frozen)
        )
    state = _placed(state, shardings)
    batch = _placed(batch, sharding.batch_sharding(mesh))
    key = _placed(key, sharding.replicated(mesh))
    resident = {
        "parameters": bytes_of_device(state.params),
        "average": bytes_of_device((state.ema, state.averages)),
        "optimizer": bytes_of_device(state.opt),
        "frozen": bytes_of_device(state.frozen),
        # The loop gives the devices a step's and the one's after while they work on the one before.
        "batches": 3 * bytes_of_device(batch),
    }
    network = config.first_stage.autoencoder if name == "first_stage" else config.unet
    platform = mesh.devices.flat[0].platform
    options = offload_options(platform) if network.remat == "offload" else None
    step = jit_train_step(stage, shardings, mesh, options)
    return Program(name, step, (state, batch, key), mesh, batch_size, 1, resident)


def _sampler(
    config: ConfigDict, mesh: Mesh, batch_size: int, num_labels: int, dtype: str
) -> Program:
    ldm, conditioning = _second_stage(config, num_labels)
    if dtype != "float32":
        ldm = build.computing_in(ldm, dtype)

    def init(key: jax.Array) -> Any:
        null = {name: jnp.asarray(value)[None] for name, value in conditioning.null.items()}
        params = trees.in_dtype(dict(ldm.init_trained(key, null)), config.ema_dtype)
        if ldm.conditioner is not None and "conditioner" not in params:
            params["conditioner"] = ldm.conditioner.init(key, *null.values())["params"]
        return params

    same, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        params = jax.eval_shape(init, key)
    if ldm.autoencoder is not None:
        params["autoencoder"] = param_shapes(ldm.autoencoder)
        params["scale_factor"] = jax.ShapeDtypeStruct((), jnp.float32)
    if dtype != "float32":
        half = build.DTYPES[dtype]
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, half if x.ndim else x.dtype), params
        )
    params = _placed(params, same)
    inputs = _conditions(conditioning, batch_size)
    seeds: Any = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    guided = bool(inputs) and config.sample.guidance_scale != 1.0
    request = Request(seeds, inputs, inputs if guided else None)
    rows = split if batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else same
    steps = build.sample_plan(config)
    plan = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, steps))
    arguments = params, _placed(request, rows), _placed(plan, same)
    draw = jax.jit(make_draw(ldm, ldm.image_size, ldm.image_size))
    resident = {"parameters": bytes_of_device(params)}
    return Program(SAMPLE, draw, arguments, mesh, batch_size, int(steps.num_rows), resident)


def _first_stage_program(
    config: ConfigDict, batch_size: int, num_labels: int
) -> tuple[Stage, Any, Any]:
    """(stage, batch, frozen parameters)."""
    del num_labels
    frozen = None
    if config.first_stage.loss.lpips_weights:
        pair = jnp.zeros((1, 64, 64, 3))
        frozen = jax.eval_shape(lambda: LPIPS().init(jax.random.key(0), pair, pair)["params"])
    return build.first_stage(config), {"image": _images(config, batch_size)}, frozen


def _diffusion_program(
    config: ConfigDict, batch_size: int, num_labels: int
) -> tuple[Stage, Any, Any]:
    ldm, conditioning = _second_stage(config, num_labels)
    frozen: dict[str, Any] = {}
    batch = _conditions(conditioning, batch_size)
    if ldm.autoencoder is None or not config.data.latents:
        batch["image"] = _images(config, batch_size)
    else:
        h, w, c = ldm.latent_shape
        moments = 2 * c if config.first_stage.kind == "kl" else c
        dtype = _latents_dtype(pathlib.Path(config.data.latents).expanduser())
        batch["moments"] = jax.ShapeDtypeStruct((batch_size, h, w, moments), dtype)
    if ldm.autoencoder is not None:
        frozen["scale_factor"] = jax.ShapeDtypeStruct((), jnp.float32)
        params = param_shapes(ldm.autoencoder)
        if config.data.latents:  # as `train` has it: the decoder, for previews
            params = {part: v for part, v in params.items() if part not in ENCODER}
        frozen["autoencoder"] = params
    if ldm.conditioner is not None and not ldm.trained_conditioner:
        null = next(iter(conditioning.null.values()))[None]
        frozen["conditioner"] = jax.eval_shape(
            lambda: ldm.conditioner.init(jax.random.key(0), null)["params"]  # type: ignore
        )
    return build.second_stage(config, ldm, conditioning), batch, frozen


def _latents_dtype(folder: pathlib.Path) -> Any:
    """That of the folder's moments, or what `encode` gives them by default."""
    index = latents.read_index(folder)
    return jnp.dtype(index["dtype"] if index else latents.DTYPES[0])


_STAGES: dict[str, Callable[[ConfigDict, int, int], tuple[Stage, Any, Any]]] = {
    "first_stage": _first_stage_program,
    "diffusion": _diffusion_program,
}


def _second_stage(config: ConfigDict, num_labels: int) -> tuple[LatentDiffusion, Conditioning]:
    """The networks, and the host half of their condition, as far as shapes go.

    Of what a run finds out from data it is taken that the tokenizer has all the tokens that the
    config allows, that there are `num_labels`, and that `clip.path` has the encoder that the config
    expects.
    """
    kind = config.conditioning
    clip = PUBLISHED[config.clip.model] if kind == "clip" else None
    length = config.tokenizer.max_length if kind == "text" else clip["max_length"] if clip else 0
    vocabulary = config.tokenizer.vocab_size if kind == "text" else 0
    ldm = build.latent_diffusion(config, vocabulary, length, num_labels=num_labels, clip=clip)
    if kind in ("text", "clip"):
        tokens = _null_tokens(config, length)
        previews = np.zeros((len(config.sample.prompts), length), np.int32)
        return ldm, Conditioning(lambda record, rng: {}, {"tokens": tokens}, {"tokens": previews})
    if kind == "class":
        previews = np.zeros(len(config.sample.labels), np.int32)
        label = np.array(num_labels, np.int32)
        return ldm, Conditioning(lambda record, rng: {}, {"label": label}, {"label": previews})
    return ldm, UNCONDITIONAL


def _null_tokens(config: ConfigDict, length: int) -> np.ndarray:
    """Those of the empty prompt, which are constants of the program."""
    if config.conditioning == "text":  # they do not depend on captions
        trained = tokenizers.train([], config.tokenizer.vocab_size, length)
        return tokenizers.prompt_tokenizer(trained).null
    start, end, padding = CLIP_TOKENS[config.clip.model]
    return np.array([start, end, *[padding] * (length - 2)], np.int32)


def _conditions(conditioning: Conditioning, batch_size: int) -> dict[str, Any]:
    """A batch's condition, as shapes."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype)
        for name, value in conditioning.null.items()
    }


def _images(config: ConfigDict, batch_size: int) -> jax.ShapeDtypeStruct:
    size = config.data.image_size
    return jax.ShapeDtypeStruct((batch_size, size, size, build.image_channels(config)), jnp.uint8)


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings: one for each leaf, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def bytes_of_device(tree: Any) -> float:
    """Bytes of a tree of placed shapes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x) for x in jax.tree.leaves(tree)
    )


def _itemsize(x: Any) -> int:
    return 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
