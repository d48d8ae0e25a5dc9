"""Configs: every variant builds, at full size as shapes, and wrong values are named."""

import functools
import importlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from latent_diffusion_jax import build, config_checks
from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.conditions import Parts
from latent_diffusion_jax.planning import programs
from latent_diffusion_jax.runtime import sharding, trees
from latent_diffusion_jax.runtime.commands import flatten
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.training.keeper import Keeping
from latent_diffusion_jax.weights.text_encoders import Loaded

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
MODULES = {path.stem: importlib.import_module(f"configs.{path.stem}")
           for path in sorted(FOLDER.glob("*.py")) if path.stem != "base"}  # fmt: skip
VARIANTS = [(name, variant) for name, module in MODULES.items() for variant in module.VARIANTS]

every_variant = pytest.mark.parametrize(("name", "variant"), VARIANTS)
# Large networks that are much like others.
LARGE = [
    ("class_cond", "imagenet_f8"), ("pixel", "celebahq"), ("pixel", "ddpm"), ("pixel", "imagenet"),
    ("stable_diffusion", "v2"), ("stable_diffusion", "v2_base"), ("unconditional", "celebahq"),
    ("unconditional", "ffhq"), ("unconditional", "lsun_bedrooms"),
]  # fmt: skip


def without_large(variants):
    """Those of large networks are slow."""
    return pytest.mark.parametrize(
        ("name", "variant"),
        [pytest.param(*v, marks=pytest.mark.slow if v in LARGE else ()) for v in variants],
    )


# Fields of the text encoders of Stable Diffusion 1 and 2.
CLIP = {
    768: dict(vocab_size=49_408, width=768, depth=12, num_heads=12),
    1024: dict(vocab_size=49_408, width=1_024, depth=24, num_heads=16, output_layer=-2),
}
LABELS = 1_000


def parts_of(config: ConfigDict) -> Parts:
    """What a run of the config would find for its condition."""
    names = [str(i) for i in range(LABELS)] if config.conditioning == "class" else []
    if config.conditioning not in ("text", "clip"):
        return Parts(label_names=names)
    clip = None
    size, length = 512, 77
    if config.conditioning == "text":
        size, length = config.tokenizer.vocab_size, config.tokenizer.max_length
    else:
        clip = Loaded(CLIP[1024 if config.unet.head_dim else 768], None)
    trained = tokenizers.train(["a dog", "two cats"], size, length)
    return Parts(tokenizers.prompt_tokenizer(trained), clip=clip)


def checked(config: ConfigDict) -> ConfigDict:
    """The config with what its user has to give."""
    if config.get("conditioning") == "clip":
        config.clip.path = "checkpoint"
    config_checks.check_config(config)
    return config


def shapes_of(config: ConfigDict) -> dict:
    """Shapes of the parameters of the config's stages."""
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(one):  # or all platforms' forms are traced
        return _shapes_of(config)


def _shapes_of(config: ConfigDict) -> dict:
    params = {}
    if "first_stage" in config:
        params = jax.eval_shape(build.first_stage(config).init, jax.random.key(0)).params
    if "diffusion" in config.stages:
        parts = parts_of(config)
        stage = build.second_stage(config, parts.network(config), parts.host_half(config))
        second = jax.eval_shape(stage.init, jax.random.key(0))
        assert jax.tree.structure(second.ema) == jax.tree.structure(second.params)
        params = params | second.params
    return params


@functools.cache
def parameters(name: str, variant: str) -> dict:
    """Shapes of the parameters of both stages."""
    return shapes_of(MODULES[name].get_config(variant))


def test_there_are_configs():
    assert ("txt2img", "smoke") in VARIANTS and ("txt2img", "paper") in VARIANTS


@every_variant
def test_variant_is_valid_and_with_a_wrong_value_it_is_not(name, variant):
    config = checked(MODULES[name].get_config(variant))
    config.log_every = 0
    with pytest.raises(UserError, match="log_every=0"):
        config_checks.check_config(config)


@every_variant
def test_variant_is_explained_at_the_head_of_its_file(name, variant):
    lines = [line.split() for line in MODULES[name].__doc__.splitlines()]
    assert variant in [words[0] for words in lines if words]


