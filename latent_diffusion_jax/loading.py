"""Models to draw with, from wherever they lie: a workdir, a diffusers folder, a single file."""

import dataclasses
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from latent_diffusion_jax import build, first_stages
from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.diffusion.process import PREDICTION_TYPES
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime import checkpoints, sharding
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sampling import Settings
from latent_diffusion_jax.weights import (
    autoencoders,
    clip_text,
    files,
    folders,
    ldm_bert,
    schedulers,
    single_files,
    unets,
)

INDEX_FILE = "model_index.json"
KNOWN_PARTS = {"unet", "scheduler", "vae", "vqvae", "text_encoder", "bert", "tokenizer"}
TRAINED_TOKENIZER = "PreTrainedTokenizerFast"  # what transformers has for one trained here
USUAL_SETTINGS = {"steps": 50, "guidance_scale": 7.5}
OPENCLIP_WIDTH = 1024  # of Stable Diffusion 2's context
LDM_BERT = "cond_stage_model.transformer.token_emb.weight"  # in LDM's text-to-image files


@dataclasses.dataclass(frozen=True)
class Model:
    """All that it takes to draw.

    Attributes:
      ldm: the networks.
      params: of the networks, see `LatentDiffusion`.
      tokenizer: None for an unconditional model.
      settings: how to sample where nothing else is said.
      batch_size: images drawn at once on each device where nothing else is said.
      sees_mask: the UNet takes a mask and the masked image's latents beside z_t.
      config: that it was trained with; None for others' checkpoints.
    """

    ldm: LatentDiffusion
    params: Any
    tokenizer: PromptTokenizer | None
    settings: Settings
    batch_size: int = 4
    sees_mask: bool = False
    config: ConfigDict | None = None


def load_model(
    path: str | pathlib.Path,
    *,
    dtype: str = "float32",
    tokenizer: str | pathlib.Path | None = None,
    ema: bool = True,
    num_heads: int | None = None,
    prediction_type: str | None = None,
) -> Model:
    """Loads a model; arguments as for `pipelines.load`.

    Raises:
      UserError: nothing is there, or it is damaged, incomplete or of another kind.
    """
    if dtype not in build.DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(build.DTYPES)}")
    path = pathlib.Path(path).expanduser().absolute()
    if path.is_file():
        model = _load_file(path, tokenizer, ema, num_heads, prediction_type)
    elif not path.is_dir():
        raise UserError(f"{path} does not exist")
    elif (path / INDEX_FILE).is_file():
        model = _load_folder(path)
    elif checkpoints.latest_step(path / "diffusion") is not None:
        model = _load_workdir(path)
    else:
        raise UserError(
            f"{path} is no model: it has neither {INDEX_FILE}, as folders of diffusers have, nor a "
            f"checkpoint of the diffusion stage, as workdirs of train have"
        )
    return _computing_in(model, dtype) if dtype != "float32" else model


def define_flags() -> None:
    """Flags of the commands that load models, for what single files do not say."""
    flags.DEFINE_integer(
        "num_heads", None, "Heads of the UNet's attention, for single files.", lower_bound=1
    )
    flags.DEFINE_enum(
        "prediction_type", None, PREDICTION_TYPES, "What the UNet predicts, for single files."
    )


def with_settings(model: Model, **chosen: Any) -> Model:
    """The model with other settings; those that are None stay."""
    given = {name: value for name, value in chosen.items() if value is not None}
    return dataclasses.replace(model, settings=dataclasses.replace(model.settings, **given))


def _computing_in(model: Model, dtype: str) -> Model:
    wanted = build.DTYPES[dtype]
    networks = {
        name: network.clone(dtype=wanted)
        for name in ("autoencoder", "conditioner", "unet")
        if (network := getattr(model.ldm, name)) is not None
    }
    params = jax.tree.map(lambda leaf: leaf.astype(wanted) if np.ndim(leaf) else leaf, model.params)
    return dataclasses.replace(model, ldm=dataclasses.replace(model.ldm, **networks), params=params)


