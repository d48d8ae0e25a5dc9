"""Sampling: one program, the same picture for the same seed, files as promised."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax import pipelines
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.sample import MAX_PROMPTS_FILE, read_prompts

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pipe(trained_workdir):
    return pipelines.load(trained_workdir)


def test_fifty_calls_that_vary_everything_compile_once(pipe):
    program, samplers = pipe.program(32, 32), sorted(SAMPLERS)
    before = program._cache_size()
    for i in range(50):
        pipe(
            ["the digit 3, (written:1.5) by hand", "a handwritten seven"][i % 2 :],
            negative_prompt="a nine" if i % 3 else "",
            seed=i * 100,
            guidance_scale=1.5 + i,
            guidance_rescale=i / 50,
            guidance_interval=(0.0, 1.0 - i / 100),
            sampler=samplers[i % len(samplers)],
            sigmas=("schedule", "karras")[i % 2],
            steps=1 + i % 5,
            eta=i / 50,
            num_images=1 + i % 2,
            batch_size=4,
        )
    assert program._cache_size() - before == 1


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe):
    prompts = ["a handwritten seven", "the digit 3, written by hand", "somebody wrote a two"] * 2
    together = pipe(prompts, seed=10, eta=1.0, batch_size=8)
    assert together.shape == (6, 32, 32, 3) and together.dtype == np.uint8
    for i in (0, 1, 5):
        alone = pipe(prompts[i], seed=10 + i, eta=1.0, batch_size=1)
        difference = np.abs(alone[0].astype(int) - together[i])
        assert difference.max() <= 1, "more than rounding"
    assert np.abs(together[0].astype(int) - together[3]).max() > 8, "another seed, another picture"


def test_settings_matter(pipe):
    def draw(**settings):
        return pipe("a handwritten seven", batch_size=1, **settings).astype(int)

    base = draw(seed=1)
    np.testing.assert_array_equal(base, draw(seed=1))
    # The smoke model is hardly trained: its conditions weigh little, noise a lot.
    assert (base != draw(seed=2)).any()
    assert (base != draw(seed=1, eta=1.0)).any()
    assert (base != draw(seed=1, sampler="ddpm")).any()
    assert (base != draw(seed=1, steps=7)).any()
    np.testing.assert_array_equal(draw(seed=1, eta=1.0), draw(seed=1, sampler="ddpm"))


def test_bad_arguments_are_refused(pipe, tmp_path):
    for settings, message in (
        ({"sampler": "dimm"}, "unknown sampler 'dimm'; known: ddpm, ddim"),
        ({"steps": 0}, r"must be in 1\.\.1000, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 1001}, r"must be in 1\.\.1000, got 1001"),
        ({"eta": 2.0}, r"eta must be in \[0, 1\]"),
        ({"seed": -1}, r"seeds must be in 0\.\."),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"height": 30}, "height and width must be multiples of 4 for this model, got 30 and 32"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], got 1.5"),
        ({"guidance_interval": (0.9, 0.1)}, r"guidance_interval's start must be in \[0, 0.1\]"),
        ({"sigmas": "log"}, "unknown sigmas 'log'; known: schedule, karras"),
        ({"mask": np.zeros((32, 32), np.uint8)}, "a mask needs an image to paint into"),
        ({"image": np.zeros((32, 32, 3), np.float32)}, "must be uint8"),
        ({"image": "none.png"}, "cannot read image none.png"),
        ({"image": np.zeros((32, 32, 3), np.uint8), "strength": 2.0}, r"strength must be in"),
        (
            {"latents": np.zeros((1, 4, 4, 3))},
            r"latents must be \[1, 8, 8, 3\], got \(1, 4, 4, 3\)",
        ),
        ({"variation_seed": 1, "variation_strength": 2.0}, "variation_strength must be in"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 images"),
        ({"previews": -1}, "previews must not be negative"),
        ({"previews": 5, "steps": 4}, "5 previews need as many calls of the network, there are 4"),
        (
            {"image": np.zeros((32, 32, 3), np.uint8), "strength": 0.1, "steps": 5},
            r"strength=0.1 of 5 steps leaves none to carry out; it must be at least 0.2",
        ),
        (
            {"image": np.zeros((32, 32, 2), np.uint8)},
            r"must be uint8 \[H, W\] or \[H, W, 1, 3 or 4\]",
        ),
        ({"image": [1, 2]}, "an image is a file's name, a Pillow image or an array, got list"),
        ({"variation_strength": 0.5}, "variation_strength needs a variation_seed"),
        ({"max_chunks": 0}, "max_chunks=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            pipe("a handwritten seven", **settings)
    with pytest.raises(UserError, match="no prompts"):
        pipe([])
    with pytest.raises(UserError, match="does not exist"):
        pipelines.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"is no model: it has neither model_index\.json"):
        pipelines.load(tmp_path)


def sample(workdir, *flags):
    return subprocess.run(
        [sys.executable, "-m", "latent_diffusion_jax.sample", f"--workdir={workdir}", *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_command_draws_a_grid(trained_workdir, tmp_path):
    out = tmp_path / "new" / "grid.png"
    done = sample(trained_workdir, "--prompt=a handwritten seven", "--num_images=6", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (4 * 98 + 2, 2 * 98 + 2)


def test_command_draws_a_folder_that_data_can_be_read_from(trained_workdir, pipe, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a handwritten seven\n\nthe digit 3, written by hand\n")
    out = tmp_path / "many"
    done = sample(trained_workdir, f"--prompts_file={file}", "--num_images=2", "--seed=5",
                  f"--out={out}/")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metadata.jsonl").open()]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8]
    assert [row["text"] for row in rows] == [
        *["a handwritten seven"] * 2,
        *["the digit 3, written by hand"] * 2,
    ]
    again = pipe(rows[2]["text"], seed=rows[2]["seed"], batch_size=1)[0].astype(int)
    assert np.abs(np.asarray(Image.open(out / rows[2]["file_name"])) - again).max() <= 1

    from latent_diffusion_jax.data.sources import FolderSource

    source = FolderSource(out, "train", 0.25, "{}")
    assert source[0]["captions"][0] in ("a handwritten seven", "the digit 3, written by hand")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt=a", "--prompts_file=b"), "give either --prompt or --prompts_file"),
        (("--prompts_file=none.txt",), "cannot read prompts file none.txt"),
        (("--prompt=a", "--out=grid.jpg"), "--out=grid.jpg must be a .png file"),
        (("--prompt=a", "--stepz=3"), "stepz"),
    ],
)
def test_command_refuses_bad_flags_in_one_line(trained_workdir, flags, message):
    done = sample(trained_workdir, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\ufeffa duck\r\n\r\n two geese \r\n", ["a duck", "two geese"]),
        ("a\u2028duck\x85here\na\tgoose", ["a\u2028duck\x85here", "a\tgoose"]),
    ],
)
def test_prompts_files_are_cut_at_the_ends_of_lines_alone(tmp_path, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    assert read_prompts(None, str(path)) == prompts


@pytest.mark.parametrize("character", "\x0b\x0c\x1c\x1d\x1e\x00\x1b")
def test_control_characters_in_prompts_files_are_refused(tmp_path, character):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a duck\na{character} goose{character}\n".encode())
    with pytest.raises(UserError, match=r"^line 2 of prompts file .* has the control character"):
        read_prompts(None, str(path))


def test_prompts_files_that_never_end_or_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "image").write_bytes(b"\x89PNG\xff")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_PROMPTS_FILE + 1)
    for path, message in (
        ("/dev/zero", "it is no ordinary file"),
        (tmp_path / "pipe", "it is no ordinary file"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "image", "utf-8"),
        (tmp_path / "huge", "more than the 64 allowed"),
    ):
        with pytest.raises(UserError, match=f"^cannot read prompts file {path}: .*{message}"):
            read_prompts(None, str(path))


@pytest.mark.slow
def test_command_warns_of_what_a_prompt_loses(trained_workdir, tmp_path):
    done = sample(trained_workdir, f"--prompt={'a handwritten seven ' * 9}日", "--num_images=1",
                  "--max_chunks=1", f"--out={tmp_path}/a.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "does not fit into 1 x 14 tokens; this is cut off: '" in done.stderr
    assert "日" in done.stderr


PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_previews_end_in_the_image(pipe):
    images, previews = pipe("a handwritten seven", num_images=3, previews=4, batch_size=4)
    assert images.shape == (3, 32, 32, 3) and previews.shape == (4, 3, 32, 32, 3)
    assert previews.dtype == np.uint8
    assert np.abs(previews[-1].astype(int) - images).max() <= 1
    assert (previews[0] != previews[-1]).any()


def test_starting_noise_can_be_given(pipe):
    noise = np.random.default_rng(1).normal(size=(1, 8, 8, 3))
    drawn = [pipe("a handwritten seven", latents=noise, seed=seed) for seed in (0, 1)]
    np.testing.assert_array_equal(*drawn)
    assert (drawn[0] != pipe("a handwritten seven", latents=-noise)).any()


def test_variations_lie_between_two_seeds(pipe):
    def draw(seed, **options):
        return pipe("a handwritten seven", seed=seed, **options).astype(int)

    a, b = draw(0), draw(7)
    none, some, all_ = (draw(0, variation_seed=7, variation_strength=s) for s in (0.0, 0.3, 1.0))
    assert np.abs(none - a).max() <= 1 and np.abs(all_ - b).max() <= 1
    assert 0 < np.abs(some - a).mean() < np.abs(b - a).mean()


def test_an_image_to_start_from_is_kept_as_far_as_strength_says(pipe):
    def distance(strength):
        drawn = pipe("a handwritten seven", image=PHOTO, strength=strength, steps=8)
        return np.abs(drawn[0].astype(int) - kept).mean()

    kept = pipe("a handwritten seven", image=PHOTO, strength=0.0)[0].astype(int)
    distances = [distance(strength) for strength in (0.0, 0.25, 1.0)]
    assert distances[0] == 0 and 0 < distances[1] < distances[2]


def test_painting_into_an_image_keeps_the_rest(pipe):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    kept = pipe("a handwritten seven", image=PHOTO, strength=0.0)[0].astype(int)
    painted = pipe("a handwritten seven", image=PHOTO, mask=mask, strength=1.0)[0].astype(int)
    other = pipe("a handwritten seven", image=PHOTO, mask=mask, strength=1.0, seed=5)[0].astype(int)
    # Pixels that are further from the mask than the decoder looks are the decoded image's.
    assert np.abs(painted - kept)[:, 16:].mean() > 2 * np.abs(painted - kept)[:, :4].mean()
    assert np.abs(painted - other)[:, 16:].max() > np.abs(painted - other)[:, :4].max()


def test_larger_and_oblong_images(pipe):
    assert pipe("a handwritten seven", height=64, width=40).shape == (1, 64, 40, 3)


def test_long_prompts_fill_more_chunks(pipe):
    long = "a handwritten seven, " * 8
    assert pipe(long).shape == (1, 32, 32, 3)
    assert (pipe(long) != pipe(long, max_chunks=1)).any()


def test_the_first_call_says_that_it_compiles(pipe, capfd):
    pipe("a handwritten seven", height=40, width=40)
    assert "compiling the sampler for 1 image(s) of 40x40" in capfd.readouterr().err
    pipe("a handwritten six", height=40, width=40, steps=2)
    assert capfd.readouterr().err == ""


def test_bfloat16_draws_nearly_the_same(trained_workdir, pipe):
    half = pipelines.load(trained_workdir, dtype="bfloat16")
    a, b = (p("a handwritten seven", sampler="ddim").astype(int) for p in (pipe, half))
    assert np.abs(a - b).mean() < 8
    with pytest.raises(UserError, match="unknown dtype 'float16'; known: float32, bfloat16"):
        pipelines.load(trained_workdir, dtype="float16")


def test_a_long_prompt_does_not_change_its_neighbours(pipe):
    long = "a handwritten seven, " * 8
    alone = pipe("a handwritten seven", seed=3, batch_size=2).astype(int)
    together = pipe([long, "a handwritten seven"], seed=[2, 3], batch_size=2)
    assert np.abs(together[1:] - alone).max() <= 1
    assert np.abs(together[:1] - pipe(long, seed=2, batch_size=2).astype(int)).max() <= 1
