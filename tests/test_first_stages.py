"""First stages from elsewhere: opened, finetuned, and put under a second stage."""

import shutil

import jax
import numpy as np
import pytest

from configs import autoencoder_vq, txt2img
from latent_diffusion_jax import build, first_stages, pipelines
from latent_diffusion_jax.runtime import checkpoints
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.train import train
from latent_diffusion_jax.weights import autoencoders


@pytest.fixture(scope="module")
def diffusers_folder(trained_workdir, tmp_path_factory):
    """The smoke config's first stage in diffusers' format, with a scaling factor of its own."""
    found = first_stages.open_first_stage(trained_workdir)
    folder = tmp_path_factory.mktemp("exported") / "vae"
    autoencoders.save_diffusers(folder, found.kind, found.fields, found.params, 0.25)
    return folder


def assert_same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def different_parts(a, b):
    """Names of an autoencoder's parts in which any number differs."""
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return {part for part in same if not jax.tree.all(same[part])}


def test_a_workdir_and_its_export_are_the_same_network(trained_workdir, diffusers_folder):
    ours = first_stages.open_first_stage(trained_workdir)
    theirs = first_stages.open_first_stage(diffusers_folder)
    assert ours.kind == theirs.kind == "kl" and theirs.config is None
    assert theirs.scale_factor == 0.25 and 0.01 < ours.scale_factor < 100
    assert_same_params(ours.params, theirs.params)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    images = [f.network.apply({"params": f.params}, x) for f in (ours, theirs)]
    np.testing.assert_array_equal(*images)


def test_only_the_decoder_is_finetuned(trained_workdir, diffusers_folder, smoke_config, tmp_path):
    config = smoke_config
    config.stages = ("first_stage",)
    config.first_stage.init_from = str(diffusers_folder)
    config.first_stage.trained = "decoder"
    config.first_stage.ema_decay = 0.5
    asked = iter(range(100))
    assert not train(config, tmp_path, lambda: next(asked) >= 2)
    shutil.move(diffusers_folder, tmp_path / "away")  # it has what it needs of that
    config.first_stage.init_from = str(tmp_path / "away")
    assert train(config, tmp_path)
    shutil.move(tmp_path / "away", diffusers_folder)
    before = first_stages.open_first_stage(diffusers_folder)
    after = first_stages.open_first_stage(tmp_path)
    assert different_parts(before.params, after.params) == {"decoder", "post_quant_conv"}
    assert after.scale_factor == 0.25  # the latents are the same, and so is their scale
    # What is opened is the moving average, which is not what the last step left.
    last = checkpoints.restore_part(
        tmp_path / "first_stage",
        4,
        {"params": {"autoencoder": jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding), after.params)}},
    )["params"]["autoencoder"]  # fmt: skip
    assert "decoder" in different_parts(last, after.params)


@pytest.mark.slow  # one from a workdir is in test_clip_conditioning.py
def test_a_second_stage_on_a_first_from_elsewhere(diffusers_folder, smoke_config, tmp_path):
    config = smoke_config
    config.stages = ("diffusion",)
    config.first_stage.init_from = str(diffusers_folder)
    assert train(config, tmp_path)
    adopted = first_stages.open_first_stage(tmp_path)
    assert adopted.scale_factor == 0.25
    assert_same_params(adopted.params, first_stages.open_first_stage(diffusers_folder).params)
    images = pipelines.load(tmp_path)(["a handwritten two"], steps=2)
    assert images.shape == (1, 32, 32, 3)
    assert train(config, tmp_path)  # complete: nothing to do


@pytest.mark.slow
def test_the_scale_is_measured_where_a_file_does_not_say(smoke_config, tmp_path):
    config = smoke_config
    section = config.first_stage.autoencoder
    section.channels = section.num_groups = 32  # CompVis' code has no other number of groups
    network = build.autoencoder(config)
    params = network.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    file = tmp_path / "first_stage.safetensors"
    autoencoders.save_compvis(file, "kl", build.network_fields(section), params)
    assert first_stages.open_first_stage(file).scale_factor is None
    config.stages = ("diffusion",)
    config.first_stage.init_from = str(file)
    assert train(config, tmp_path / "run")
    found = first_stages.open_first_stage(tmp_path / "run")
    source, prepare = build.data_sources(config)[0], build.example_maker(config)
    images = to_float(np.stack([prepare(source[i], None)["image"] for i in range(32)]))
    z = network.apply({"params": params}, images, method="encode").mean
    np.testing.assert_allclose(found.scale_factor * np.asarray(z).std(), 1.0, rtol=1e-4)


@pytest.mark.slow
def test_a_vq_first_stage_under_a_second(data_dir, tmp_path):
    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    vq = autoencoder_vq.get_config("smoke").first_stage
    config.first_stage = vq
    assert train(config, tmp_path)
    assert pipelines.load(tmp_path)(["a handwritten two"], steps=2).shape == (1, 32, 32, 3)
    found = first_stages.open_first_stage(tmp_path)
    assert found.kind == "vq" and found.params["quantizer"]["codebook"].shape == (64, 3)


def test_another_network_is_refused(diffusers_folder, smoke_config, tmp_path):
    config = smoke_config
    config.first_stage.init_from = str(diffusers_folder)
    config.first_stage.autoencoder.num_res_blocks = 3
    config.first_stage.autoencoder.channels = 16
    with pytest.raises(UserError, match=r"autoencoder\.channels=16 \(there 8\), .*blocks=3") as e:
        train(config, tmp_path / "run")
    assert str(diffusers_folder) in str(e.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"first stage .*nowhere does not exist"):
        first_stages.open_first_stage(tmp_path / "nowhere")


def test_an_incomplete_first_stage_is_not_built_upon(smoke_config, tmp_path):
    with pytest.raises(UserError, match="no complete first stage"):
        first_stages.load_frozen(smoke_config, tmp_path, None)
