"""Models that others have published: folders of diffusers, and single files of CompVis' code."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np
from absl import logging
from jax.typing import DTypeLike

from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.conditioning.tokenizers import PromptTokenizer
from latent_diffusion_jax.diffusion.process import PREDICTION_TYPES
from latent_diffusion_jax.loaded_model import Model, assembled
from latent_diffusion_jax.models.class_embedding import ClassEmbedding
from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import (
    autoencoders,
    class_embeddings,
    clip_text,
    files,
    folders,
    ldm_bert,
    schedulers,
    single_files,
    unets,
)
from latent_diffusion_jax.weights.text_encoders import Loaded

INDEX_FILE = "model_index.json"
KNOWN_PARTS = {"unet", "scheduler", "vae", "vqvae", "text_encoder", "bert", "tokenizer"}
TRAINED_TOKENIZER = "PreTrainedTokenizerFast"  # what transformers has for one trained here
IMAGENET_CLASSES = 1000  # LDM's second model of them has one more, for none
OPENCLIP_WIDTH = 1024  # of Stable Diffusion 2's context
MAX_SIDE = 2**14  # of images and of latents that models were trained on
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    tokenizers.JSON_FILE,
    *tokenizers.SETTINGS_FILES,
)
LDM_BERT = "cond_stage_model.transformer.token_emb.weight"  # in LDM's text-to-image files


def load_folder(folder: pathlib.Path, dtype: DTypeLike) -> Model:
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
    unet = unets.load(folder / "unet", dtype)
    scheduler = schedulers.read_config(
        folders.read_json(folder / "scheduler" / "scheduler_config.json"),
        str(folder / "scheduler" / "scheduler_config.json"),
    )
    first = None
    for name in autoencoders.SUBFOLDERS:
        if name in present:
            first = autoencoders.load(folder / name, dtype=dtype)
    text, network, tokenizer = None, None, None
    if "text_encoder" in present:
        text = clip_text.load(folder / "text_encoder", dtype)
        network = ClipTextEncoder(**text.fields)
        load = tokenizers.load_clip
    elif "bert" in present:
        text = ldm_bert.load(folder / "bert", dtype)
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
    return assembled(str(folder), first, scale, text, network, tokenizer, unet, scheduler, size)


def _trained_here(tokenizer: pathlib.Path) -> bool:
    """Whether a tokenizer's folder is one that `saving` wrote for a tokenizer of ours."""
    settings = tokenizer / "tokenizer_config.json"
    if not settings.is_file():
        return [path.name for path in tokenizer.glob("*")] == [tokenizers.JSON_FILE]
    return folders.read_json(settings).get("tokenizer_class") == TRAINED_TOKENIZER


def _unet_size(folder: pathlib.Path) -> int:
    """Latents a side that a UNet was trained on, by its config."""
    size = folders.read_config(folder).get("sample_size")
    sides = size if isinstance(size, list) else [64 if size is None else size]
    if len(sides) not in (1, 2) or not all(map(_is_side, sides)):
        raise UserError(
            f"{folder / folders.CONFIG_FILE} has sample_size {size!r:.60}; it must be an integer "
            f"of 1 to {MAX_SIDE}, or two"
        )
    return int(sides[0])


def _is_side(number: object) -> bool:
    """Also as a float, which converters of configs write."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return 1 <= number <= MAX_SIDE and number % 1 == 0


def _factor(first: autoencoders.Loaded) -> int:
    return 2 ** (len(first.fields["channel_multipliers"]) - 1)


def load_file(
    path: pathlib.Path,
    tokenizer: str | pathlib.Path | None,
    ema: bool,
    num_heads: int | None,
    prediction_type: str | None,
    dtype: DTypeLike,
) -> Model:
    """A whole model in one file of CompVis' code; arguments as for `loading.load_model`."""
    tensors, where = files.read(path), str(path)
    notes = single_files.read_notes(path)
    _check_notes(notes, where)
    tensors = (single_files.with_average if ema else single_files.without_average)(tensors)
    first = autoencoders.from_compvis(tensors, where, dtype=dtype)
    heads = (num_heads, None) if num_heads else (notes.num_heads, notes.head_dim)
    unet = unets.from_compvis(tensors, where, *heads, dtype=dtype)
    text, network, words, null_label = None, None, None, notes.null_label
    if class_embeddings.NAME in tensors:
        text = class_embeddings.from_compvis(tensors, where)
        network = ClassEmbedding(**text.fields)
        if network.num_classes == IMAGENET_CLASSES + 1:
            null_label = IMAGENET_CLASSES
        _check_labels(notes, network.num_classes, where)
    elif null_label is not None:
        raise UserError(f"the metadata of {where} has a null_label, and its model no classes")
    elif unet.context_dim is not None:
        text, network = _text_of_file(tensors, where, notes.text_heads, dtype)
        words = _tokenizer_of_file(tokenizer, notes, network, where)
    paints = unet.in_channels > unet.fields["out_channels"]
    second = unet.context_dim == OPENCLIP_WIDTH
    prediction_type = prediction_type or notes.prediction_type
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
            f"{where}: unknown prediction_type {prediction_type!r:.60}; known: "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    settings = {"sampler": "plms", "spacing": "leading", "offset": 1, "final": "first"}
    if prediction_type == "v":
        settings["sampler"] = "ddim"
    settings |= {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in notes.settings.items()
    }
    schedule = single_files.noise_schedule(tensors, where)
    scheduler = schedulers.Loaded(schedule, prediction_type, settings)
    size = 256
    if isinstance(network, ClipTextEncoder):
        size = 768 if second and prediction_type == "v" else 512
    scale = first.scaling_factor
    model = assembled(
        where,
        first,
        single_files.SCALE_FACTORS[first.kind] if scale is None else scale,
        text,
        network,
        words,
        unet,
        scheduler,
        notes.image_size or size,
        null_label,
    )
    return dataclasses.replace(model, label_names=notes.label_names)