@without_large(VARIANTS)
def test_all_stages_build(name, variant):
    expected = set() if name == "pixel" else {"autoencoder"}
    if name != "pixel" and (name, variant) != ("decoder_finetune", "ft_mse"):
        expected |= {"discriminator"}  # all but the one without an adversary
    if name in ("txt2img", "unconditional", "class_cond", "pixel", "stable_diffusion"):
        expected |= {"unet"}
    labels = name == "pixel" and variant not in ("ddpm", "celebahq")
    if name in ("txt2img", "class_cond") or labels:
        expected |= {"conditioner"}
    assert parameters(name, variant).keys() == expected


@every_variant
def test_config_from_json_builds_the_same(name, variant):
    # Checkpoints keep the config as JSON, which has lists and no tuples.
    config = MODULES[name].get_config(variant)
    copy = ConfigDict(json.loads(config.to_json()))
    checked(copy)
    assert flatten(copy).keys() == flatten(config).keys()
    if name in ("txt2img", "class_cond", "pixel") and variant == "smoke":  # all others alike
        assert shapes_of(copy) == parameters(name, variant)


@every_variant
def test_configs_are_independent(name, variant):
    config, other = (MODULES[name].get_config(variant) for _ in range(2))
    before = flatten(other)
    config.data.name = "something else"
    if "first_stage" in config:
        rate = config.first_stage.discriminator_optimizer.learning_rate
        config.first_stage.optimizer.learning_rate = 123.0
        assert config.first_stage.discriminator_optimizer.learning_rate == rate
    assert flatten(other) == before


@pytest.mark.parametrize("name", MODULES)
def test_unknown_variant(name):
    with pytest.raises(ValueError, match=r"'nope'.*" + ".*".join(MODULES[name].VARIANTS)):
        MODULES[name].get_config("nope")


def test_default_variant():
    for module in MODULES.values():
        assert flatten(module.get_config()) == flatten(module.get_config(module.VARIANTS[0]))


def test_paper_has_the_papers_size():
    # What CompVis' code prints for the UNet and the autoencoder of LDM-KL-8, in millions.
    counts = {key: trees.count(value) / 1e6
              for key, value in parameters("txt2img", "paper").items()}  # fmt: skip
    assert counts["unet"] == pytest.approx(872.30, rel=1e-4)
    assert counts["autoencoder"] == pytest.approx(83.65, rel=1e-3)


# Millions of parameters of the published UNets (CompVis' and Stability's code; DDPM, appendix B;
# LDM, tables 13 and 14).
PUBLISHED = {
    ("unconditional", "celebahq"): (274.06, 1e-4),
    ("unconditional", "ffhq"): (274.06, 1e-4),
    ("unconditional", "lsun_bedrooms"): (274.06, 1e-4),
    ("unconditional", "lsun_churches"): (294.97, 1e-4),
    ("class_cond", "imagenet"): (400.92, 1e-4),
    ("class_cond", "imagenet_f8"): (394.98, 1e-4),
    ("stable_diffusion", "v1"): (859.52, 1e-4),
    ("stable_diffusion", "v2"): (865.91, 1e-4),
    ("stable_diffusion", "v2_base"): (865.91, 1e-4),
    ("pixel", "ddpm"): (35.7, 2e-2),
    ("pixel", "celebahq"): (270, 2e-2),
    ("pixel", "imagenet"): (396, 2e-2),
}


@without_large(PUBLISHED)
def test_unets_have_the_published_sizes(name, variant):
    wanted, tolerance = PUBLISHED[name, variant]
    count = trees.count(parameters(name, variant)["unet"]) / 1e6
    assert count == pytest.approx(wanted, rel=tolerance)


