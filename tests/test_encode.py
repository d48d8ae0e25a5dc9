"""The encode command: what it writes, going on, several processes; and training from latents."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from latent_diffusion_jax import build, first_stages
from latent_diffusion_jax.data.latents import LatentSource
from latent_diffusion_jax.encode import encode_dataset, open_inputs
from latent_diffusion_jax.planning import programs
from latent_diffusion_jax.runtime import checkpoints, saved_programs, sharding
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.images import to_float
from latent_diffusion_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def first_stage(trained_workdir):
    return first_stages.open_first_stage(trained_workdir)


def encode(config, workdir, first_stage, out, **more):
    return encode_dataset(config, first_stage, str(workdir), out, batch_size=64, **more)


@pytest.fixture(scope="module")
def latents_dir(tmp_path_factory, trained_workdir, first_stage):
    """The digits by the smoke config's first stage, exact."""
    out = tmp_path_factory.mktemp("latents") / "digits"
    config = first_stage.config.copy_and_resolve_references()
    assert encode(config, trained_workdir, first_stage, out, dtype="float32", shard_size=500)
    return out


@pytest.fixture
def latent_config(smoke_config, latents_dir):
    """Trains the second stage from the latents."""
    smoke_config.data.latents = str(latents_dir)
    smoke_config.stages = ("diffusion",)
    return smoke_config


def files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


# What is written.


def test_records_are_the_encoders_moments(latents_dir, smoke_config, first_stage):
    names = sorted(path.name for path in latents_dir.iterdir())
    assert names == ["latents.json", "test-00000-of-00001.array_record",
                     "train-00000-of-00003.array_record", "train-00001-of-00003.array_record",
                     "train-00002-of-00003.array_record"]  # fmt: skip
    for split, source in zip(("train", "test"), build.data_sources(smoke_config), strict=True):
        found = LatentSource(latents_dir, split)
        assert len(found) == len(source) and found.label_names == list(source.records.label_names)
        rows = [0, 1, 64, len(source) - 1]
        prepare = build.example_maker(smoke_config)
        images = np.stack([prepare(source[i], None)["image"] for i in rows])
        posterior = first_stage.network.apply(
            {"params": first_stage.params}, to_float(images), method="encode"
        )
        for i, wanted in zip(rows, np.asarray(posterior.moments), strict=True):
            record, original = found[i], source[i]
            np.testing.assert_allclose(record["moments"][0, 0], wanted, rtol=1e-4, atol=1e-5)
            assert record["moments"].shape == (1, 1, *wanted.shape)
            for key in ("captions", "label", "name"):
                assert record[key] == original[key]


def test_the_index_says_what_the_latents_are_of(latents_dir, trained_workdir, first_stage):
    index = json.loads((latents_dir / "latents.json").read_text())
    assert index["done"] and index["dtype"] == "float32" and index["image_size"] == 32
    assert index["moments_shape"] == [8, 8, 6] and index["scale_factor"] == first_stage.scale_factor
    assert index["data"]["name"] == "handwritten_digits"
    assert index["splits"]["train"]["records"] == [500, 500, 500]
    assert index["splits"]["test"] == {
        "images": 297, "views": [1, 1], "shard_size": 500, "records": [297]}  # fmt: skip
    theirs = index["autoencoder"]
    assert theirs["kind"] == "kl" and theirs["source"] == str(trained_workdir)
    assert theirs["fingerprint"] == first_stages.encoder_fingerprint(first_stage.params)


def test_the_fingerprint_is_the_encoders(first_stage):
    def changed(part, by):
        def change(path, leaf):
            return leaf + by if jax.tree_util.keystr(path).startswith(f"['{part}']") else leaf

        return jax.tree_util.tree_map_with_path(change, first_stage.params)

    wanted = first_stages.encoder_fingerprint(first_stage.params)
    assert first_stages.encoder_fingerprint(changed("decoder", 1.0)) == wanted
    assert first_stages.encoder_fingerprint(changed("encoder", 0.01)) != wanted
    assert first_stages.encoder_fingerprint(changed("quant_conv", 0.01)) != wanted
    assert first_stages.encoder_fingerprint(jax.device_get(first_stage.params)) == wanted


