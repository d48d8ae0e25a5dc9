"""Names of a CLIP text encoder's tensors in transformers and in OpenCLIP."""

import re
from collections.abc import Mapping

import numpy as np

from latent_diffusion_jax.weights.shapes import NUMBER

# Begins transformers' names, but for those that some releases of its version 5 wrote.
HF_MODEL = "text_model."
# Beside the network: constants, and what compares texts with images.
_IGNORED = re.compile(r"(.*\.)?position_ids|text_projection(\.weight)?|logit_scale|attn_mask")

HF_TABLE = (
    ("token_embedding/embedding", "embeddings.token_embedding.weight", "same"),
    ("position_embedding", "embeddings.position_embedding.weight", "same"),
    ("layer_{layer}_norm1", "encoder.layers.{layer}.layer_norm1", "norm"),
    ("layer_{layer}_attention/to_q", "encoder.layers.{layer}.self_attn.q_proj", "dense"),
    ("layer_{layer}_attention/to_k", "encoder.layers.{layer}.self_attn.k_proj", "dense"),
    ("layer_{layer}_attention/to_v", "encoder.layers.{layer}.self_attn.v_proj", "dense"),
    ("layer_{layer}_attention/to_out", "encoder.layers.{layer}.self_attn.out_proj", "dense"),
    ("layer_{layer}_norm2", "encoder.layers.{layer}.layer_norm2", "norm"),
    ("layer_{layer}_ff_in", "encoder.layers.{layer}.mlp.fc1", "dense"),
    ("layer_{layer}_ff_out", "encoder.layers.{layer}.mlp.fc2", "dense"),
    ("norm_out", "final_layer_norm", "norm"),
)
# With `attn.in_proj_{weight,bias}` cut into three, see `split_projections`.
OPENCLIP_TABLE = (
    ("token_embedding/embedding", "token_embedding.weight", "same"),
    ("position_embedding", "positional_embedding", "same"),
    ("layer_{layer}_norm1", "transformer.resblocks.{layer}.ln_1", "norm"),
    ("layer_{layer}_attention/to_q", "transformer.resblocks.{layer}.attn.q", "dense"),
    ("layer_{layer}_attention/to_k", "transformer.resblocks.{layer}.attn.k", "dense"),
    ("layer_{layer}_attention/to_v", "transformer.resblocks.{layer}.attn.v", "dense"),
    ("layer_{layer}_attention/to_out", "transformer.resblocks.{layer}.attn.out_proj", "dense"),
    ("layer_{layer}_norm2", "transformer.resblocks.{layer}.ln_2", "norm"),
    ("layer_{layer}_ff_in", "transformer.resblocks.{layer}.mlp.c_fc", "dense"),
    ("layer_{layer}_ff_out", "transformer.resblocks.{layer}.mlp.c_proj", "dense"),
    ("norm_out", "ln_final", "norm"),
)
_LAYER = re.compile(rf"(?:encoder\.layers|transformer\.resblocks)\.{NUMBER}\.")


def network(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the network alone, without transformers' prefix."""
    names = {name: name.removeprefix(HF_MODEL) for name in tensors}
    return {plain: tensors[name] for name, plain in names.items() if not _IGNORED.fullmatch(plain)}


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name in either format."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def split_projections(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OpenCLIP's `attn.in_proj_weight` [3 D, D] as `attn.q.weight` [D, D] etc.; biases likewise."""
    split = {}
    for name, tensor in tensors.items():
        layer, found, kind = name.partition(".attn.in_proj_")
        if found and tensor.ndim and tensor.shape[0] % 3 == 0:
            for part, piece in zip("qkv", np.split(tensor, 3), strict=True):
                split[f"{layer}.attn.{part}.{kind}"] = piece
        else:
            split[name] = tensor
    return split


def join_projections(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split_projections`."""
    joined = {}
    for name, tensor in tensors.items():
        layer, found, kind = name.partition(".attn.q.")
        if found:
            parts = [tensors[f"{layer}.attn.{part}.{kind}"] for part in "qkv"]
            joined[f"{layer}.attn.in_proj_{kind}"] = np.concatenate(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = tensor
    return joined