def _check_notes(notes: single_files.Notes, where: str) -> None:
    """Raises UserError where notes have numbers that cannot be."""
    for name in ("num_heads", "head_dim", "text_heads", "image_size"):
        value = getattr(notes, name)
        if value is not None and not _is_side(value):
            raise UserError(
                f"the metadata of {where} has {name} {value!r:.60}; it must be an integer of 1 to "
                f"{MAX_SIDE}"
            )


def _check_labels(notes: single_files.Notes, num_classes: int, where: str) -> None:
    """Raises UserError where notes are of other classes than the embedding of them."""
    if notes.null_label not in (None, num_classes - 1):
        raise UserError(
            f"the metadata of {where} has null_label {notes.null_label!r:.60}; for no class it has "
            f"the last one, {num_classes - 1}"
        )
    if len(notes.label_names) > num_classes:
        raise UserError(
            f"the metadata of {where} names {len(notes.label_names)} classes; it embeds "
            f"{num_classes}"
        )


def _text_of_file(
    tensors: Mapping[str, np.ndarray], where: str, num_heads: int | None, dtype: DTypeLike
) -> tuple[Loaded, TextTransformer | ClipTextEncoder]:
    """The text encoder in a single file; its heads are the usual ones where nothing is known."""
    if LDM_BERT in tensors:
        text = ldm_bert.from_compvis(tensors, where, num_heads or ldm_bert.NUM_HEADS, dtype)
        return text, TextTransformer(**text.fields)
    text = clip_text.from_compvis(tensors, where, num_heads, dtype)
    return text, ClipTextEncoder(**text.fields)


def _tokenizer_of_file(
    folder: str | pathlib.Path | None,
    notes: single_files.Notes,
    network: TextTransformer | ClipTextEncoder,
    where: str,
) -> PromptTokenizer:
    """The tokenizer of a single file's text encoder: the folder's, or what the notes hold."""
    of_clip = isinstance(network, ClipTextEncoder)
    if folder is None and notes.tokenizer:
        return _tokenizer_of_notes(notes, network, where)
    if folder is None:
        raise UserError(
            f"{where} holds no tokenizer, as only files that were written here do: give "
            f"tokenizer=FOLDER with the files of {'CLIP' if of_clip else 'BERT'}'s (the folder "
            f"tokenizer/ of any diffusers model of this kind)"
        )
    load = tokenizers.load_clip if of_clip else tokenizers.load_bert
    if not of_clip and _trained_here(pathlib.Path(folder).expanduser()):
        load = tokenizers.load_trained
    words = load(folder, network.vocab_size, network.max_length)
    if network.width == OPENCLIP_WIDTH and words.null[-1] == words.null[1]:
        raise UserError(
            f"the tokenizer in {folder} pads with its end token, as Stable Diffusion 1's does; "
            f"{where} needs one that pads with '!', as Stable Diffusion 2's does"
        )
    return words


def _tokenizer_of_notes(
    notes: single_files.Notes, network: TextTransformer | ClipTextEncoder, where: str
) -> PromptTokenizer:
    """The tokenizer whose files are in a single file's metadata; its library reads folders."""
    source = f"the metadata of {where}"
    with tempfile.TemporaryDirectory() as place:
        for name, text in notes.tokenizer.items():
            if name not in TOKENIZER_FILES:
                raise UserError(
                    f"{source} has a tokenizer's file {name!r:.60}; known are "
                    f"{', '.join(TOKENIZER_FILES)}"
                )
            try:
                content = text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the tokenizer's {name} in {source} is no text: {error}"
                ) from error
            (pathlib.Path(place) / name).write_bytes(content)
        try:
            return _tokenizer_of_file(place, notes, network, where)
        except UserError as error:  # the folder is gone when somebody reads of it
            said = str(error).replace(place, source)
            raise UserError(said if source in said else f"{source}: {said}") from error