def _load_workdir(workdir: pathlib.Path) -> Model:
    """What `train` left: the moving average of the second stage, the decoder."""
    directory = workdir / "diffusion"
    step = checkpoints.latest_step(directory)
    assert step is not None
    config = ConfigDict(checkpoints.read_json(directory, step, "config"))
    trained = tokenizers.load(json.dumps(checkpoints.read_json(directory, step, "tokenizer")))
    tokenizer = tokenizers.prompt_tokenizer(trained)
    try:
        ldm = build.latent_diffusion(config, tokenizer.vocab_size, tokenizer.max_length)
    except (AttributeError, KeyError) as error:  # ml_collections names the key
        raise UserError(f"{workdir} is of another version: its config lacks {error}") from error
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shapes = {
        "ema": jax.eval_shape(
            lambda key: ldm.init_trained(key, tokenizer.max_length), jax.random.key(0)
        )
    }
    average = checkpoints.restore_part(
        directory, step, checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))
    )["ema"]
    frozen = first_stages.load_frozen(config, workdir, mesh)
    return Model(
        ldm,
        frozen | average,
        tokenizer,
        build.sample_settings(config),
        config.sample.batch_size,
        config=config,
    )


def _load_folder(folder: pathlib.Path) -> Model:
    """A pipeline's folder of diffusers: Stable Diffusion, LDM with and without text, DDPM."""
    index = folders.read_json(folder / INDEX_FILE)
    present = {
        name
        for name, kind in index.items()
        if isinstance(kind, list | tuple) and len(kind) == 2 and kind[0] is not None
    }
    needed = {"unet", "scheduler"}
    lacking = sorted(
        name for name in (needed | present) & KNOWN_PARTS if not (folder / name).is_dir()
    )
    if lacking:
        raise UserError(f"{folder} lacks the folder(s) {', '.join(lacking)}, of {INDEX_FILE}")
    unet = unets.load(folder / "unet")
    scheduler = schedulers.read_config(
        folders.read_json(folder / "scheduler" / "scheduler_config.json"),
        str(folder / "scheduler" / "scheduler_config.json"),
    )
    first = None
    for name in autoencoders.SUBFOLDERS:
        if name in present:
            first = autoencoders.load(folder / name)
    text, network, tokenizer = None, None, None
    if "text_encoder" in present:
        text = clip_text.load(folder / "text_encoder")
        network = ClipTextEncoder(**text.fields)
        load = tokenizers.load_clip
    elif "bert" in present:
        text = ldm_bert.load(folder / "bert")
        network = TextTransformer(**text.fields)
        load = tokenizers.load_bert
        if _trained_here(folder / "tokenizer"):
            load = tokenizers.load_trained
    if text is not None:
        if "tokenizer" not in present:
            raise UserError(f"{folder} has a text encoder and no tokenizer")
        fields = text.fields
        tokenizer = load(folder / "tokenizer", fields["vocab_size"], fields["max_length"])
    scale = first.scaling_factor if first is not None else 1.0
    size = _unet_size(folder / "unet") * (_factor(first) if first else 1)
    return _assembled(str(folder), first, scale, text, network, tokenizer, unet, scheduler, size)


def _trained_here(tokenizer: pathlib.Path) -> bool:
    """Whether a tokenizer's folder is one that `saving` wrote for a tokenizer of ours."""
    settings = tokenizer / "tokenizer_config.json"
    if not settings.is_file():
        return False
    return folders.read_json(settings).get("tokenizer_class") == TRAINED_TOKENIZER


def _unet_size(folder: pathlib.Path) -> int:
    """Latents a side that a UNet was trained on, by its config."""
    size = folders.read_config(folder).get("sample_size")
    if isinstance(size, list | tuple):
        size = size[0]
    return int(size) if size else 64


def _factor(first: autoencoders.Loaded) -> int:
    return 2 ** (len(first.fields["channel_multipliers"]) - 1)


