"""What of a network is kept for the backward pass, and what is computed anew there, to save memory.

A network's parts are wrapped by size: its blocks, its levels (all blocks of one resolution), and
the whole. What is kept, from most memory to least:

  none     everything
  dots     inputs of blocks, and what convolutions and products with weights give: norms,
           activations and attention are computed anew, which costs little
  blocks   inputs of blocks: each one's inside is computed anew
  full     inputs of levels and what skips over them: a level's blocks are computed anew, and
           each one's inside once more
  offload  what the blocks give waits in the host's memory, and their insides are computed anew

On TPUs `offload` takes the options of `runtime.compilation.offload_options`. With it, a step of
Stable Diffusion on latents, with 64 images on each of 16 v5e, has 10.5 GiB of temporaries, and 3.7
in the host's memory; with `blocks` 14.4 (compiled, not run). What a UNet's first blocks give cannot
go early: its last ones need it, and are the first to need it again.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "dots", "blocks", "full", "offload")

_BLOCK = "block"  # name of what a block gives
_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_BLOCK],
    offload_src="device",
    offload_dst="pinned_host",
)


def of_block(module: Any, policy: str) -> Any:
    """A block's class, as the policy wants it.

    Blocks with the same fields and arguments of the same shapes are traced and lowered once, all
    together; the compiler puts them back where they are called.

    Raises:
      ValueError: there is no such policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown remat {policy!r}; known: {', '.join(POLICIES)}")
    if policy != "none":
        module = nn.remat(module, policy=_is_product if policy == "dots" else None)
    return nn.jit(module)


def of_level(function: Any, policy: str) -> Any:
    """A function of the network and arrays that goes through a level, as the policy wants it."""
    return nn.remat(function) if policy == "full" else function


def of_network(function: Any, policy: str) -> Any:
    """A function of the network and arrays that goes through all levels."""
    if policy != "offload":
        return function
    # What `prevent_cse` puts between the passes would need everything back on the device at once.
    # Nothing is computed twice between blocks, which have their own.
    return nn.remat(function, policy=_OFFLOAD, prevent_cse=False)


def named(x: jax.Array) -> jax.Array:
    """What a block, or a layer between blocks, gives: what is kept where insides are not."""
    return checkpoint_name(x, _BLOCK)


def _is_product(primitive: Any, *shapes: Any, **options: Any) -> bool:
    """Attention's products have batch dimensions, and its scores are too many to keep."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *shapes, **options)