def write_images(folder, count, damaged=()):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(256, size=(40, 36, 3)).astype(np.uint8)
        path = folder / f"{i:02d}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"noise number {i}")
        if i in damaged:
            path.write_bytes(path.read_bytes()[:60])
    return folder


def test_mirrored_images_and_crops_are_stored(smoke_config, trained_workdir, first_stage, tmp_path):
    smoke_config.data.name = str(write_images(tmp_path / "data", 12))
    smoke_config.data.holdout_share = 0.3
    smoke_config.data.random_flip = True
    assert encode(smoke_config, trained_workdir, first_stage, tmp_path / "out", crops=3)
    found = LatentSource(tmp_path / "out", "train")
    source, _ = build.data_sources(smoke_config)
    views = found[2]["moments"]
    assert views.shape == (3, 2, 8, 8, 6) and views.dtype == np.float16
    assert LatentSource(tmp_path / "out", "test")[0]["moments"].shape == (1, 1, 8, 8, 6)
    # Each is of one of the crops that there are, and the second of a pair of its mirror image.
    from latent_diffusion_jax.runtime import images

    whole = images.resize_and_crop(source[2]["image"], 32, None)
    tall = np.asarray(source[2]["image"].resize((32, 36), Image.Resampling.BICUBIC))
    crops = np.stack([tall[i : i + 32] for i in range(5)])
    assert any((whole == crop).all() for crop in crops)

    def encoded(pixels):
        variables = {"params": first_stage.params}
        posterior = first_stage.network.apply(variables, to_float(pixels), method="encode")
        return np.asarray(posterior.moments)

    upright, mirrored = encoded(crops), encoded(crops[:, :, ::-1])
    for one, other in views.astype(np.float32):
        errors = np.abs(upright - one).max((1, 2, 3))
        assert errors.min() < 0.01
        assert np.abs(mirrored[errors.argmin()] - other).max() < 0.01


def test_float16_is_close(latents_dir, smoke_config, trained_workdir, first_stage, tmp_path):
    smoke_config.data.test_split = "test[:100]"
    smoke_config.data.train_split = "train[:100]"
    assert encode(smoke_config, trained_workdir, first_stage, tmp_path)
    half, exact = (LatentSource(folder, "test") for folder in (tmp_path, latents_dir))
    for i in range(100):
        error = half[i]["moments"].astype(np.float32) - exact[i]["moments"]
        assert np.abs(error).max() <= 2**-11 * np.abs(exact[i]["moments"]).max() + 1e-5
    size = [sum(f.stat().st_size for f in d.glob("test-*")) for d in (tmp_path, latents_dir)]
    assert size[0] < size[1]


def test_damaged_images_are_left_out(
    smoke_config, trained_workdir, first_stage, tmp_path
):  # fmt: skip
    smoke_config.data.name = str(write_images(tmp_path / "data", 20, damaged=(3, 11)))
    smoke_config.data.holdout_share = 0.3
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"of .* images cannot be decoded, the last is .*png"):
        encode(smoke_config, trained_workdir, first_stage, out, shard_size=2)
    smoke_config.data.max_damaged_share = 0.5
    assert encode(smoke_config, trained_workdir, first_stage, out, shard_size=2)
    names = [LatentSource(out, split)[i]["name"] for split in ("train", "test")
             for i in range(len(LatentSource(out, split)))]  # fmt: skip
    assert len(names) == len(set(names)) == 18
    # The allowance is for all calls together.
    index = json.loads((out / "latents.json").read_text())
    (out / "latents.json").write_text(json.dumps(index | {"done": False}))
    smoke_config.data.max_damaged_share = 0.05
    with pytest.raises(UserError, match=r"\d of \d+ images of \w+ cannot be decoded; at most 0"):
        encode(smoke_config, trained_workdir, first_stage, out, shard_size=2)


# Going on.


