"""PyTorch's side: `diffusion_torch_side.py CASE FOLDER VARIANT THREADS`, by diffusion.py."""

import json
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
    TIMESTEPS,
    Case,
    Model,
)

if __name__ == "__main__":
    CHANNEL = child.open_channel()
    child.limit_threads(int(sys.argv[4]))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from torch_tools import DEVICE, facts, from_nhwc, prepared, to_nhwc, wait
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    """A tokenizer of CLIP's layout that knows bytes, and no words made of them."""
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(c + "</w>" for c in characters), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def make_pipeline(model: Model, words: pathlib.Path) -> StableDiffusionPipeline:
    """Stable Diffusion with random weights; the tokenizer's folder is made."""
    tokenizer = make_tokenizer(words)
    size = len(tokenizer)
    text = CLIPTextConfig(
        vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, **model.text
    )
    assert model.autoencoder is not None
    stages = len(model.autoencoder["block_out_channels"])
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * stages,
            up_block_types=["UpDecoderBlock2D"] * stages,
            **model.autoencoder,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**model.unet),
        scheduler=DDIMScheduler(**model.schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_shared(case: Case, folder: pathlib.Path) -> None:
    """Random weights and inputs for both sides."""
    torch.manual_seed(0)
    model, rng = case.model, np.random.default_rng(0)
    if case.task == "txt2img":
        make_pipeline(model, folder / "words").save_pretrained(folder)
    else:
        UNet2DConditionModel(**model.unet).save_pretrained(folder / "unet")
    if case.task == "ddim":
        DDIMScheduler(**model.schedule).save_pretrained(folder / "scheduler")

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(case.batch_size, *shape)).astype(np.float32)

    inputs = {
        "latents": normal(*model.latent_shape),
        "timesteps": rng.integers(0, TIMESTEPS, case.batch_size, dtype=np.int32),
        "context": normal(model.context_length, model.unet["cross_attention_dim"]),
    }
    if case.task == "train":
        LDMBertModel(LDMBertConfig(**model.text)).save_pretrained(folder / "bert")
        shape = (case.batch_size, model.context_length)
        tokens = rng.integers(1, model.text["vocab_size"], shape, dtype=np.int32)
        inputs |= {
            "moments": np.concatenate([inputs["latents"], normal(*model.latent_shape) - 3], -1),
            "tokens": tokens,
            "null_tokens": np.zeros(model.context_length, np.int32),
        }
    np.savez(folder / INPUTS, **inputs)


def load_unet(case: Case, folder: pathlib.Path, variant: str) -> UNet2DConditionModel:
    dtype = getattr(torch, case.dtype)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    return prepared(unet, variant)


