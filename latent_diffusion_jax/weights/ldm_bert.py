"""The text encoder of LDM's text-to-image models, in the formats of diffusers and CompVis' code.

The parameters are those of `models.text_transformer.TextTransformer`. Diffusers calls the class
`LDMBertModel` and keeps it in the folder `bert/` of a pipeline.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from latent_diffusion_jax.models.text_transformer import TextTransformer
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import files, folders, mapping, shapes
from latent_diffusion_jax.weights.messages import shown
from latent_diffusion_jax.weights.text_encoders import Loaded, to_ours

MODEL_TYPE, ARCHITECTURE = "ldmbert", "LDMBertModel"
WEIGHTS_FILE = "model.safetensors"  # the one that is written
WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin", "model.fp16.safetensors")
PREFIX = "cond_stage_model.transformer."  # in CompVis' files
NUM_HEADS = 8  # fixed in CompVis' code
LOGITS = "to_logits"  # in both formats, and never used

# Values that diffusers assumes where a config does not say.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "d_model": 1280,
}
# What their network can be beyond ours, with the one value that ours has.
FIXED: dict[str, Any] = {"activation_function": "gelu", "scale_embedding": False}

_LAYER = "model.layers.{layer}"
DIFFUSERS_TABLE = (
    ("token_embedding/embedding", "model.embed_tokens.weight", "same"),
    ("position_embedding", "model.embed_positions.weight", "same"),
    ("layer_{layer}_norm1", _LAYER + ".self_attn_layer_norm", "norm"),
    ("layer_{layer}_attention/to_q", _LAYER + ".self_attn.q_proj", "dense"),
    ("layer_{layer}_attention/to_k", _LAYER + ".self_attn.k_proj", "dense"),
    ("layer_{layer}_attention/to_v", _LAYER + ".self_attn.v_proj", "dense"),
    ("layer_{layer}_attention/to_out", _LAYER + ".self_attn.out_proj", "dense"),
    ("layer_{layer}_norm2", _LAYER + ".final_layer_norm", "norm"),
    ("layer_{layer}_ff_in", _LAYER + ".fc1", "dense"),
    ("layer_{layer}_ff_out", _LAYER + ".fc2", "dense"),
    ("norm_out", "model.layer_norm", "norm"),
)
# x-transformers counts attention and feed-forward as layers of their own.
_ATTENTION, _FEED_FORWARD = "attn_layers.layers.{even}", "attn_layers.layers.{odd}"
COMPVIS_TABLE = (
    ("token_embedding/embedding", "token_emb.weight", "same"),
    ("position_embedding", "pos_emb.emb.weight", "same"),
    ("layer_{layer}_norm1", _ATTENTION + ".0", "norm"),
    ("layer_{layer}_attention/to_q", _ATTENTION + ".1.to_q", "dense"),
    ("layer_{layer}_attention/to_k", _ATTENTION + ".1.to_k", "dense"),
    ("layer_{layer}_attention/to_v", _ATTENTION + ".1.to_v", "dense"),
    ("layer_{layer}_attention/to_out", _ATTENTION + ".1.to_out", "dense"),
    ("layer_{layer}_norm2", _FEED_FORWARD + ".0", "norm"),
    ("layer_{layer}_ff_in", _FEED_FORWARD + ".1.net.0.0", "dense"),
    ("layer_{layer}_ff_out", _FEED_FORWARD + ".1.net.2", "dense"),
    ("norm_out", "norm", "norm"),
)


def load(folder: str | pathlib.Path, dtype: DTypeLike = np.float32) -> Loaded:
    """Reads a folder of diffusers' `LDMBertModel`.

    Args:
      folder: of the model.
      dtype: of the parameters.

    Raises:
      UserError: there is no such folder, or it is of a network that `TextTransformer` cannot be,
        or its tensors are not all there.
    """
    folder = pathlib.Path(folder).expanduser()
    fields = read_config(folders.read_config(folder), str(folder / folders.CONFIG_FILE))
    tensors, path = folders.read_tensors(folder, WEIGHTS_FILES)
    return Loaded(fields, _to_ours(DIFFUSERS_TABLE, tensors, fields, str(path), dtype))


def save_diffusers(folder: str | pathlib.Path, fields: Mapping[str, Any], params: Any) -> None:
    """Writes a folder that diffusers' `LDMBertModel.from_pretrained` loads.

    The layer to logits, which nothing uses, is written as zeros.

    Args:
      folder: is made; files of the same names in it are replaced.
      fields: of the network, as in `Loaded`.
      params: of the network.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    tensors = mapping.to_theirs(_table(DIFFUSERS_TABLE, fields), params)
    files.write(folder / WEIGHTS_FILE, tensors | _logits(fields), {"format": "pt"})
    folders.write_config(folder, make_config(fields))