def test_papers_text_encoder():
    # 32 layers, each 4 projections 1280 x 512 and 2 of 1280 x 5120; 30,522 tokens, 77 places.
    config = MODULES["txt2img"].get_config("paper")
    length = config.tokenizer.max_length
    network = build.latent_diffusion(config, config.tokenizer.vocab_size, length).conditioner
    tokens = jax.ShapeDtypeStruct((1, length), np.int32)
    count = trees.count(jax.eval_shape(network.init, jax.random.key(0), tokens))
    kernels = 32 * (4 * 1280 * 512 + 2 * 1280 * 5120) + (30_522 + 77) * 1280
    assert count == pytest.approx(kernels, rel=2e-3) and count > kernels  # biases and norms


# Values that could not work.


def changed(key: str, value) -> ConfigDict:
    config = MODULES["txt2img"].get_config("digits")
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stages", ("first_stage", "second"), ["'second'", "first_stage, diffusion"]),
        ("stages", (), ["stages=()", "first_stage, diffusion"]),
        ("stages", ("diffusion", "first_stage"), ["('first_stage', 'diffusion')"]),
        ("data.image_size", 36, ["data.image_size=36", "multiple of 8", "4", "2"]),
        ("data.image_size", 30, ["data.image_size=30", "multiple of 8"]),
        ("data.resize", 31, ["data.resize=31", "at least data.image_size=32"]),
        ("first_stage.accumulation", 5, ["first_stage.accumulation=5", "first_stage.batch_size"]),
        ("accumulation", 5, ["accumulation=5", "batch_size=64"]),
        ("accumulation", 0, ["accumulation=0", "at least 1"]),
        ("unet.remat", True, ["unknown unet.remat True", "none, dots, blocks, full, offload"]),
        ("first_stage.autoencoder.remat", "all", ["first_stage.autoencoder.remat 'all'"]),
        ("precision", "low", ["unknown precision 'low'", "default, high, highest"]),
        ("first_stage.precision", "float32", ["unknown first_stage.precision 'float32'"]),
        ("param_dtype", "float16", ["unknown param_dtype 'float16'", "float32, bfloat16"]),
        ("first_stage.ema_dtype", "half", ["unknown first_stage.ema_dtype 'half'"]),
        ("optimizer.nu_dtype", "int8", ["unknown optimizer.nu_dtype 'int8'"]),
        ("first_stage.discriminator_optimizer.mu_dtype", "x", ["discriminator_optimizer.mu_dtype"]),
        ("first_stage.trained", "encoder", ["'encoder'", "all, decoder"]),
        ("first_stage.trained", "decoder", ["first_stage.init_from"]),
        ("first_stage.kind", "vae", ["'vae'", "kl, vq"]),
        ("first_stage.loss.update_order", "x", ["'x'", "together, generator_first"]),
        ("first_stage.loss.pixel_loss", "x", ["'x'", "l1, l2"]),
        ("first_stage.loss.reduction", "x", ["'x'", "sum, mean"]),
        ("first_stage.loss.generator_loss", "x", ["'x'", "linear, non_saturating"]),
        ("first_stage.loss.discriminator_loss", "x", ["'x'", "hinge, vanilla"]),
        ("first_stage.discriminator.norm", "x", ["'x'", "batch, activation"]),
        ("first_stage.loss.disc_weight", -1.0, ["first_stage.loss.disc_weight=-1.0", "negative"]),
        ("first_stage.ema_decay", 1.0, ["first_stage.ema_decay=1.0", "below 1"]),
        ("data.image_size", 8, ["data.image_size=8", "first_stage.discriminator.num_layers=2"]),
        ("first_stage.discriminator.num_layers", 4, ["first_stage.discriminator.num_layers=4"]),
        ("unet.num_groups", 5, ["unet.num_groups=5", "[32, 64]"]),
        (
            "first_stage.autoencoder.num_groups",
            32,
            ["first_stage.autoencoder.num_groups=32", "[16, 32, 32]"],
        ),
        ("unet.head_dim", 24, ["unet.head_dim=24"]),
        ("unet.head_dim", 64, ["unet.head_dim=64"]),  # divides one of the two widths
        ("unet.head_dim", 0, ["unet.num_heads=0 and unet.head_dim=0", "one of them"]),
        ("unet.num_heads", 2, ["unet.num_heads=2 and unet.head_dim=32", "one of them"]),
        ("unet.dropout", 1.0, ["unet.dropout=1.0", "below 1"]),
        ("sample.sampler", "eular", ["'eular'", "ddim", "ddpm"]),
        ("num_steps", 0, ["num_steps=0", "at least 1"]),
        ("first_stage.num_steps", 0, ["first_stage.num_steps=0", "at least 1"]),
        ("first_stage.autoencoder.dtype", "float8", ["'float8'", "float32, bfloat16"]),
        (
            "optimizer.learning_rate",
            math.nan,
            ["optimizer.learning_rate=nan must be in [0, 1e+36]"],
        ),
        ("optimizer.learning_rate", -1e-4, ["optimizer.learning_rate=-0.0001 must be in"]),
        ("first_stage.optimizer.weight_decay", math.nan, ["first_stage.optimizer.weight_decay"]),
        ("optimizer.clip_norm", -1.0, ["optimizer.clip_norm=-1.0 must be in"]),
        ("optimizer.clip_norm", None, ["optimizer.clip_norm=None must be in"]),
        ("optimizer.betas", 0.9, ["optimizer.betas=0.9 must be two numbers"]),
        ("first_stage.loss.logvar", None, ["first_stage.loss.logvar=None"]),
        ("optimizer.warmup_steps", -5, ["optimizer.warmup_steps=-5 must be in"]),
        ("optimizer.final_fraction", -1.0, ["optimizer.final_fraction=-1.0 must be in [0, 1]"]),
        ("optimizer.eps", math.nan, ["optimizer.eps=nan must be positive"]),
        ("optimizer.betas", (0.9, 1.0), ["optimizer.betas=(0.9, 1.0)", "below 1"]),
        ("first_stage.discriminator_optimizer.betas", (0.9,), ["must be two numbers"]),
        ("optimizer.betas", (1.5, -2.0), ["optimizer.betas=(1.5, -2.0)"]),
        ("first_stage.loss.logvar", math.nan, ["first_stage.loss.logvar=nan must be a number"]),
        ("keep_best", "-psnr", ["keep_best='-psnr' is no figure", "it has loss, mse"]),
        ("first_stage.keep_best", "lpips", ["first_stage.keep_best='lpips'", "it has l1, psnr"]),
        ("data.caption_key", "", ["conditioning='text' needs captions", "data.caption_key=''"]),
        ("sample.guidance_scale", math.nan, ["guidance_scale must be a finite number, got nan"]),
        ("seed", 2**32, ["seed=4294967296 must be at most 4294967295"]),
        ("data.num_threads", 10**6, ["data.num_threads=1000000 must be at most 1024"]),
        ("profile.after", -1, ["profile.after=-1 must not be negative"]),
        ("first_stage.loss.disc_start", -3, ["first_stage.loss.disc_start=-3"]),
    ],
)
def test_wrong_values_are_named(key, value, said):
    with pytest.raises(UserError) as raised:
        config_checks.check_config(changed(key, value))
    assert "\n" not in str(raised.value)
    for part in said:
        assert part in str(raised.value)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("stage", ["first_stage", "diffusion"])
