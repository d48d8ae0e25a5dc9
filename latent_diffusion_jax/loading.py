"""Models to draw with, from wherever they lie: a workdir, a diffusers folder, a single file."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from latent_diffusion_jax import build, conditions, first_stages, older_configs, published
from latent_diffusion_jax.diffusion.process import PREDICTION_TYPES
from latent_diffusion_jax.loaded_model import Model
from latent_diffusion_jax.runtime import checkpoints, files, sharding
from latent_diffusion_jax.runtime.errors import UserError


def load_model(
    path: str | pathlib.Path,
    *,
    dtype: str = "float32",
    tokenizer: str | pathlib.Path | None = None,
    ema: bool = True,
    num_heads: int | None = None,
    prediction_type: str | None = None,
) -> Model:
    """Loads a model; arguments as for `pipelines.load`.

    Raises:
      UserError: nothing is there, or it is damaged, incomplete or of another kind.
    """
    if dtype not in build.DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(build.DTYPES)}")
    path = pathlib.Path(path).expanduser().absolute()
    if path.is_file():
        with files.unusable(path):
            model = published.load_file(
                path, tokenizer, ema, num_heads, prediction_type, build.DTYPES[dtype]
            )
    elif (path / published.INDEX_FILE).is_file():
        with files.unusable(path):
            model = published.load_folder(path, build.DTYPES[dtype])
    else:
        workdir, step = checkpoints.workdir_and_step(path, "diffusion")
        if not path.is_dir():
            raise UserError(f"{path} does not exist")
        if step is None:
            raise UserError(
                f"{path} is no model: it has neither {published.INDEX_FILE}, as folders of "
                "diffusers have, nor a checkpoint of the diffusion stage, as workdirs of train have"
            )
        model = _load_workdir(workdir, step)
    return _computing_in(model, dtype) if dtype != "float32" else model


def define_flags() -> None:
    """Flags of the commands that load models, for what single files do not say."""
    flags.DEFINE_string("tokenizer", None, "Folder of the tokenizer, for single files.")
    flags.DEFINE_integer(
        "num_heads", None, "Heads of the UNet's attention, for single files.", lower_bound=1
    )
    flags.DEFINE_enum(
        "prediction_type", None, PREDICTION_TYPES, "What the UNet predicts, for single files."
    )


def flag_values() -> dict[str, Any]:
    """Keyword arguments of `load_model` from those flags."""
    return {name: flags.FLAGS[name].value for name in ("tokenizer", "num_heads", "prediction_type")}


def _computing_in(model: Model, dtype: str) -> Model:
    wanted = build.DTYPES[dtype]
    params = jax.tree.map(
        lambda leaf: leaf.astype(wanted, copy=False) if np.ndim(leaf) else leaf, model.params
    )
    return dataclasses.replace(model, ldm=build.computing_in(model.ldm, dtype), params=params)


def _load_workdir(workdir: pathlib.Path, step: int) -> Model:
    """What `train` left: the moving average of the second stage, the decoder."""
    directory = workdir / "diffusion"
    config = older_configs.of_checkpoint(directory, step)
    try:
        parts = conditions.restore(config, workdir, step)
        ldm, conditioning = parts.network(config), parts.host_half(config)
        settings = build.sample_settings(config)
    except (AttributeError, KeyError) as error:  # ml_collections names the key
        raise UserError(f"{workdir} is of another version: its config lacks {error}") from error
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices()[:1])
    null = {name: jnp.asarray(value)[None] for name, value in conditioning.null.items()}
    shapes = {"ema": jax.eval_shape(lambda key: ldm.init_trained(key, null), jax.random.key(0))}
    params = checkpoints.restore_part(
        directory, step, checkpoints.abstract(shapes, sharding.state_sharding(shapes, mesh))
    )["ema"]
    if ldm.autoencoder is not None:
        params |= first_stages.load_frozen(config, workdir, mesh)
    if parts.clip is not None:
        params["conditioner"] = parts.clip.params
    return Model(
        ldm,
        params,
        parts.tokenizer,
        settings,
        config.sample.batch_size,
        label_names=parts.label_names,
        null_label=ldm.num_labels - 1 if ldm.num_labels else None,
        config=config,
    )
