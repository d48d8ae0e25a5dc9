"""Stable Diffusion's UNets in full size against `diffusers`: `pytest -m slow`."""

import gc
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.weights import unets
from tests.torch_networks import nchw, nhwc

CONFIGS = {
    "1.5": dict(cross_attention_dim=768, attention_head_dim=8),
    "2.1": dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("1.5", 64), ("2.1", 32)])
def test_values_equal_diffusers(name, size, tmp_path):
    """Its own random weights, through a folder that it saved."""
    torch.manual_seed(0)
    reference = UNet2DConditionModel(sample_size=size, **CONFIGS[name])
    reference.save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    z_t = rng.normal(size=(1, size, size, 4)).astype(np.float32)
    context = rng.normal(size=(1, 77, CONFIGS[name]["cross_attention_dim"])).astype(np.float32)
    t = np.array([481])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            expected = nhwc(
                reference(nchw(z_t).float(), torch.tensor(t), torch.tensor(context)).sample
            )
    finally:
        torch.set_num_threads(threads)
    del reference
    gc.collect()
    loaded = unets.load(tmp_path)
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep
    assert (loaded.in_channels, loaded.context_dim) == (4, context.shape[-1])
    apply = jax.jit(
        UNet(**loaded.fields).apply, compiler_options={"xla_backend_optimization_level": 2}
    )
    ours = np.asarray(apply({"params": loaded.params}, z_t, t, context))
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"Stable Diffusion {name}: relative error {error:.1e}")
    assert error < 1e-4
