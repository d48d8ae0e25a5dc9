"""Sizes in others' configs and tensors' names: what asks for far too much is refused, at once."""

import json
import time

import jax
import numpy as np
import pytest

from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import (
    autoencoders,
    clip_text,
    files,
    folders,
    ldm_bert,
    shapes,
    unets,
)

SECONDS = 20.0  # that a refusal may take on a busy machine; without a bound it is hours
UNET = dict(
    _class_name="UNet2DConditionModel", block_out_channels=[32], attention_head_dim=8,
    down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
    cross_attention_dim=16,
)  # fmt: skip
VAE = dict(_class_name="AutoencoderKL", block_out_channels=[32])
CLIP = dict(model_type="clip_text_model", num_hidden_layers=1)
BERT = dict(model_type="ldmbert", encoder_layers=1)


def levels(count: int, down: str, up: str) -> dict:
    return dict(
        block_out_channels=[32] * count,
        down_block_types=[down] * count,
        up_block_types=[up] * count,
    )


UNET_LEVELS = ("DownBlock2D", "UpBlock2D")
VAE_LEVELS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
CONFIGS = [
    (unets.load, UNET | dict(in_channels=10**9), "in_channels [1000000000]; at most 1048576"),
    (unets.load, UNET | dict(in_channels=10**30), "in_channels [1"),
    (unets.load, UNET | dict(cross_attention_dim=10**12), "cross_attention_dim"),
    (unets.load, UNET | dict(transformer_layers_per_block=10**6), "3000002 blocks of layers"),
    (unets.load, UNET | dict(transformer_layers_per_block=99), "299 blocks of layers and has 9"),
    (unets.load, UNET | dict(layers_per_block=10**7), "layers_per_block"),
    (unets.load, UNET | dict(layers_per_block=10**5), "200001 blocks of layers; at most 1024"),
    (unets.load, UNET | dict(norm_eps=10**400), "norm_eps 1"),
    (unets.load, UNET | dict(norm_eps=float("nan")), "norm_eps nan; it must be a number from 0"),
    (unets.load, UNET | dict(use_linear_projection="false"), "use_linear_projection 'false'"),
    (unets.load, UNET | dict(norm_num_groups=2**20), "1048576 groups do not divide"),
    (unets.load, UNET | levels(3, *UNET_LEVELS), "missing"),
    (unets.load, UNET | levels(14, *UNET_LEVELS), "29 blocks of layers and has 9 tensors"),
    (unets.load, UNET | levels(70, *UNET_LEVELS), "70 entries of block_out_channels; at most 16"),
    (unets.load, dict(_class_name="x" * 3_000_000), "over 5000 characters for '_class_name'"),
    (autoencoders.load, VAE | dict(in_channels=10**9, out_channels=10**9), "in_channels"),
    (autoencoders.load, VAE | dict(in_channels=10**12, out_channels=10**12), "in_channels"),
    (autoencoders.load, VAE | dict(latent_channels=10**20), "latent_channels"),
    (autoencoders.load, VAE | dict(latent_channels=2**20), "missing"),
    (autoencoders.load, VAE | dict(layers_per_block=10**7), "layers_per_block"),
    (autoencoders.load, VAE | dict(layers_per_block=10**6), "1000000 blocks of layers"),
    (autoencoders.load, VAE | dict(scaling_factor=10**400), "scaling_factor"),
    (autoencoders.load, VAE | levels(9, *VAE_LEVELS), "missing"),
    (autoencoders.load, VAE | levels(14, *VAE_LEVELS), "14 blocks of layers and has 9 tensors"),
    (autoencoders.load, VAE | levels(70, *VAE_LEVELS), "70 entries of block_out_channels"),
    (clip_text.load, CLIP | dict(num_hidden_layers=10**7), "num_hidden_layers"),
    (clip_text.load, CLIP | dict(num_hidden_layers=10**6), "1000000 blocks of layers"),
    (clip_text.load, CLIP | dict(max_position_embeddings=5 * 10**8), "max_position_embeddings"),
    (clip_text.load, CLIP | dict(max_position_embeddings=2**20), "missing"),
    (clip_text.load, CLIP | dict(vocab_size=10**30), "vocab_size"),
    (clip_text.load, CLIP | dict(hidden_act=["gelu"]), "hidden_act ['gelu']; known are quick_gelu"),
    (ldm_bert.load, BERT | dict(encoder_layers=10**6), "1000000 blocks of layers"),
    (ldm_bert.load, BERT | dict(max_position_embeddings=2**20), "missing"),
    (ldm_bert.load, BERT | dict(head_dim=10**15), "head_dim"),
]  # fmt: skip


