"""Models that a second stage starts from (`init_from`)."""

import jax
import numpy as np
import pytest

from configs import txt2img
from latent_diffusion_jax import loading
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.train import train


def test_training_starts_from_a_model(trained_workdir, data_dir, tmp_path):
    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    config.stages = ("diffusion",)
    config.init_from = config.first_stage.init_from = str(trained_workdir)
    config.optimizer.learning_rate = 0.0
    config.num_steps = 1
    assert train(config, tmp_path / "run")
    ours, theirs = (loading.load_model(path) for path in (tmp_path / "run", trained_workdir))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.tokenizer.files == theirs.tokenizer.files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet.channels": 16}, r"differ in \d+ parameters, such as .*\[\d+.*\(there \["),
        ({"unet.num_res_blocks": 2}, r"missing\)"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_another_network_to_start_from(trained_workdir, data_dir, tmp_path, change, said):
    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    config.stages = ("diffusion",)
    config.init_from = config.first_stage.init_from = str(trained_workdir)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_single_files_are_no_starting_point(trained_workdir, data_dir, tmp_path):
    config = txt2img.get_config("smoke")
    config.data.data_dir = data_dir
    (tmp_path / "model.safetensors").write_bytes(b"")
    config.init_from = str(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is a single file; .*convert --part=model"):
        train(config, tmp_path / "run")
