"""CLIP's text encoders in and out of the formats of transformers, CompVis' code and OpenCLIP.

The parameters are those of `models.clip_text.ClipTextEncoder`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.models.clip_text import ACTIVATIONS, ClipTextEncoder
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import clip_names, files, folders, mapping, shapes
from latent_diffusion_jax.weights.clip_names import HF_MODEL, HF_TABLE, OPENCLIP_TABLE
from latent_diffusion_jax.weights.messages import shown
from latent_diffusion_jax.weights.text_encoders import Loaded, to_ours

MODEL_TYPE, ARCHITECTURE = "clip_text_model", "CLIPTextModel"
WEIGHTS_FILE = "model.safetensors"  # the one that is written
WEIGHTS_FILES = (
    WEIGHTS_FILE,
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
# In single files: Stable Diffusion 1 has transformers' class, Stable Diffusion 2 OpenCLIP's.
HF_PREFIX, OPENCLIP_PREFIX = "cond_stage_model.transformer.", "cond_stage_model.model."
HEAD_DIM = 64  # of both; single files do not say it

# Values that transformers assumes where a config does not say.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def load(folder: str | pathlib.Path, dtype: DTypeLike = np.float32) -> Loaded:
    """Reads a folder of transformers' `CLIPTextModel`, such as `text_encoder/` of a pipeline.

    Args:
      folder: of the model.
      dtype: of the parameters.

    Raises:
      UserError: there is no such folder, or it is of a network that `ClipTextEncoder` cannot be,
        or its tensors are not all there.
    """
    folder = pathlib.Path(folder).expanduser()
    fields = read_config(folders.read_config(folder), str(folder / folders.CONFIG_FILE))
    tensors, path = folders.read_tensors(folder, WEIGHTS_FILES)
    network = clip_names.network(tensors)
    return Loaded(fields, _to_ours(HF_TABLE, network, fields, str(path), dtype))


def save_hf(folder: str | pathlib.Path, fields: Mapping[str, Any], params: Any) -> None:
    """Writes a folder that transformers' `CLIPTextModel.from_pretrained` loads.

    Args:
      folder: is made; files of the same names in it are replaced.
      fields: of the network, as in `Loaded`.
      params: of the network.

    Raises:
      UserError: `CLIPTextModel` cannot be this network, or the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    config = make_config(fields)
    tensors = mapping.to_theirs(_table(HF_TABLE, fields), params)
    named = {HF_MODEL + name: tensor for name, tensor in tensors.items()}
    files.write(folder / WEIGHTS_FILE, named, {"format": "pt"})
    folders.write_config(folder, config)


def from_compvis(
    tensors: Mapping[str, np.ndarray],
    where: str,
    num_heads: int | None = None,
    dtype: DTypeLike = np.float32,
) -> Loaded:
    """The text encoder among the tensors of a Stable Diffusion single file.

    Names tell which: `cond_stage_model.transformer.*` is transformers' class with OpenAI's
    activation, `cond_stage_model.model.*` OpenCLIP's, whose last layer but one is taken.

    Args:
      tensors: of the whole file; others are passed over.
      where: they come from, for the message.
      num_heads: which the file does not say; None means heads of 64 channels.
      dtype: of the parameters.

    Raises:
      UserError: there is no CLIP text encoder, or its tensors are not all there.
    """
    hf, openclip = (_beginning_with(prefix, tensors) for prefix in (HF_PREFIX, OPENCLIP_PREFIX))
    fields: dict[str, Any] = dict(final_norm=True)
    if HF_TABLE[0][1] in hf:
        rows, network = HF_TABLE, hf
        fields |= dict(activation="quick_gelu", output_layer=-1)
    elif OPENCLIP_TABLE[0][1] in openclip:
        rows, network = OPENCLIP_TABLE, clip_names.split_projections(openclip)
        fields |= dict(activation="gelu", output_layer=-2)
    else:
        raise UserError(
            f"{where} holds no CLIP text encoder: no tensor is named {HF_PREFIX}{HF_MODEL}"
            f"{HF_TABLE[0][1]} or {OPENCLIP_PREFIX}{OPENCLIP_TABLE[0][1]}"
        )
    fields |= _infer(network, rows, num_heads, where)
    used = {
        name: tensor
        for name, tensor in network.items()
        if (clip_names.layer_of(name) or 0) < _layers_run(fields)
    }
    return Loaded(fields, _to_ours(rows, used, fields, where, dtype))


