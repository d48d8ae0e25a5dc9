"""Our side: `diffusion_jax_side.py CASE FOLDER VARIANT THREADS`, started by diffusion.py."""

import dataclasses
import functools
import pathlib
import sys

import child
from diffusion_cases import (
    CAPTION_DROPOUT,
    CASES,
    COMPARED_STEPS,
    EMA_DECAY,
    FIGURES,
    GUIDANCE_SCALE,
    INPUTS,
    NOISE,
    OPTIMIZER,
    PROMPT,
    SCALE_FACTOR,
    Case,
)

if __name__ == "__main__":
    CHANNEL = child.open_channel()
    child.limit_threads(int(sys.argv[4]))

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax_tools import facts
from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import txt2img as txt2img_configs
from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning.base import Conditioning, drop
from latent_diffusion_jax.conditioning.prompts import tokenize_weighted
from latent_diffusion_jax.diffusion import plan as plans
from latent_diffusion_jax.diffusion.guidance import unguided
from latent_diffusion_jax.diffusion.losses import Objective, sample_timesteps, training_noise
from latent_diffusion_jax.loading import load_model
from latent_diffusion_jax.models.unet import UNet
from latent_diffusion_jax.runtime.compilation import compiler_options
from latent_diffusion_jax.runtime.memory import keep_freed_memory
from latent_diffusion_jax.runtime.randomness import normal_per_key
from latent_diffusion_jax.sampling import Request, Settings, make_draw, make_plan
from latent_diffusion_jax.training.diffusion_stage import make_stage
from latent_diffusion_jax.training.optimizer import make_optimizer
from latent_diffusion_jax.training.state import State, sample_keys
from latent_diffusion_jax.weights import folders, ldm_bert, schedulers, unets

if CASES[sys.argv[1]].task == "train":
    keep_freed_memory()  # as the train command does, before JAX starts
IN_HALF = CASES[sys.argv[1]].dtype == "bfloat16"
jit = functools.partial(jax.jit, compiler_options=compiler_options(IN_HALF))


def load_unet(case: Case, folder: pathlib.Path):
    """The UNet and its parameters in the case's dtype, on the device."""
    dtype = build.DTYPES[case.dtype]
    loaded = unets.load(folder / "unet", dtype)
    return UNet(**loaded.fields, dtype=dtype), jax.device_put(loaded.params)


