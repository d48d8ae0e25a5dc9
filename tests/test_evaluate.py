"""The evaluate command on a hardly trained model, and its measures on real images."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from latent_diffusion_jax import build, evaluate, pipelines
from latent_diffusion_jax.evaluation.precision_recall import precision_recall
from latent_diffusion_jax.evaluation.real_images import grey_features, read_split
from latent_diffusion_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def test_command_measures_and_writes(trained_workdir):
    done = subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.evaluate", f"--workdir={trained_workdir}",
         "--num_samples=20"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((trained_workdir / "evaluation.json").read_text())
    assert figures["reader_accuracy"] >= 0.97
    assert figures["prompt_accuracy"] < 0.5, "four steps of training draw no digits"
    assert 0 <= figures["precision"] <= 1 and 0 <= figures["recall"] <= 1
    assert figures["settings"]["num_samples"] == 20
    assert (trained_workdir / "evaluation.png").exists()
    # The same held-out PSNR as the training loop's own, up to the images' rounding.
    rows = map(json.loads, (trained_workdir / "metrics.jsonl").open())
    trained = [row["test/psnr"] for row in rows if "test/psnr" in row][-1]
    assert abs(figures["psnr"] - trained) < 1.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_reconstructions_that_are_no_numbers_have_no_figures(trained_workdir, value):
    pipe = pipelines.load(trained_workdir)
    pipe.params["autoencoder"]["decoder"]["conv_out"]["bias"] *= 0
    pipe.params["autoencoder"]["decoder"]["conv_out"]["bias"] += value
    with pytest.raises(UserError, match="the first stage decoded is no picture, but not finite"):
        evaluate.reconstruct(pipe, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="the model drew is no picture, but not finite"):
        pipe("a duck", steps=1)


def test_samples_must_divide_by_the_classes(trained_workdir):
    with pytest.raises(UserError, match="multiple of 10"):
        evaluate.evaluate(trained_workdir, num_samples=15, max_real=100, seed=0)


def test_real_images_are_resized_as_those_that_were_trained_on(smoke_config):
    smoke_config.data.resize = 48
    train, _ = build.data_sources(smoke_config)
    pixels, captions, labels = read_split(train, 32, 48, 3)
    prepare = build.example_maker(smoke_config)
    for i, image in enumerate(pixels):
        np.testing.assert_array_equal(image, prepare(train[i], None)["image"])
    assert len(captions) == len(labels) == 3


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_levels_of_any_picture(channels):
    pixels = np.full((2, 64, 64, channels), 51, np.uint8)
    np.testing.assert_allclose(grey_features(pixels), 0.2)


def test_real_images_in_the_samples_place_are_rated_high(smoke_config):
    train, test = build.data_sources(smoke_config)
    real = grey_features(read_split(train, 32, 0, 10_000)[0])
    held_out = grey_features(read_split(test, 32, 0, 10_000)[0])
    chosen = np.random.default_rng(0).permutation(len(real))
    precision, recall = precision_recall(real[chosen[500:]], held_out, real[chosen[:500]])
    assert precision > 0.8 and recall > 0.8
    # A collapse onto few pictures keeps precision and loses recall; noise loses precision.
    few = np.repeat(real[chosen[:50]], 10, axis=0)
    precision, recall = precision_recall(real[chosen[500:]], held_out, few)
    assert precision > 0.8 and recall < 0.1
    noise = np.random.default_rng(0).uniform(size=(500, real.shape[1]))
    assert precision_recall(real, held_out, noise)[0] == 0
