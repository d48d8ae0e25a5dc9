"""Schedulers' configs of diffusers, read and written."""

import json

import diffusers
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.weights import schedulers


def config_of(name, **options):
    """As it stands in a file."""
    return json.loads(getattr(diffusers, name)(**options).to_json_string())


@pytest.mark.parametrize("name", sorted(schedulers.CLASSES))
def test_defaults_are_those_of_the_class(name):
    scheduler = getattr(diffusers, name)()
    for config in (config_of(name), {"_class_name": name}):  # all values, and none
        loaded = schedulers.read_config(config, "here")
        np.testing.assert_allclose(
            loaded.schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-6
        )
        assert loaded.prediction_type == "epsilon"
        assert loaded.settings["sampler"] == schedulers.CLASSES[name]
        clips = getattr(scheduler.config, "clip_sample", False)
        assert loaded.settings.get("clip", 0.0) == (1.0 if clips else 0.0)
        to_one = getattr(scheduler.config, "set_alpha_to_one", True)
        assert loaded.settings["final"] == ("zero" if to_one else "first")


@pytest.mark.parametrize(
    ("theirs", "ours"), [("epsilon", "epsilon"), ("sample", "z_0"), ("v_prediction", "v")]
)
def test_values_are_taken_over(theirs, ours):
    config = config_of(
        "EulerDiscreteScheduler",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=theirs,
        timestep_spacing="trailing",
        steps_offset=1,
        use_karras_sigmas=True,
    )
    loaded = schedulers.read_config(config, "here")
    assert loaded.prediction_type == ours
    assert loaded.settings == {
        "sampler": "euler", "spacing": "trailing", "offset": 1, "sigmas": "karras", "final": "zero",
    }  # fmt: skip
    np.testing.assert_allclose(
        loaded.schedule.alphas_cumprod,
        make_schedule("scaled_linear", 1000, 0.00085, 0.012).alphas_cumprod,
    )