def test_a_finished_folder_is_left_alone(latents_dir, smoke_config, trained_workdir, first_stage):
    before = files(latents_dir)
    more = {"dtype": "float32", "shard_size": 500}
    assert encode(smoke_config, trained_workdir, first_stage, latents_dir, **more)
    assert files(latents_dir) == before


def test_it_goes_on_after_a_stop(
    latents_dir, smoke_config, trained_workdir, first_stage, tmp_path
):  # fmt: skip
    out, more = tmp_path / "out", {"dtype": "float32", "shard_size": 500}
    calls = iter(range(1000))
    assert not encode(smoke_config, trained_workdir, first_stage, out, **more,
                      should_stop=lambda: next(calls) == 10)  # fmt: skip
    before = files(out)
    assert before.keys() == {"latents.json", "train-00000-of-00003.array_record"}
    with pytest.raises(UserError, match="not finished"):
        LatentSource(out, "train")
    (out / "train-00001-of-00003.partial").write_bytes(b"left by a kill")
    smoke_config.mesh.data = 8  # none of the settings that matter
    assert encode(smoke_config, trained_workdir, first_stage, out, **more)
    name = "train-00000-of-00003.array_record"
    assert files(out)[name] == before[name], "a file that was whole was written again"
    assert files(out).keys() == files(latents_dir).keys()
    for split in ("train", "test"):
        ours, theirs = LatentSource(out, split), LatentSource(latents_dir, split)
        assert len(ours) == len(theirs)
        for i in range(0, len(ours), 49):
            np.testing.assert_allclose(ours[i]["moments"], theirs[i]["moments"], atol=1e-5)
            assert ours[i]["captions"] == theirs[i]["captions"]


def test_other_settings_are_refused(latents_dir, smoke_config, trained_workdir, first_stage):
    before = files(latents_dir)
    more = {"dtype": "float32", "shard_size": 500}

    def check_refused(match, first_stage=first_stage, **changes):
        with pytest.raises(UserError, match=match) as error:
            encode(smoke_config, trained_workdir, first_stage, latents_dir, **more | changes)
        assert "\n" not in str(error.value) and files(latents_dir) == before

    check_refused(r"other settings; they differ in dtype \(there 'float32', now 'float16'\)\. Take "
                  "another --out", dtype="float16")  # fmt: skip
    check_refused(r"splits\.train\.views \(there \[1, 1\], now \[2, 1\]\)", crops=2)
    other = jax.tree.map(lambda leaf: leaf + 1, first_stage.params)
    check_refused(r"autoencoder\.fingerprint", first_stage._replace(params=other))
    smoke_config.data.image_size = 64
    check_refused(r"image_size \(there 32, now 64\)")


