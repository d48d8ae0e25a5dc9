"""Whole models out: as a pipeline's folder of diffusers, or as one file of CompVis' code."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.class_embedding import ClassEmbedding
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.published import INDEX_FILE, OPENCLIP_WIDTH, TRAINED_TOKENIZER
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import (
    autoencoders,
    class_embeddings,
    clip_text,
    compvis,
    diffusers,
    files,
    folders,
    ldm_bert,
    schedulers,
    single_files,
    unet_diffusers,
    unets,
)

THEIR_LENGTH = 77  # tokens that LDM's pipeline of diffusers pads every prompt to


def fields_of(network: nn.Module) -> dict[str, Any]:
    """Keyword arguments that make a network anew."""
    return {
        name: getattr(network, name)
        for name in network.__dataclass_fields__
        if name not in ("parent", "name")
    }


def save_diffusers(folder: str | pathlib.Path, model: Model) -> None:
    """Writes a folder that a pipeline of diffusers loads.

    `StableDiffusionPipeline` with CLIP's text encoders, `LDMTextToImagePipeline` with a text
    transformer trained here (it pads prompts to 77 tokens, whatever the model has), `LDMPipeline`
    without text, `DDPMPipeline` or `DDIMPipeline` in the space of pixels.

    Args:
      folder: is made; files of the same names in it are replaced.
      model: that takes text, or nothing.

    Raises:
      UserError: diffusers has no such pipeline, or the folder cannot be written.
    """
    folder, ldm = pathlib.Path(folder).expanduser(), model.ldm
    if ldm.num_labels:
        raise UserError("diffusers has no pipeline of a UNet for models of classes")
    if ldm.conditioner is None and ldm.unet.attention != "self":
        raise UserError("diffusers' unconditional pipelines have UNets with attention='self' alone")
    params = jax.tree.map(np.asarray, dict(model.params))
    unets.save_diffusers(
        folder / "unet",
        fields_of(ldm.unet),
        params["unet"],
        sample_size=ldm.latent_shape[0],
        linear_projections=_linear(params),
    )
    config = schedulers.make_config(
        ldm.schedule, ldm.prediction_type, dataclasses.asdict(model.settings)
    )
    folders.write_json(folder / "scheduler" / "scheduler_config.json", config)
    of_clip = isinstance(ldm.conditioner, ClipTextEncoder)
    index: dict[str, Any] = {
        "_diffusers_version": diffusers.VERSION,
        "unet": ["diffusers", unet_diffusers.CLASSES[ldm.unet.attention]],
        "scheduler": ["diffusers", config["_class_name"]],
    }
    if ldm.autoencoder is not None:
        kind, first = _first_stage(model)
        name, scale = "vae" if of_clip else "vqvae", float(params["scale_factor"])
        autoencoders.save_diffusers(
            folder / name, kind, first, params["autoencoder"], scale, ldm.image_size
        )
        index[name] = ["diffusers", diffusers.CLASSES[kind]]
    if of_clip:
        index |= _save_clip(folder, model, params)
    elif ldm.conditioner is not None:
        index |= _save_transformer(folder, model, params)
    elif ldm.autoencoder is not None:
        index["_class_name"] = "LDMPipeline"
    else:
        noisy = config["_class_name"] == "DDPMScheduler"
        index["_class_name"] = "DDPMPipeline" if noisy else "DDIMPipeline"
    folders.write_json(folder / INDEX_FILE, index)


def _save_clip(folder: pathlib.Path, model: Model, params: Any) -> dict[str, Any]:
    """CLIP's text encoder and tokenizer; entries of the pipeline's index."""
    text, tokenizer = model.ldm.conditioner, model.tokenizer
    assert text is not None and tokenizer is not None
    clip_text.save_hf(folder / "text_encoder", fields_of(text), params["conditioner"])
    tokenizer.save(folder / "tokenizer")
    return {
        "_class_name": f"StableDiffusion{'Inpaint' * model.sees_mask}Pipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def _save_transformer(folder: pathlib.Path, model: Model, params: Any) -> dict[str, Any]:
    """The text transformer and its tokenizer; entries of the pipeline's index."""
    text, tokenizer = model.ldm.conditioner, model.tokenizer
    assert text is not None and tokenizer is not None
    ldm_bert.save_diffusers(folder / "bert", fields_of(text), params["conditioner"])
    tokenizer.save(folder / "tokenizer")
    if tokenizer.max_length != THEIR_LENGTH:
        logging.warning(
            "this model has prompts of %d tokens and LDMTextToImagePipeline pads to %d: its "
            "parts will load in diffusers, the pipeline as a whole will not run",
            tokenizer.max_length,
            THEIR_LENGTH,
        )
    of_bert = "vocab.txt" in tokenizer.files
    if not of_bert:
        settings = {
            "tokenizer_class": TRAINED_TOKENIZER,
            "model_max_length": tokenizer.max_length,
            "pad_token": "[PAD]",
        }
        folders.write_json(folder / "tokenizer" / "tokenizer_config.json", settings)
    return {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "tokenizer": ["transformers", "BertTokenizer" if of_bert else TRAINED_TOKENIZER],
    }