def forward(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that calls the UNet once; its result is saved first."""
    unet, params = load_unet(case, folder)
    inputs = dict(np.load(folder / INPUTS))
    inputs = jax.device_put([inputs[name] for name in ("latents", "timesteps", "context")])

    @jit
    def apply(params, inputs):
        return unet.apply({"params": params}, *inputs)

    np.savez(save, outputs=np.asarray(apply(params, inputs)))
    return lambda: apply(params, inputs)


def ddim(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that samples latents; its result is saved first."""
    unet, params = load_unet(case, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = schedulers.read_config(folders.read_json(path), str(path))
    settings = Settings(steps=case.steps, **scheduler.settings)
    plan = make_plan(scheduler.schedule, scheduler.prediction_type, settings)
    inputs = dict(np.load(folder / INPUTS))
    keys = jax.random.split(jax.random.key(0), case.batch_size)
    arrays = jax.device_put([inputs["latents"], inputs["context"], plan, keys])

    @jit
    def draw(params, noise, context, plan, keys):
        def network(z_t, t, context):
            return unet.apply({"params": params}, z_t, t, context)

        return plans.sample(unguided(network, context), plans.start(plan, noise), plan, keys)[0]

    np.savez(save, outputs=np.asarray(draw(params, *arrays)))
    return lambda: draw(params, *arrays)


def txt2img(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that draws images from tokens; its result is saved first."""
    model = load_model(folder)
    assert model.tokenizer is not None
    settings = dataclasses.replace(model.settings, steps=case.steps, guidance_scale=GUIDANCE_SCALE)
    plan = make_plan(model.ldm.schedule, model.ldm.prediction_type, settings)
    words, weights = tokenize_weighted(model.tokenizer, [PROMPT, ""], 1)

    def repeated(row: np.ndarray) -> np.ndarray:
        return np.repeat(row[None], case.batch_size, axis=0)

    request = Request(
        seeds=np.arange(case.batch_size, dtype=np.uint32),
        inputs={"tokens": repeated(words[0]), "weights": repeated(weights[0])},
        null_inputs={"tokens": repeated(words[1]), "weights": repeated(weights[1])},
        noise=np.load(folder / INPUTS)["latents"],
    )
    ldm, params = model.ldm, jax.device_put(model.params)
    del model
    draw = jit(make_draw(ldm, ldm.image_size, ldm.image_size))
    request, plan = jax.device_put((request, plan))
    np.savez(save, outputs=np.asarray(draw(params, request, plan)[0]))
    return lambda: draw(params, request, plan)[0]


def train_config(case: Case) -> ConfigDict:
    config = txt2img_configs.get_config(case.model.config)
    config.optimizer.update(OPTIMIZER)
    config.ema_decay = EMA_DECAY
    config.condition_dropout = CAPTION_DROPOUT
    return config


def train(case: Case, folder: pathlib.Path, save: pathlib.Path):
    """A function that makes one update; the figures of the first ones are saved."""
    config = train_config(case)
    text, inputs = ldm_bert.load(folder / "bert"), dict(np.load(folder / INPUTS))
    ldm = build.latent_diffusion(config, text.fields["vocab_size"], text.fields["max_length"])
    stage = make_stage(
        ldm,
        optimizer := make_optimizer(config.num_steps, **config.optimizer),
        Conditioning(lambda record, rng: {}, {"tokens": inputs["null_tokens"]}, {}),
        Request(np.zeros(1, np.uint32)),
        objective=Objective(**config.objective),
        condition_dropout=config.condition_dropout,
        ema_decay=config.ema_decay,
        draw=make_draw(ldm, ldm.image_size, ldm.image_size),
        plan=build.sample_plan(config),
    )
    key = jax.random.key(1)
    params = {"conditioner": text.params, "unet": unets.load(folder / "unet").params}
    params = jax.device_put(params)
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(stage.init, key).params)
    state = State(
        jnp.zeros((), jnp.int32),
        params,
        jax.tree.map(jnp.copy, params),
        optimizer.init(params),
        {"scale_factor": jnp.float32(SCALE_FACTOR)},
    )
    batch = jax.device_put({name: inputs[name] for name in ("tokens", "moments")})
    step = jit(stage.train_step, donate_argnums=0)

    figures = []
    for _ in range(COMPARED_STEPS):
        state, metrics = step(state, batch, key)
        figures.append([float(metrics[name]) for name in FIGURES])
    np.savez(save, outputs=np.array(figures))

    def run():
        nonlocal state
        state, metrics = step(state, batch, key)
        return state, metrics

    return run


def write_noise(case: Case, folder: pathlib.Path) -> None:
    """All that is random in the first steps of `train`, for the other side."""
    config, inputs = train_config(case), np.load(folder / INPUTS)
    ldm = build.latent_diffusion(config, 1, 1)
    steps = []
    for step in range(COMPARED_STEPS):
        keys = sample_keys(jax.random.key(1), np.int32(step), case.batch_size)
        noise_keys, t_keys, drop_keys = jnp.unstack(
            jax.vmap(lambda key: jax.random.split(key, 3))(keys), axis=1
        )
        noises = jax.vmap(jax.random.split)(noise_keys)
        objective = Objective(**config.objective)
        steps.append(
            {
                "tokens": drop(inputs["tokens"], inputs["null_tokens"], drop_keys, CAPTION_DROPOUT),
                "timesteps": sample_timesteps(ldm.schedule, t_keys),
                "posterior": normal_per_key(noises[:, 0], ldm.latent_shape),
                "epsilon": training_noise(objective, noises[:, 1], ldm.latent_shape),
            }
        )
    np.savez(folder / NOISE, **{name: np.stack([s[name] for s in steps]) for name in steps[0]})


TASKS = {"forward": forward, "ddim": ddim, "txt2img": txt2img, "train": train}

if __name__ == "__main__":
    CASE, FOLDER = CASES[sys.argv[1]], pathlib.Path(sys.argv[2])
    if sys.argv[3] == "noise":
        write_noise(CASE, FOLDER)
        child.reply(CHANNEL, {})
    else:
        run = TASKS[CASE.task](CASE, FOLDER, FOLDER / "ours.npz")
        child.serve(run, jax.block_until_ready, CASE.repeats, facts, CHANNEL)
