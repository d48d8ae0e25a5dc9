"""Whole models out: as a pipeline's folder of diffusers, or as one file of CompVis' code."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from latent_diffusion_jax.loading import INDEX_FILE, OPENCLIP_WIDTH, TRAINED_TOKENIZER, Model
from latent_diffusion_jax.models.autoencoder import AutoencoderKL
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import (
    autoencoders,
    clip_text,
    compvis,
    diffusers,
    files,
    folders,
    ldm_bert,
    schedulers,
    single_files,
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
    transformer trained here. The latter pads prompts to 77 tokens, whatever the model has.

    Args:
      folder: is made; files of the same names in it are replaced.
      model: with a first stage and a tokenizer.

    Raises:
      UserError: diffusers has no such model, or the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    kind, first = _first_stage(model)
    text, tokenizer = model.ldm.conditioner, model.tokenizer
    if text is None or tokenizer is None:
        raise UserError("only models with a text encoder are written as a pipeline of diffusers")
    params = jax.tree.map(np.asarray, dict(model.params))
    of_clip = isinstance(text, ClipTextEncoder)
    vae = "vae" if of_clip else "vqvae"
    scale = float(params["scale_factor"])
    autoencoders.save_diffusers(
        folder / vae, kind, first, params["autoencoder"], scale, model.ldm.image_size
    )
    unets.save_diffusers(
        folder / "unet",
        fields_of(model.ldm.unet),
        params["unet"],
        sample_size=model.ldm.latent_shape[0],
        linear_projections=_linear(params),
    )
    config = schedulers.make_config(
        model.ldm.schedule, model.ldm.prediction_type, dataclasses.asdict(model.settings)
    )
    folders.write_json(folder / "scheduler" / "scheduler_config.json", config)
    tokenizer.save(folder / "tokenizer")
    of_bert = "vocab.txt" in tokenizer.files
    index: dict[str, Any] = {
        "_diffusers_version": diffusers.VERSION,
        vae: ["diffusers", diffusers.CLASSES[kind]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", config["_class_name"]],
    }
    if of_clip:
        clip_text.save_hf(folder / "text_encoder", fields_of(text), params["conditioner"])
        index |= {
            "_class_name": f"StableDiffusion{'Inpaint' * model.sees_mask}Pipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    else:
        ldm_bert.save_diffusers(folder / "bert", fields_of(text), params["conditioner"])
        index |= {
            "_class_name": "LDMTextToImagePipeline",
            "bert": ["latent_diffusion", "LDMBertModel"],
            "tokenizer": ["transformers", "BertTokenizer" if of_bert else TRAINED_TOKENIZER],
        }
        if tokenizer.max_length != THEIR_LENGTH:
            logging.warning(
                "this model has prompts of %d tokens and LDMTextToImagePipeline pads to %d: its "
                "parts will load in diffusers, the pipeline as a whole will not run",
                tokenizer.max_length,
                THEIR_LENGTH,
            )
        if not of_bert:
            settings = {
                "tokenizer_class": TRAINED_TOKENIZER,
                "model_max_length": tokenizer.max_length,
                "pad_token": "[PAD]",
            }
            folders.write_json(folder / "tokenizer" / "tokenizer_config.json", settings)
    folders.write_json(folder / INDEX_FILE, index)


def save_single_file(path: str | pathlib.Path, model: Model) -> None:
    """Writes one safetensors file with the names of CompVis' code.

    Raises:
      UserError: CompVis' code has no such model, or the file cannot be written.
    """
    kind, first = _first_stage(model)
    params = jax.tree.map(np.asarray, dict(model.params))
    text, linear = model.ldm.conditioner, _linear(params)
    if isinstance(text, TextTransformer) and text.num_heads != ldm_bert.NUM_HEADS:
        raise UserError(
            f"single files do not say how many heads a text transformer has, all that there are "
            f"have {ldm_bert.NUM_HEADS}; this one has {text.num_heads}"
        )
    logging.warning(
        "single files hold neither a tokenizer nor what is predicted nor the number of heads: load "
        "with tokenizer=, prediction_type=%r and num_heads=",
        model.ldm.prediction_type,
    )
    tensors = {
        single_files.UNET + name: tensor
        for name, tensor in unets.to_compvis(
            fields_of(model.ldm.unet), params["unet"], linear_projections=linear
        ).items()
    }
    first_tensors = autoencoders.to_compvis(kind, first, params["autoencoder"])
    tensors |= {compvis.PREFIX + name: tensor for name, tensor in first_tensors.items()}
    if text is not None:
        writer = clip_text if isinstance(text, ClipTextEncoder) else ldm_bert
        tensors |= writer.to_compvis(fields_of(text), params["conditioner"])
    schedule = model.ldm.schedule
    tensors["betas"] = schedule.betas.astype(np.float32)
    tensors["alphas_cumprod"] = schedule.alphas_cumprod.astype(np.float32)
    tensors["scale_factor"] = np.array(params["scale_factor"], np.float32)
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"CompVis weights are written as .safetensors, not to {path}")
    files.write(path, tensors, {"format": "pt"})


def _first_stage(model: Model) -> tuple[str, dict[str, Any]]:
    first = model.ldm.autoencoder
    if first is None:
        raise UserError("a model in the space of pixels has no first stage to write")
    return ("kl" if isinstance(first, AutoencoderKL) else "vq"), fields_of(first)


def _linear(params: Mapping[str, Any]) -> bool:
    """Whether the transformers' projections are written as matrices, as in Stable Diffusion 2."""
    embedding = params.get("conditioner", {}).get("token_embedding", {}).get("embedding")
    return embedding is not None and embedding.shape[-1] == OPENCLIP_WIDTH