def test_bad_input_is_refused(smoke_config, trained_workdir, first_stage, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --out=.*file"):
        encode(smoke_config, trained_workdir, first_stage, tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"--batch_size=7 is not divisible"):
        encode_dataset(smoke_config, first_stage, "F", tmp_path / "out", batch_size=7)
    smoke_config.first_stage.autoencoder.channels = 16
    with pytest.raises(UserError, match=r"not that of the config: .*channels=16 \(there 8\)"):
        encode(smoke_config, trained_workdir, first_stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_say_enough_are_refused(smoke_config, trained_workdir, tmp_path):
    with pytest.raises(UserError, match="give --first_stage=PATH"):
        open_inputs(None, None)
    with pytest.raises(UserError, match="give --first_stage=PATH"):
        open_inputs(smoke_config, None)
    with pytest.raises(UserError, match=r"first stage .*none does not exist"):
        open_inputs(smoke_config, str(tmp_path / "none"))
    config, found, origin = open_inputs(None, str(trained_workdir))
    assert config.data.image_size == 32 and origin == trained_workdir
    from latent_diffusion_jax.weights import autoencoders

    folder = tmp_path / "vae"
    autoencoders.save_diffusers(folder, found.kind, found.fields, found.params, 0.5)
    with pytest.raises(UserError, match="does not say which data to encode; give --config"):
        open_inputs(None, str(folder))
    smoke_config.first_stage.init_from = str(folder)
    assert open_inputs(smoke_config, None)[1].scale_factor == 0.5
    unfinished = tmp_path / "run"
    shutil.copytree(trained_workdir / "first_stage", unfinished / "first_stage")
    (unfinished / "first_stage" / "4").rename(unfinished / "first_stage" / "3")
    with pytest.raises(UserError, match="no complete first stage"):
        open_inputs(None, str(unfinished))


def test_the_command(trained_workdir, latents_dir, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "latent_diffusion_jax.encode", *arguments],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    out = tmp_path / "out"
    done = run(f"--first_stage={trained_workdir}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"train from them with --config.data.latents={out}" in done.stdout
    assert "train: encoded 1500 of 1500 images" in done.stderr
    assert len(LatentSource(out, "train")) == 1500
    done = run(f"--first_stage={tmp_path / 'none'}", f"--out={out}")
    assert done.returncode == 2 and done.stderr.startswith("error: first stage")
    assert done.stderr.count("\n") == 1


# Training from latents.


def copy_first_stage(trained_workdir, workdir):
    """A workdir in which the first stage alone is complete."""
    shutil.copytree(trained_workdir / "first_stage", workdir / "first_stage")
    shutil.copy(trained_workdir / "config.json", workdir)
    return workdir


def figures(workdir):
    """Second stage's scalars: {(step, name): value}."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {
        (row["step"], key): value for row in rows if row["stage"] == "diffusion"
        for key, value in row.items() if key.endswith(("loss", "grad_norm"))
    }  # fmt: skip


@pytest.mark.slow  # a step is, in test_diffusion_stage.py
def test_training_from_latents_is_training_from_images(trained_workdir, latent_config, tmp_path):
    workdir = copy_first_stage(trained_workdir, tmp_path / "run")
    latent_config.stages = ("first_stage", "diffusion")  # as in the config that made the workdir
    latent_config.data.data_dir = str(tmp_path / "none")  # no images are looked for
    assert train(latent_config, workdir)
    wanted, found = figures(trained_workdir), figures(workdir)
    assert wanted.keys() == found.keys() and len(wanted) >= 5
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
    from latent_diffusion_jax import pipelines

    assert pipelines.load(workdir)("a handwritten two").shape == (1, 32, 32, 3)


def test_the_step_that_was_planned_for_latents_is_the_one_that_runs(
    trained_workdir, latent_config, tmp_path
):
    """Compiled from shapes alone; of the data the plan is told how many tokens there are."""
    tokens = trained_workdir / "diffusion" / "4" / "tokenizer" / "tokenizer.json"
    latent_config.num_steps = latent_config.log_every = 1
    planned = latent_config.copy_and_resolve_references()
    planned.tokenizer.vocab_size = Tokenizer.from_file(str(tokens)).get_vocab_size()
    mesh = sharding.make_mesh(dict(planned.mesh))
    program = programs.make(planned, "diffusion", mesh, planned.batch_size, num_labels=0)
    with jax.set_mesh(mesh):
        lowered = program.trace().lower()
    saved_programs.save(tmp_path / "here" / "diffusion", lowered, lowered.compile())
    shutil.copytree(trained_workdir / "first_stage", tmp_path / "run" / "first_stage")
    assert train(latent_config, tmp_path / "run", compiled=tmp_path / "here")
    assert checkpoints.latest_step(tmp_path / "run" / "diffusion") == 1


def test_a_first_stage_from_elsewhere_is_adopted(
    latents_dir, latent_config, trained_workdir, first_stage, tmp_path
):
    from latent_diffusion_jax.weights import autoencoders

    folder = tmp_path / "vae"
    kind, fields, params = first_stage.kind, first_stage.fields, first_stage.params
    # The decoder may be another one.
    bias = params["decoder"]["conv_out"]["bias"] + 1
    decoder = params["decoder"] | {"conv_out": params["decoder"]["conv_out"] | {"bias": bias}}
    changed = params | {"decoder": decoder}
    autoencoders.save_diffusers(folder, kind, fields, changed, 0.5)
    latent_config.data.name = ""  # the latents are all that is needed
    latent_config.first_stage.init_from = str(folder)
    assert not train(latent_config, tmp_path / "run", should_stop=lambda: True)
    info = checkpoints.read_json(tmp_path / "run" / "first_stage", 4, "info")
    assert info["scale_factor"] == 0.5

    encoder = jax.tree.map(lambda leaf: leaf * 1.01, params["encoder"])
    other = tmp_path / "other_vae"
    autoencoders.save_diffusers(other, kind, fields, params | {"encoder": encoder}, 0.5)
    latent_config.first_stage.init_from = str(other)
    with pytest.raises(UserError, match=r"latents in .* are of another autoencoder \(that of .*"):
        train(latent_config, tmp_path / "other")
    assert not (tmp_path / "other").exists(), "something was done before the error"


def test_the_scale_can_be_measured_on_latents(latents_dir, latent_config, first_stage):
    found = first_stages.measure_scale(
        latent_config,
        LatentSource(latents_dir, "train"),
        sharding.make_mesh(dict(latent_config.mesh)),
        first_stage.network,
        first_stage.params,
    )
    assert found == pytest.approx(first_stage.scale_factor, rel=1e-4)


def check_refused(config, workdir, match):
    with pytest.raises(UserError, match=match) as error:
        train(config, workdir)
    assert "\n" not in str(error.value)
    assert not (workdir / "diffusion").exists()


def test_latents_that_do_not_fit_are_refused(
    latents_dir, latent_config, trained_workdir, first_stage, tmp_path
):
    workdir = copy_first_stage(trained_workdir, tmp_path / "run")
    index = json.loads((latents_dir / "latents.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(latents_dir, other)
    index["autoencoder"] |= {"fingerprint": "0" * 64, "source": "runs/x"}
    (other / "latents.json").write_text(json.dumps(index))

    def config(**changes):
        changed = latent_config.copy_and_resolve_references()
        changed.stages = ("first_stage", "diffusion")
        changed.update_from_flattened_dict({f"data.{k}": v for k, v in changes.items()})
        return changed

    check_refused(config(latents=str(other)), workdir,
                  r"another autoencoder \(that of runs/x; fingerprint 000000000000\)")  # fmt: skip
    check_refused(config(latents=str(tmp_path / "none")), workdir, "none holds no latents")
    index = json.loads((latents_dir / "latents.json").read_text())
    index["data"]["caption_key"] = ""
    (other / "latents.json").write_text(json.dumps(index))
    silent = config(latents=str(other))
    silent.stages = ("diffusion",)
    check_refused(silent, workdir, "conditioning='text' needs captions, and the latents in .* with")
    wide = config(image_size=64)
    check_refused(wide, tmp_path / "new", "first stage that is trained already, this run's is not")
    wide.stages = ("diffusion",)
    wide.first_stage.init_from = str(trained_workdir)
    check_refused(wide, tmp_path / "new", r"are of images of 32 pixels, data\.image_size=64")
    flipped = wide.copy_and_resolve_references()
    flipped.data.image_size, flipped.data.random_flip = 32, True
    check_refused(flipped, tmp_path / "new", "of no mirrored images")


def test_a_vq_autoencoder_encodes(smoke_config, tmp_path):
    config = smoke_config
    config.data.train_split, config.data.test_split = "train[:40]", "test[:8]"
    with config.unlocked():
        config.first_stage.kind = "vq"
        config.first_stage.autoencoder.codebook_size = 8
        config.first_stage.autoencoder.levels = ()
        config.first_stage.codebook = {"decay": 0.0, "revive_below": 0.0}
    network, fields = (
        build.autoencoder(config),
        build.network_fields(config.first_stage.autoencoder),
    )
    params = network.init(jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
    found = first_stages.FirstStage("vq", fields, network, params, 1.0, config)
    assert encode_dataset(config, found, "F", tmp_path, dtype="float32")
    source = LatentSource(tmp_path, "test")
    images = np.stack([np.asarray(build.data_sources(config)[1][i]["image"]) for i in range(8)])
    wanted = network.apply({"params": params}, to_float(images), method="encode").mean
    found = np.stack([source[i]["moments"][0, 0] for i in range(8)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
