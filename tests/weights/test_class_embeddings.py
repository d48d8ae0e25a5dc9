"""LDM's models of classes: single files in CompVis' layout."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import torch

import latent_diffusion_jax
from latent_diffusion_jax import loading, saving
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.ldm import LatentDiffusion
from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.models.autoencoder import AutoencoderVQ
from latent_diffusion_jax.models.class_embedding import ClassEmbedding
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sampling import Settings
from latent_diffusion_jax.weights import class_embeddings
from tests.torch_networks import draw_params


def test_the_embedding_is_theirs():
    table = torch.nn.Embedding(5, 8)
    tensors = {class_embeddings.NAME: table.weight.detach().numpy()}
    loaded = class_embeddings.from_compvis(tensors, "file")
    labels = np.array([4, 0, 3])
    ours = ClassEmbedding(**loaded.fields).apply({"params": loaded.params}, labels)
    theirs = table(torch.tensor(labels))[:, None].detach().numpy()
    np.testing.assert_array_equal(ours, theirs)
    written = class_embeddings.to_compvis(loaded.params)
    np.testing.assert_array_equal(written[class_embeddings.NAME], tensors[class_embeddings.NAME])


def test_a_damaged_embedding():
    with pytest.raises(UserError, match=r"file: cond_stage_model.* has the shape \(3,\)"):
        class_embeddings.from_compvis({class_embeddings.NAME: np.zeros(3)}, "file")


@pytest.fixture(scope="module", params=[1000, pytest.param(1001, marks=pytest.mark.slow)])
def single_file(request, tmp_path_factory):
    """LDM-4 of ImageNet in miniature: 1,000 classes, and one more in its second version."""
    autoencoder = AutoencoderVQ(channels=32, channel_multipliers=(1, 1), num_res_blocks=1,
                                codebook_size=16)  # fmt: skip
    unet = UNet(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,),
                num_heads=1)  # fmt: skip
    ldm = LatentDiffusion(autoencoder, ClassEmbedding(request.param, 512), unet,
                          make_schedule("scaled_linear", 1000, 0.0015, 0.0195), 16)  # fmt: skip
    latents, context = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 1, 512), np.float32)
    params = {
        "autoencoder": draw_params(autoencoder, np.zeros((1, 16, 16, 3), np.float32)),
        "scale_factor": np.float32(1.0),
        "conditioner": draw_params(ldm.conditioner, np.zeros(1, np.int32), seed=1),
        "unet": draw_params(unet, latents, np.zeros(1), context, seed=2),
    }
    path = tmp_path_factory.mktemp("labels") / "model.safetensors"
    model = Model(ldm, params, None, Settings())
    saving.save_single_file(path, model)
    return request.param, model, path


def test_models_of_classes_in_single_files(single_file):
    count, original, path = single_file
    pipe = latent_diffusion_jax.load(path, num_heads=1)
    assert pipe.ldm.num_labels == count and pipe.tokenizer is None
    for a, b in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(original.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    options = dict(steps=3, height=16, width=16, sampler="ddim", spacing="trailing")
    images = pipe(label=[3, 999], guidance_scale=1.0, seed=[0, 0], **options)
    assert np.abs(images[0].astype(int) - images[1]).max() > 1
    if count == 1001:
        assert pipe.model.null_label == 1000
        guided = pipe(label=[3], guidance_scale=4.0, **options)
        assert np.abs(guided[0].astype(int) - images[0]).max() > 1
        said = r"label 1000 must be in 0\.\.999"
        arguments = {"label": 1000}
    else:
        assert pipe.model.settings.guidance_scale == 1.0
        said, arguments = "no label for guidance", {"label": 3, "guidance_scale": 2.0}
    with pytest.raises(UserError, match=said):
        pipe(**arguments, **options)


def test_names_of_labels_are_kept_in_single_files(single_file, tmp_path):
    count, model, _ = single_file
    names = [f"class {number}" for number in range(1000)]
    named = dataclasses.replace(model, label_names=names)
    saving.save_single_file(tmp_path / "model.safetensors", named)
    found = loading.load_model(tmp_path / "model.safetensors")
    assert found.label_names == names and found.ldm.num_labels == count


def test_labels_that_the_unet_embeds_have_no_single_file(single_file, tmp_path):
    _, model, _ = single_file
    unet = model.ldm.unet.clone(num_classes=3)
    ldm = LatentDiffusion(model.ldm.autoencoder, None, unet, model.ldm.schedule, 16)
    other = Model(ldm, model.params, None, Settings())
    with pytest.raises(UserError, match="embeds labels itself"):
        saving.save_single_file(tmp_path / "model.safetensors", other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", [np.zeros(3), np.zeros((3, 2), int), np.full((3, 2), np.nan)])
def test_embeddings_that_are_none_are_refused(table):
    with pytest.raises(UserError, match=f"a file.*{re.escape(class_embeddings.NAME)}"):
        class_embeddings.from_compvis({class_embeddings.NAME: table}, "a file")
