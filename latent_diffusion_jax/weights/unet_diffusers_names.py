"""Names of the tensors of diffusers' UNets."""

from latent_diffusion_jax.weights.diffusers import ATTENTION
from latent_diffusion_jax.weights.mapping import Row
from latent_diffusion_jax.weights.unet_common import transformer_rows

_RES_BLOCK = (
    ("norm_in", "norm1", "norm"),
    ("conv_in", "conv1", "conv"),
    ("embedding", "time_emb_proj", "dense"),
    ("norm_out", "norm2", "norm"),
    ("conv_out", "conv2", "conv"),
    ("shortcut", "conv_shortcut", "conv"),
)


def rows(linear_projections: bool) -> tuple[Row, ...]:
    """The table of a UNet."""
    transformer = transformer_rows(linear_projections)
    return (
        ("time_embed_0", "time_embedding.linear_1", "dense"),
        ("time_embed_1", "time_embedding.linear_2", "dense"),
        ("label_embed/embedding", "class_embedding.weight", "same"),
        ("vector_embed_0", "class_embedding.linear_1", "dense"),
        ("vector_embed_1", "class_embedding.linear_2", "dense"),
        ("conv_in", "conv_in", "conv"),
        ("down_{level}_{block}_res", "down_blocks.{level}.resnets.{block}", _RES_BLOCK),
        (
            "down_{level}_{block}_transformer",
            "down_blocks.{level}.attentions.{block}",
            transformer,
        ),
        ("down_{level}_{block}_attention", "down_blocks.{level}.attentions.{block}", ATTENTION),
        ("down_{level}_downsample", "down_blocks.{level}.downsamplers.0.conv", "conv"),
        ("down_{level}_downsample", "down_blocks.{level}.downsamplers.0", _RES_BLOCK),
        ("mid_0_res", "mid_block.resnets.0", _RES_BLOCK),
        ("mid_0_transformer", "mid_block.attentions.0", transformer),
        ("mid_0_attention", "mid_block.attentions.0", ATTENTION),
        ("mid_1_res", "mid_block.resnets.1", _RES_BLOCK),
        ("up_{level}_{block}_res", "up_blocks.{up}.resnets.{block}", _RES_BLOCK),
        ("up_{level}_{block}_transformer", "up_blocks.{up}.attentions.{block}", transformer),
        ("up_{level}_{block}_attention", "up_blocks.{up}.attentions.{block}", ATTENTION),
        ("up_{level}_upsample", "up_blocks.{up}.upsamplers.0.conv", "conv"),
        ("up_{level}_upsample", "up_blocks.{up}.upsamplers.0", _RES_BLOCK),
        ("norm_out", "conv_norm_out", "norm"),
        ("conv_out", "conv_out", "conv"),
    )