def test_the_best_is_by_a_figure_that_the_stage_has(stage, learned, monkeypatch):
    config = MODULES["txt2img"].get_config("smoke")
    config.objective.learned_variance = learned
    if learned:
        config.first_stage.loss.lpips_weights = "lpips.safetensors"
    asked = {}
    monkeypatch.setattr(Keeping, "check", lambda _, figures, key: asked.update({key: figures}))
    config_checks.check_config(config)
    step, batch, _ = programs._STAGES[stage](config, 8, 10)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        made = programs.make(config, stage, mesh, 8, 10)
        found = jax.eval_shape(step.eval_step, made.arguments[0], batch, jax.random.key(0))
    key = {"first_stage": "first_stage.keep_best", "diffusion": "keep_best"}[stage]
    assert set(asked[key]) == found.keys()


@pytest.mark.parametrize(
    ("dtype", "decay", "slow", "said"),
    [
        ("ema_dtype", "ema_decay", 0.9999, "ema_decay=0.9999"),
        ("first_stage.ema_dtype", "first_stage.ema_decay", 0.999, "first_stage.ema_decay=0.999"),
        ("optimizer.nu_dtype", "optimizer.betas", (0.9, 0.999), "optimizer.betas' second=0.999"),
    ],
)
def test_halves_do_not_follow_slow_averages(dtype, decay, slow, said):
    """They would stay what they began as."""
    config = changed(decay, slow)
    config_checks.check_config(config)
    config.update_from_flattened_dict({dtype: "bfloat16"})
    with pytest.raises(UserError, match=f"{dtype}='bfloat16' does not follow {said}: that takes"):
        config_checks.check_config(config)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"first_stage.autoencoder.levels": (8, 8)},
            ["first_stage.autoencoder.levels=(8, 8)", "embed_dim=3"],
        ),
        ({"first_stage.autoencoder.levels": (8, 2, 8)}, ["at least 3 each"]),
        (
            {"first_stage.codebook.decay": 0.9, "first_stage.autoencoder.levels": (8, 8, 8)},
            ["first_stage.codebook.decay=0.9", "no first_stage.autoencoder.levels"],
        ),
        (
            {"first_stage.trained": "decoder", "first_stage.init_from": "x",
             "first_stage.codebook.decay": 0.9},
            ["first_stage.codebook.decay=0.9", "first_stage.trained='all'"],
        ),
        (
            {"first_stage.loss.lpips_weights": "x", "first_stage.autoencoder.image_channels": 1},
            ["first_stage.loss.lpips_weights", "3 channels"],
        ),
        ({"stages": ("first_stage", "diffusion")}, ["need what the config has not", "unet"]),
        ({"data.image_size": 66}, ["data.image_size=66", "multiple of 4"]),
    ],
)  # fmt: skip
def test_wrong_values_of_a_first_stage_are_named(keys, said):
    config = MODULES["autoencoder_vq"].get_config("photos")
    if "first_stage.autoencoder.levels" in keys and len(keys) == 1:
        config.first_stage.codebook.decay = 0.0
    with config.ignore_type():
        config.update_from_flattened_dict(keys)
    with pytest.raises(UserError) as raised:
        config_checks.check_config(config)
    assert "\n" not in str(raised.value)
    for part in said:
        assert part in str(raised.value)


