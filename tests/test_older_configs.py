"""Configs of earlier versions: what they lack is what was done without it."""

import copy
import json
import shutil

import pytest
from ml_collections import ConfigDict

from configs import autoencoder_kl, txt2img
from latent_diffusion_jax import build, config_checks, first_stages, loading, older_configs
from latent_diffusion_jax.runtime.commands import flatten
from latent_diffusion_jax.runtime.errors import UserError
from tests.checkpoint_files import rewrite_item

NEW = (
    "accumulation", "precision", "param_dtype", "ema_dtype", "mu_dtype", "nu_dtype", "eps",
    "version", "max_skipped_steps", "keep_every", "keep_best", "grace_seconds", "retry_seconds",
)  # fmt: skip


def of_before(config, remat):
    """A config's JSON as it was written before these keys were there."""
    values = json.loads(config.to_json())

    def strip(section, new):
        return {
            key: strip(value, new) if isinstance(value, dict) else value
            for key, value in section.items()
            if key not in new
        }

    old = strip(values, NEW)
    for section, network in ((old, "unet"), (old.get("first_stage", {}), "autoencoder")):
        if network in section:
            section[network]["remat"] = remat
    if "first_stage" in old:
        old["first_stage"]["accumulation"] = 1  # it had that
    return old


@pytest.mark.parametrize("module", [txt2img, autoencoder_kl], ids=lambda module: module.__name__)
@pytest.mark.parametrize(("remat", "policy"), [(False, "none"), (True, "blocks")])
def test_they_are_read_as_todays(module, remat, policy):
    config = module.get_config("smoke")
    old = of_before(config, remat)
    kept = copy.deepcopy(old)
    found = ConfigDict(older_configs.upgraded(old))
    assert old == kept
    config.first_stage.autoencoder.remat = policy
    if "unet" in config:
        config.unet.remat = policy
    config.max_skipped_steps = 0  # what none were before
    config.data.retry_seconds = 0.0
    assert flatten(found) == flatten(ConfigDict(json.loads(config.to_json())))
    config_checks.check_config(found)
    assert build.autoencoder(found).remat == policy


def test_what_they_say_stays():
    config = txt2img.get_config("smoke")
    config.accumulation, config.first_stage.precision = 4, "highest"
    config.unet.remat, config.first_stage.autoencoder.remat = "full", "offload"
    config.optimizer.nu_dtype = "bfloat16"
    values = json.loads(config.to_json())
    assert older_configs.upgraded(values) == values


@pytest.mark.parametrize("version", [older_configs.VERSION + 1, -1, "1", None, True])
def test_other_versions_are_refused(version):
    values = json.loads(txt2img.get_config("smoke").to_json()) | {"version": version}
    with pytest.raises(UserError, match=f"version {version!r}, and this program knows 0 to"):
        older_configs.upgraded(values)


def test_a_config_file_of_another_version_is_refused():
    config = txt2img.get_config("smoke")
    config.version = older_configs.VERSION + 1
    with pytest.raises(UserError, match="version=2 must be 1"):
        config_checks.check_config(config)


def test_a_checkpoint_of_a_version_that_is_not_known_is_named(trained_workdir, tmp_path):
    shutil.copytree(trained_workdir, tmp_path / "run")
    for stage, opens in (
        ("diffusion", loading.load_model),
        ("first_stage", first_stages.open_first_stage),
    ):
        folder = tmp_path / "run" / stage / "4"
        values = json.loads((folder / "config" / "metadata").read_text())
        for changes, said in (
            ({"version": 99}, "its config has the version 99, and this program knows 0 to"),
            ({"version": 0, "data": 7}, "its config is that of no version"),
        ):
            rewrite_item(folder, "config", values | changes)
            with pytest.raises(UserError, match=rf"cannot use checkpoint .*/{stage}/4: {said}"):
                opens(tmp_path / "run")