def test_variances_solvers_and_betas_are_taken_over():
    for theirs, ours in (("fixed_large", "beta"), ("learned_range", "learned")):
        config = config_of("DDPMScheduler", variance_type=theirs, clip_sample_range=2.0)
        loaded = schedulers.read_config(config, "here")
        assert loaded.settings["variance"] == ours and loaded.settings["clip"] == 2.0
    config = config_of("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    assert schedulers.read_config(config, "here").settings["sampler"] == "dpm++_2m_sde"
    betas = [0.1, 0.2, 0.3]
    config = config_of("DDIMScheduler", trained_betas=betas, num_train_timesteps=3)
    found = schedulers.read_config(config, "here").schedule
    np.testing.assert_allclose(found.betas, betas)
    config = config_of("DDIMScheduler", rescale_betas_zero_snr=True)
    assert schedulers.read_config(config, "here").schedule.alphas_cumprod[-1] == 0.0


def test_what_nobody_chose_is_left_to_the_sampler():
    config = config_of("PNDMScheduler", steps_offset=1)
    config["_use_default_values"] = ["timestep_spacing"]
    assert schedulers.read_config(config, "here").settings["spacing"] == ""


@pytest.mark.parametrize("prediction_type", ["epsilon", "z_0", "v"])
@pytest.mark.parametrize("sampler", [*schedulers.CLASSES.values(), "dpm++_2m_sde"])
def test_written_configs_load_in_diffusers_and_here(prediction_type, sampler):
    schedule = make_schedule("cosine", 50, 0.1, 0.2)
    settings = {"sampler": sampler, "spacing": "trailing", "offset": 1, "sigmas": "schedule",
                "final": "zero", "clip": 1.5, "epsilon_of_clipped": False}  # fmt: skip
    config = json.loads(json.dumps(schedulers.make_config(schedule, prediction_type, settings)))
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    np.testing.assert_allclose(theirs.alphas_cumprod, schedule.alphas_cumprod, atol=1e-6)
    loaded = schedulers.read_config(config, "here")
    np.testing.assert_allclose(loaded.schedule.alphas_cumprod, schedule.alphas_cumprod)
    assert loaded.prediction_type == prediction_type
    assert {**loaded.settings, "variance": ""} == {**settings, "variance": ""}


def test_what_is_not_here_is_refused():
    for changes, message in (
        ({"beta_schedule": "exp"}, "here has beta_schedule 'exp'; known are linear"),
        ({"prediction_type": "flow"}, "here has prediction_type 'flow'"),
        ({"thresholding": True}, "here has thresholding, which is not supported"),
        ({"beta_start": "low"}, "here has beta_start 'low'; it must be a finite number"),
        ({"beta_start": float("nan")}, "here has beta_start nan; it must be a finite number"),
        ({"beta_end": 10**400}, "here has beta_end 1000.*; it must be a finite number"),
        ({"beta_start": -0.1, "beta_end": -0.1}, r"here: betas must lie in \(0, 1\)"),
        ({"beta_end": 2.0}, r"here: betas must lie in \(0, 1\)"),
        ({"clip_sample": "false"}, "here has clip_sample 'false'; it must be true or false"),
        ({"set_alpha_to_one": 1}, "here has set_alpha_to_one 1; it must be true or false"),
        ({"thresholding": "no"}, "here has thresholding 'no'; it must be true or false"),
        ({"rescale_betas_zero_snr": []}, r"here has rescale_betas_zero_snr \[\]"),
        ({"clip_sample_range": "x"}, "here has clip_sample_range 'x'; it must be a finite number"),
        ({"clip_sample_range": -1}, "here has clip_sample_range -1.0; it must be above 0"),
        ({"clip_sample_range": float("nan")}, "here has clip_sample_range nan"),
        ({"timestep_spacing": "even"}, "here has timestep_spacing 'even'; known are trailing"),
        ({"timestep_spacing": {}}, "here has timestep_spacing {}; known are trailing"),
        ({"steps_offset": -5}, "here has steps_offset -5; it must be an integer of 0 to 999"),
        ({"steps_offset": 1000}, "here has steps_offset 1000; it must be an integer of 0 to 999"),
        ({"steps_offset": 1.5}, "here has steps_offset 1.5; it must be an integer of 0 to 999"),
        ({"steps_offset": None}, "here has steps_offset None; it must be an integer of 0 to 999"),
        ({"prediction_type": ["v"]}, "here: .*unhashable"),
        ({"_use_default_values": 5}, "here: .*not iterable"),
        ({"num_train_timesteps": 10**9}, "here has num_train_timesteps 1000000000; .*1 to 100000"),
        ({"num_train_timesteps": 1e13}, "here has num_train_timesteps 1.*; .*1 to 100000"),
        ({"num_train_timesteps": float("inf")}, "here has num_train_timesteps inf; .*1 to 100000"),
        ({"num_train_timesteps": 0}, "here has num_train_timesteps 0; .*1 to 100000"),
        ({"trained_betas": [5, 5]}, "here: the betas .* must be above 0 and at most 1"),
        ({"trained_betas": [0.1, float("nan")]}, "here: the betas .* must be above 0"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, "here: the betas .* must be above 0"),
        ({"trained_betas": []}, "here: a noise schedule has 1 to 100000 timesteps"),
        ({"trained_betas": [[0.1]]}, r"here has trained_betas \[\[0.1\]\]; it must be of numbers"),
        ({"trained_betas": "1"}, "here has trained_betas '1'; it must be of numbers"),
        ({"trained_betas": 0.5}, "here has trained_betas 0.5; it must be of numbers"),
    ):
        with pytest.raises(UserError, match=message):
            schedulers.read_config(config_of("DDIMScheduler") | changes, "here")


def test_null_is_false_as_in_diffusers():
    config = config_of("DDIMScheduler") | {"use_karras_sigmas": None, "clip_sample": None}
    loaded = schedulers.read_config(config, "here")
    assert loaded.settings["sigmas"] == "schedule" and "clip" not in loaded.settings