@pytest.mark.parametrize(("num_heads", "fits"), [(4, True), (3, False)])
def test_heads_by_their_number(num_heads, fits):
    config = changed("unet.num_heads", num_heads)
    config.unet.head_dim = 0
    if fits:
        config_checks.check_config(config)
    else:
        with pytest.raises(UserError, match=r"unet.num_heads=3 must divide"):
            config_checks.check_config(config)


@pytest.mark.parametrize("image_size", [16, 32, 64, 256])
def test_right_image_sizes(image_size):
    config_checks.check_config(changed("data.image_size", image_size))


@pytest.mark.parametrize("stages", [("first_stage",), ("diffusion",)])
def test_a_single_stage(stages):
    config_checks.check_config(changed("stages", stages))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unet.attention_levels", (0, 7)),
        ("unet.channel_multipliers", ()),
        ("unet.num_groups", 0),
        ("unet.head_dim", 0),
        ("unet.dtype", "float8"),
        ("schedule.name", "nope"),
        ("sample.steps", 0),
        ("sample.steps", 1001),
        ("sample.batch_size", 0),
        ("sample.prompts", ()),
        ("conditioning", "class"),
        ("conditioning", "clip"),
        ("conditioning", "poetry"),
        ("unet.attention", "self"),
        ("unet.attention", "none"),
        ("sample.clip", -1.0),
        ("optimizer.betas", (0.9,)),
        ("first_stage.optimizer.eps", 0.0),
        ("tokenizer.max_length", 1),
        ("first_stage.scale_examples", 0),
        ("log_every", 0),
        ("eval_every", 0),
        ("eval_examples", 0),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
    ],
)
def test_values_that_break_a_run_later_are_found_first(key, value):
    with pytest.raises(UserError, match=key.split(".")[-1]):
        config_checks.check_config(changed(key, value))