def _load_file(
    path: pathlib.Path,
    tokenizer: str | pathlib.Path | None,
    ema: bool,
    num_heads: int | None,
    prediction_type: str | None,
) -> Model:
    """A whole model in one file of CompVis' code."""
    tensors = files.read(path)
    where = str(path)
    tensors = (single_files.with_average if ema else single_files.without_average)(tensors)
    first = autoencoders.from_compvis(tensors, where)
    unet = unets.from_compvis(tensors, where, num_heads)
    text, network = None, None
    if unet.context_dim is not None:
        if LDM_BERT in tensors:
            text = ldm_bert.from_compvis(tensors, where)
            network, kind = TextTransformer(**text.fields), "BERT"
            load = tokenizers.load_bert
            if tokenizer is not None and _trained_here(pathlib.Path(tokenizer).expanduser()):
                load = tokenizers.load_trained
        else:
            text = clip_text.from_compvis(tensors, where)
            network, load, kind = ClipTextEncoder(**text.fields), tokenizers.load_clip, "CLIP"
        if tokenizer is None:
            raise UserError(
                f"{path} holds no tokenizer, as no such file does: give tokenizer=FOLDER with the "
                f"files of {kind}'s (the folder tokenizer/ of any diffusers model of this kind)"
            )
        words = load(tokenizer, text.fields["vocab_size"], text.fields["max_length"])
        padding = int(words.null[-1])
        if unet.context_dim == OPENCLIP_WIDTH and padding == int(words.null[1]):
            raise UserError(
                f"the tokenizer in {tokenizer} pads with its end token, as Stable Diffusion 1's "
                f"does; {path} needs one that pads with '!', as Stable Diffusion 2's does"
            )
    paints = unet.in_channels > unet.fields["out_channels"]
    second = unet.context_dim == OPENCLIP_WIDTH
    if prediction_type is None:
        prediction_type = "v" if second and not paints else "epsilon"
        if second:
            logging.warning(
                "%s does not say what it predicts; taken for %s, as models for 768x768 pixels are "
                "v and those for 512x512 and for painting epsilon (prediction_type)",
                path,
                prediction_type,
            )
    elif prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}"
        )
    settings = {"sampler": "plms", "spacing": "leading", "offset": 1, "final": "first"}
    if prediction_type == "v":
        settings["sampler"] = "ddim"
    scheduler = schedulers.Loaded(single_files.noise_schedule(tensors), prediction_type, settings)
    size = 256
    if isinstance(network, ClipTextEncoder):
        size = 768 if second and prediction_type == "v" else 512
    return _assembled(
        where,
        first,
        first.scaling_factor or single_files.SCALE_FACTORS[first.kind],
        text,
        network,
        words if text is not None else None,
        unet,
        scheduler,
        size,
    )


def _assembled(
    where: str,
    first: autoencoders.Loaded | None,
    scale_factor: float | None,
    text: clip_text.Loaded | ldm_bert.Loaded | None,
    network: nn.Module | None,
    tokenizer: PromptTokenizer | None,
    unet: unets.Loaded,
    scheduler: schedulers.Loaded,
    image_size: int,
) -> Model:
    """The parts as one model, once they fit one another."""
    denoiser = UNet(**unet.fields)
    params: dict[str, Any] = {"unet": unet.params}
    autoencoder, channels = None, denoiser.out_channels
    if first is not None:
        autoencoder = autoencoders.NETWORKS[first.kind](**first.fields)
        params["autoencoder"] = first.params
        params["scale_factor"] = jnp.float32(scale_factor or 1.0)
        channels = autoencoder.embed_dim
    extra = unet.in_channels - channels
    if extra not in (0, channels + 1):
        raise UserError(
            f"the UNet of {where} takes {unet.in_channels} channels and the latents have "
            f"{channels}: it is of another first stage, or of a kind that is not supported"
        )
    if denoiser.num_classes or denoiser.vector_dim:
        raise UserError(f"the UNet of {where} takes labels or vectors, which is not supported")
    if extra and network is None:
        raise UserError(
            f"the UNet of {where} takes {extra} channels beside the latents and no text, which is "
            f"not supported"
        )
    if network is None and unet.context_dim is not None:
        raise UserError(
            f"the UNet of {where} attends to vectors of {unet.context_dim} and there is no text "
            f"encoder to make them"
        )
    if network is not None and text is not None:
        if unet.context_dim != network.width:
            raise UserError(
                f"the UNet of {where} attends to vectors of {unet.context_dim}, the text encoder "
                f"gives {network.width}"
            )
        params["conditioner"] = text.params
    settings = Settings(**USUAL_SETTINGS | scheduler.settings)
    if network is None:
        settings = dataclasses.replace(settings, guidance_scale=1.0)
    ldm = LatentDiffusion(
        autoencoder,
        network,
        denoiser,
        scheduler.schedule,
        image_size,
        scheduler.prediction_type,
    )
    return Model(ldm, params, tokenizer, settings, sees_mask=extra == channels + 1)