def save_single_file(path: str | pathlib.Path, model: Model) -> None:
    """Writes one safetensors file with the names of CompVis' code.

    What tensors do not say (heads, what is predicted, the tokenizer) is in its metadata, which
    other programs pass over.

    Raises:
      UserError: CompVis' code has no such model, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"CompVis weights are written as .safetensors, not to {path}")
    if model.ldm.unet.num_classes:
        raise UserError("CompVis' code loads no UNet that embeds labels itself")
    kind, first = _first_stage(model)
    params = jax.tree.map(np.asarray, dict(model.params))
    text, linear = model.ldm.conditioner, _linear(params)
    tensors = {
        single_files.UNET + name: tensor
        for name, tensor in unets.to_compvis(
            fields_of(model.ldm.unet), params["unet"], linear_projections=linear
        ).items()
    }
    first_tensors = autoencoders.to_compvis(kind, first, params["autoencoder"])
    tensors |= {compvis.PREFIX + name: tensor for name, tensor in first_tensors.items()}
    if isinstance(text, ClassEmbedding):
        tensors |= class_embeddings.to_compvis(params["conditioner"])
    elif text is not None:
        writer = clip_text if isinstance(text, ClipTextEncoder) else ldm_bert
        tensors |= writer.to_compvis(fields_of(text), params["conditioner"])
    schedule = model.ldm.schedule
    tensors["betas"] = schedule.betas.astype(np.float32)
    tensors["alphas_cumprod"] = schedule.alphas_cumprod.astype(np.float32)
    tensors["scale_factor"] = np.array(params["scale_factor"], np.float32)
    files.write(path, tensors, _notes(model).metadata())


def _notes(model: Model) -> single_files.Notes:
    """What other programs have to be told beside the file, and what `load` finds in it."""
    ldm = model.ldm
    heads = {name: getattr(ldm.unet, name) for name in ("num_heads", "head_dim")}
    if any(not isinstance(number, int) for number in heads.values()):
        heads = {}  # not one for all levels
    words = model.tokenizer.files if model.tokenizer is not None else {}
    return single_files.Notes(
        prediction_type=ldm.prediction_type,
        **{name: number for name, number in heads.items() if number},
        text_heads=getattr(ldm.conditioner, "num_heads", None),
        image_size=ldm.image_size,
        null_label=model.null_label,
        label_names=list(model.label_names),
        settings=dataclasses.asdict(model.settings),
        tokenizer={name: content.decode("utf-8") for name, content in words.items()},
    )


def _first_stage(model: Model) -> tuple[str, dict[str, Any]]:
    first = model.ldm.autoencoder
    if first is None:
        raise UserError("a model in the space of pixels has no first stage to write")
    return ("kl" if isinstance(first, AutoencoderKL) else "vq"), fields_of(first)


def _linear(params: Mapping[str, Any]) -> bool:
    """Whether the transformers' projections are written as matrices, as in Stable Diffusion 2."""
    embedding = params.get("conditioner", {}).get("token_embedding", {}).get("embedding")
    return embedding is not None and embedding.shape[-1] == OPENCLIP_WIDTH