def on_device(x: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    return torch.tensor(x).to(DEVICE, dtype and getattr(torch, dtype))


def forward(case: Case, folder: pathlib.Path, variant: str):
    """A function that calls the UNet once; its result is saved first."""
    unet = load_unet(case, folder, variant).eval()
    inputs = np.load(folder / INPUTS)
    latents = from_nhwc(inputs["latents"], variant).to(unet.dtype)
    timesteps, context = on_device(inputs["timesteps"]), on_device(inputs["context"], case.dtype)
    apply = torch.compile(unet) if variant == "compile" else unet

    @torch.no_grad()
    def run() -> torch.Tensor:
        return apply(latents, timesteps, context, return_dict=False)[0]

    np.savez(folder / f"{variant}.npz", outputs=to_nhwc(run()))
    return run


def ddim(case: Case, folder: pathlib.Path, variant: str):
    """A function that samples latents; its result is saved first."""
    unet = load_unet(case, folder, variant).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    inputs = np.load(folder / INPUTS)
    noise, context = from_nhwc(inputs["latents"], variant), on_device(inputs["context"])
    apply = torch.compile(unet) if variant == "compile" else unet

    @torch.no_grad()
    def run() -> torch.Tensor:
        scheduler.set_timesteps(case.steps, device=DEVICE)
        z = noise
        for t in scheduler.timesteps:
            z = scheduler.step(apply(z, t, context, return_dict=False)[0], t, z).prev_sample
        return z

    np.savez(folder / f"{variant}.npz", outputs=to_nhwc(run()))
    return run


def txt2img(case: Case, folder: pathlib.Path, variant: str):
    """A function that draws images from a prompt; its result is saved first, in [-1, 1]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    latents = from_nhwc(np.load(folder / INPUTS)["latents"], variant)

    def run() -> torch.Tensor:
        return pipeline(
            [PROMPT] * case.batch_size,
            num_inference_steps=case.steps,
            guidance_scale=GUIDANCE_SCALE,
            latents=latents,
            output_type="pt",
        ).images

    np.savez(folder / f"{variant}.npz", outputs=2 * to_nhwc(run()) - 1)
    return run


def train(case: Case, folder: pathlib.Path, variant: str):
    """A function that makes one update; the figures of the first ones are saved."""
    unet = load_unet(case, folder, variant).train()
    bert = prepared(LDMBertModel.from_pretrained(folder / "bert"), variant).train()
    params = [
        parameter
        for network in (unet, bert.model)  # not what gives logits
        for parameter in network.parameters()
    ]
    optimizer = torch.optim.AdamW(
        params,
        OPTIMIZER["learning_rate"],
        OPTIMIZER["betas"],
        weight_decay=OPTIMIZER["weight_decay"],
        fused=True,
    )
    average = [parameter.detach().clone() for parameter in params]
    alpha_bar = DDIMScheduler(**case.model.schedule).alphas_cumprod.to(DEVICE)
    inputs, noise = np.load(folder / INPUTS), dict(np.load(folder / NOISE))
    moments = from_nhwc(inputs["moments"], variant)
    tokens, null_tokens = on_device(inputs["tokens"]), on_device(inputs["null_tokens"])

    def loss_of(
        tokens: torch.Tensor, t: torch.Tensor, posterior: torch.Tensor, epsilon: torch.Tensor
    ) -> torch.Tensor:
        mean, logvar = moments.chunk(2, 1)
        z_0 = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * posterior) * SCALE_FACTOR
        level = alpha_bar[t][:, None, None, None]
        z_t = level.sqrt() * z_0 + (1 - level).sqrt() * epsilon
        context = bert.model(tokens, return_dict=False)[0]
        return F.mse_loss(unet(z_t, t, context, return_dict=False)[0], epsilon)

    measure = torch.compile(loss_of) if variant == "compile" else loss_of
    updates = 0

    def step(*random: torch.Tensor) -> list[torch.Tensor]:
        nonlocal updates
        loss = measure(*random)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, OPTIMIZER["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + updates) / (10 + updates))
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - decay)
        updates += 1
        return [loss, norm]

    figures = []
    for i in range(COMPARED_STEPS):
        found = step(
            on_device(noise["tokens"][i]),
            on_device(noise["timesteps"][i]),
            from_nhwc(noise["posterior"][i], variant),
            from_nhwc(noise["epsilon"][i], variant),
        )
        figures.append([figure.item() for figure in found])
    assert len(figures[0]) == len(FIGURES)
    np.savez(folder / f"{variant}.npz", outputs=np.array(figures))

    def run() -> list[torch.Tensor]:
        size, shape = len(tokens), (len(tokens), *case.model.latent_shape[::-1])
        dropped = torch.rand(size, 1, device=DEVICE) < CAPTION_DROPOUT
        return step(
            torch.where(dropped, null_tokens, tokens),
            torch.randint(TIMESTEPS, (size,), device=DEVICE, dtype=torch.int32),
            torch.randn(shape, device=DEVICE),
            torch.randn(shape, device=DEVICE),
        )

    return run


TASKS = {"forward": forward, "ddim": ddim, "txt2img": txt2img, "train": train}

if __name__ == "__main__":
    CASE, FOLDER, VARIANT = CASES[sys.argv[1]], pathlib.Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(int(sys.argv[4]))
    if VARIANT == "shared":
        write_shared(CASE, FOLDER)
        child.reply(CHANNEL, {})
    else:
        run = TASKS[CASE.task](CASE, FOLDER, VARIANT)
        child.serve(run, wait, CASE.repeats, facts, CHANNEL)