def from_compvis(
    tensors: Mapping[str, np.ndarray],
    where: str,
    num_heads: int = NUM_HEADS,
    dtype: DTypeLike = np.float32,
) -> Loaded:
    """The text encoder among the tensors of a CompVis checkpoint.

    Args:
      tensors: of the whole file; others are passed over.
      where: they come from, for the message.
      num_heads: which the file does not say.
      dtype: of the parameters.

    Raises:
      UserError: there is no such text encoder, or its tensors are not all there.
    """
    network = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    fields = _infer(network, num_heads, where)
    return Loaded(fields, _to_ours(COMPVIS_TABLE, network, fields, where, dtype))


def to_compvis(fields: Mapping[str, Any], params: Any) -> dict[str, np.ndarray]:
    """Tensors as CompVis' checkpoints name them, float32; the layer to logits is zeros."""
    tensors = mapping.to_theirs(_table(COMPVIS_TABLE, fields), params) | _logits(fields)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def read_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of our network from a `config.json` of diffusers.

    Raises:
      UserError: the config is not of an `LDMBertModel`, or of one that ours cannot be.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{where} has model_type {shown(config.get('model_type'))}; {ARCHITECTURE} has "
            f"{MODEL_TYPE!r}"
        )
    for key, value in FIXED.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{where} has {key} {shown(config[key])}, this network has {value!r}")
    full = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    sizes = {key: folders.positive_integer(full, key, where) for key in DEFAULTS}
    if sizes["encoder_ffn_dim"] != 4 * sizes["d_model"]:
        raise UserError(
            f"{where} has encoder_ffn_dim {sizes['encoder_ffn_dim']}, this network four times "
            f"d_model {sizes['d_model']}"
        )
    return dict(
        vocab_size=sizes["vocab_size"],
        max_length=sizes["max_position_embeddings"],
        width=sizes["d_model"],
        depth=sizes["encoder_layers"],
        num_heads=sizes["encoder_attention_heads"],
        head_dim=sizes["head_dim"],
    )


def make_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": fields["vocab_size"],
        "max_position_embeddings": fields["max_length"],
        "encoder_layers": fields["depth"],
        "encoder_ffn_dim": 4 * fields["width"],
        "encoder_attention_heads": fields["num_heads"],
        "head_dim": fields["head_dim"],
        "d_model": fields["width"],
        "pad_token_id": 0,
        **FIXED,
    }


def _logits(fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    vocab_size, width = fields["vocab_size"], fields["width"]
    return {
        f"{LOGITS}.weight": np.zeros((vocab_size, width), np.float32),
        f"{LOGITS}.bias": np.zeros(vocab_size, np.float32),
    }


def _infer(tensors: Mapping[str, np.ndarray], num_heads: int, where: str) -> dict[str, Any]:
    """Sizes of the network that tensors under CompVis' names, without prefix, belong to."""
    needed = ("token_emb.weight", "pos_emb.emb.weight", "attn_layers.layers.0.1.to_q.weight")
    if lacking := [name for name in needed if getattr(tensors.get(name), "ndim", 0) != 2]:
        raise UserError(
            f"{where} holds no text encoder of LDM: the 2-d tensors "
            f"{', '.join(PREFIX + name for name in lacking)} are missing"
        )
    (vocab_size, width), (max_length, _), (inner, _) = (tensors[name].shape for name in needed)
    if num_heads < 1 or inner % num_heads:
        raise UserError(f"{where} has attention of width {inner}, which {num_heads} heads do not "
                        f"divide; give the num_heads that it was trained with")  # fmt: skip
    layers = [
        int(match[1])
        for name in tensors
        if (match := re.match(rf"attn_layers\.layers\.{shapes.NUMBER}\.", name))
    ]
    return dict(
        vocab_size=vocab_size,
        max_length=max_length,
        width=width,
        depth=max(layers) // 2 + 1,
        num_heads=num_heads,
        head_dim=inner // num_heads,
    )


def _table(rows: tuple[mapping.Row, ...], fields: Mapping[str, Any]) -> mapping.Table:
    return mapping.expand(
        rows,
        [
            {"layer": layer, "even": 2 * layer, "odd": 2 * layer + 1}
            for layer in range(fields["depth"])
        ],
    )


def _to_ours(
    rows: tuple[mapping.Row, ...],
    tensors: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    where: str,
    dtype: DTypeLike,
) -> Any:
    shapes.check_network(fields, fields["depth"], len(tensors), where)
    network = TextTransformer(**fields)
    used = {name: x for name, x in tensors.items() if not name.startswith(LOGITS + ".")}
    return to_ours(network, _table(rows, fields), used, fields["max_length"], where, dtype)