def to_compvis(fields: Mapping[str, Any], params: Any) -> dict[str, np.ndarray]:
    """Tensors as single files name them, float32: the inverse of `from_compvis`.

    An encoder with the exact GELU is written with OpenCLIP's names. Its readers do not run the
    last layer and expect it nonetheless, so it is a copy of the one before.

    Raises:
      UserError: Stable Diffusion's code cannot be this network.
    """
    make_config(fields)  # the same conditions hold
    if fields["activation"] == "quick_gelu":
        tensors = mapping.to_theirs(_table(HF_TABLE, fields), params)
        return {HF_PREFIX + HF_MODEL + name: tensor for name, tensor in tensors.items()}
    tensors = clip_names.join_projections(mapping.to_theirs(_table(OPENCLIP_TABLE, fields), params))
    last = _layers_run(fields) - 1
    last_name, copy_name = (f"transformer.resblocks.{n}." for n in (last, last + 1))
    copies = {
        copy_name + name.removeprefix(last_name): tensor.copy()
        for name, tensor in tensors.items()
        if name.startswith(last_name)
    }
    return {OPENCLIP_PREFIX + name: tensor for name, tensor in (tensors | copies).items()}


def read_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of our network from a `config.json` of transformers.

    Raises:
      UserError: the config is not of a CLIP text encoder, or of one that ours cannot be.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{where} has model_type {shown(config.get('model_type'))}; CLIP's text encoders have "
            f"{MODEL_TYPE!r}"
        )
    full = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    if full["hidden_act"] not in list(ACTIVATIONS):
        raise UserError(
            f"{where} has hidden_act {shown(full['hidden_act'])}; known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if full["layer_norm_eps"] != DEFAULTS["layer_norm_eps"]:
        raise UserError(
            f"{where} has layer_norm_eps {shown(full['layer_norm_eps'])}, this network has 1e-05"
        )
    sizes = {
        key: folders.positive_integer(full, key, where)
        for key, value in DEFAULTS.items()
        if type(value) is int
    }
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(
            f"{where} has num_attention_heads {sizes['num_attention_heads']}, which do not divide "
            f"hidden_size {sizes['hidden_size']}"
        )
    return dict(
        vocab_size=sizes["vocab_size"],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        max_length=sizes["max_position_embeddings"],
        hidden_width=sizes["intermediate_size"],
        activation=full["hidden_act"],
        output_layer=-1,
        final_norm=True,
    )


def make_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network; it has the layers that are run, as diffusers writes it.

    Raises:
      UserError: `CLIPTextModel` cannot be this network.
    """
    if not fields.get("final_norm", True):
        raise UserError(f"{ARCHITECTURE} has a final norm; it cannot express final_norm=False")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["width"],
        "intermediate_size": fields["hidden_width"],
        "projection_dim": fields["width"],
        "num_hidden_layers": _layers_run(fields),
        "num_attention_heads": fields["num_heads"],
        "max_position_embeddings": fields["max_length"],
        "hidden_act": fields["activation"],
        "layer_norm_eps": DEFAULTS["layer_norm_eps"],
        # CLIP's vocabularies end with them.
        "bos_token_id": fields["vocab_size"] - 2,
        "eos_token_id": fields["vocab_size"] - 1,
        "pad_token_id": 1,
    }


def _layers_run(fields: Mapping[str, Any]) -> int:
    return fields["depth"] + 1 + fields.get("output_layer", -1)


def _beginning_with(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's tensors among those whose names begin with a prefix, without it."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return clip_names.network({name.removeprefix(prefix): found[name] for name in found})


def _infer(
    tensors: Mapping[str, np.ndarray],
    rows: tuple[mapping.Row, ...],
    num_heads: int | None,
    where: str,
) -> dict[str, Any]:
    """Sizes of the network that tensors belong to."""
    table = mapping.expand(rows, [{"layer": 0}])
    needed = ("token_embedding/embedding", "position_embedding", "layer_0_ff_in/dense/kernel")
    names = [table[name].name for name in needed]
    if lacking := [name for name in names if getattr(tensors.get(name), "ndim", 0) != 2]:
        raise UserError(
            f"{where} does not tell the size of its text encoder: the 2-d tensors "
            f"{', '.join(lacking)} are missing"
        )
    (vocab_size, width), (max_length, _), (hidden_width, _) = (
        tensors[name].shape for name in names
    )
    if width % (num_heads or HEAD_DIM):
        divisor = f"{num_heads} heads" if num_heads else f"heads of {HEAD_DIM} channels"
        raise UserError(
            f"{where} has a text encoder of width {width}, which {divisor} do not divide; give "
            f"the num_heads that it was trained with"
        )
    return dict(
        vocab_size=vocab_size,
        width=width,
        depth=1 + max(clip_names.layer_of(name) or 0 for name in tensors),
        num_heads=num_heads or width // HEAD_DIM,
        max_length=max_length,
        hidden_width=hidden_width,
    )


def _table(rows: tuple[mapping.Row, ...], fields: Mapping[str, Any]) -> mapping.Table:
    return mapping.expand(rows, [{"layer": layer} for layer in range(_layers_run(fields))])


def _to_ours(
    rows: tuple[mapping.Row, ...],
    tensors: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    where: str,
    dtype: DTypeLike,
) -> Any:
    shapes.check_network(fields, _layers_run(fields), len(tensors), where)
    network = ClipTextEncoder(**fields)
    return to_ours(network, _table(rows, fields), tensors, fields["max_length"], where, dtype)