def refused(call, *arguments) -> str:
    """The message of a refusal, which comes soon."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert time.monotonic() - start < SECONDS
    assert "\n" not in str(error.value) and len(str(error.value)) < 10_000
    return str(error.value)


@pytest.mark.parametrize("case", range(len(CONFIGS)))
def test_configs_that_ask_for_too_much_are_refused(case, tmp_path):
    load, config, part = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    few = {f"t{i}": np.zeros(1, np.float32) for i in range(9)}
    for name in (folders.DIFFUSERS_FILE, clip_text.WEIGHTS_FILE):
        files.write(tmp_path / name, few)
    message = refused(load, tmp_path)
    assert part in message and str(tmp_path) in message


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


UNET_TENSORS = {
    "input_blocks.0.0.weight": zeros(32, 4, 3, 3),
    "input_blocks.1.0.out_layers.3.weight": zeros(32, 32, 3, 3),
    "output_blocks.0.0.x": zeros(1),
    "output_blocks.1.0.x": zeros(1),
    "out.2.weight": zeros(4, 32, 3, 3),
}
VAE_TENSORS = {
    "encoder.conv_in.weight": zeros(32, 3, 3, 3),
    "decoder.conv_in.weight": zeros(32, 4, 3, 3),
    "post_quant_conv.weight": zeros(4, 4, 1, 1),
    "encoder.down.0.block.0.conv1.weight": zeros(32, 32, 3, 3),
}
TEXT = "cond_stage_model.transformer."
CLIP_TENSORS = {
    f"{TEXT}text_model.embeddings.token_embedding.weight": zeros(100, 64),
    f"{TEXT}text_model.embeddings.position_embedding.weight": zeros(77, 64),
    f"{TEXT}text_model.encoder.layers.0.mlp.fc1.weight": zeros(256, 64),
}
BERT_TENSORS = {
    f"{TEXT}token_emb.weight": zeros(100, 64),
    f"{TEXT}pos_emb.emb.weight": zeros(77, 64),
    f"{TEXT}attn_layers.layers.0.1.to_q.weight": zeros(64, 64),
}
NAMES = [
    (unets.from_compvis, UNET_TENSORS, "input_blocks.%s.x"),
    (unets.from_compvis, UNET_TENSORS, "output_blocks.%s.1.conv.x"),
    (unets.from_compvis, UNET_TENSORS, "input_blocks.%s.1.qkv.weight"),
    (unets.from_compvis, UNET_TENSORS, "middle_block.1.transformer_blocks.%s.x"),
    (autoencoders.from_compvis, VAE_TENSORS, "encoder.down.0.block.%s.x"),
    (autoencoders.from_compvis, VAE_TENSORS, "encoder.down.%s.block.0.conv1.weight"),
    (autoencoders.from_compvis, VAE_TENSORS, "decoder.up.0.attn.%s.x"),
    (clip_text.from_compvis, CLIP_TENSORS, f"{TEXT}text_model.encoder.layers.%s.x"),
    (ldm_bert.from_compvis, BERT_TENSORS, f"{TEXT}attn_layers.layers.%s.x"),
]


@pytest.mark.parametrize("digits", ["9999", "200000", "100000000", "9" * 5000])
@pytest.mark.parametrize("case", range(len(NAMES)))
def test_numbers_in_names_are_no_sizes_to_trust(case, digits):
    read, tensors, name = NAMES[case]
    assert "a file" in refused(read, tensors | {name % digits: zeros(1)}, "a file")


@pytest.mark.parametrize(
    ("read", "tensors", "name"),
    [
        (unets.from_compvis, UNET_TENSORS, "input_blocks.0.0.weight"),
        (autoencoders.from_compvis, VAE_TENSORS, "encoder.conv_in.weight"),
    ],
)
def test_tensors_that_tell_sizes_and_are_empty_are_refused(read, tensors, name):
    for shape in ((0, 4, 3, 3), (2**40, 4, 0, 3)):  # which takes no byte of a file
        message = refused(read, tensors | {name: zeros(*shape)}, "a file")
        assert f"a file has {name} of shape {shape}, which is empty" in message


def test_sizes_of_tensors_are_bounded():
    name = f"{TEXT}text_model.embeddings.token_embedding.weight"
    tensors = CLIP_TENSORS | {name: np.broadcast_to(np.float16(0), (2**40, 64))}
    assert "vocab_size" in refused(clip_text.from_compvis, tensors, "a file")


def test_what_the_network_raises_is_one_line():
    network = ClipTextEncoder(vocab_size=5, width=6, depth=1, num_heads=0)
    tokens = jax.ShapeDtypeStruct((1, 77), np.int32)
    with pytest.raises(UserError, match=r"^the text encoder of x: "):
        shapes.of(network, "the text encoder of x", tokens)
