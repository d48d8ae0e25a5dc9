r"""Encodes a dataset once, so that the second stage need not do it at every step.

  python -m latent_diffusion_jax.encode --first_stage=runs/digits --out=data/digits_latents
  python -m latent_diffusion_jax.train --config=configs/txt2img.py --workdir=runs/digits \
      --config.data.latents=data/digits_latents

--first_stage is a workdir, a diffusers folder or a CompVis file. --config=FILE, with its
overrides, says which data, and how they are cropped; default is the workdir's own config. Both
splits are encoded, the crop at the centre and, with data.random_flip, mirrored too; --crops=N takes
N random crops of each training image instead.

All devices share the work, and all processes, each with files of its own. Called again after an
interruption it goes on: each process loses at most the file that it was writing.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from latent_diffusion_jax import build, first_stages
from latent_diffusion_jax.config_checks import check_config
from latent_diffusion_jax.data import latents
from latent_diffusion_jax.data.encoding import Split, encode_shards, views
from latent_diffusion_jax.first_stages import FirstStage
from latent_diffusion_jax.runtime import checkpoints, loggers, processes, sharding
from latent_diffusion_jax.runtime.commands import StopRequest, differences, run
from latent_diffusion_jax.runtime.compilation import compiler_options
from latent_diffusion_jax.runtime.errors import UserError, as_user_error
from latent_diffusion_jax.runtime.images import to_float

FLAGS = flags.FLAGS

BATCH_PER_DEVICE = 8
SHARD_SIZE = 4_096  # images; of 32x32x8 moments in float16 that is 64 MiB
DATA_KEYS = ("name", "train_split", "test_split", "image_key", "caption_key", "caption_template",
             "holdout_share", "resize")  # fmt: skip
FREE_KEYS = ("done", "scale_factor", "autoencoder.source", "autoencoder.fields.remat",
             "splits.train.records", "splits.test.records")  # fmt: skip  # may differ between calls


def encode_dataset(
    config: ConfigDict,
    first_stage: FirstStage,
    origin: str,
    out: str | pathlib.Path,
    *,
    dtype: str = latents.DTYPES[0],
    crops: int = 1,
    batch_size: int | None = None,
    shard_size: int = SHARD_SIZE,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Writes a folder of latents; see `data.latents` for what is in it.

    Args:
      config: whose data are encoded; `first_stage` must be the network that it names.
      first_stage: the autoencoder.
      origin: where it is from, for messages.
      out: the folder. Files that are whole in it are kept, if they are of the same settings.
      dtype: that moments are stored in, one of `latents.DTYPES`.
      crops: of each training image. 1: at the centre, else random ones.
      batch_size: images that a process encodes at once; default 8 for each of its devices.
      shard_size: images in a file.
      should_stop: asked after every batch.

    Returns:
      Whether all is encoded; False where `should_stop` ended it.

    Raises:
      UserError: the config, the autoencoder, the data or the folder do not fit, too many images
        are damaged, or the autoencoder gives what is not finite.
    """
    out = pathlib.Path(out).expanduser().absolute()
    with as_user_error("the config does not fit the networks"):
        check_config(config)
    first_stages.check_same_network(config, first_stage, pathlib.Path(origin))
    count, process = jax.process_count(), jax.process_index()
    # A process works with its own devices, so that none has to wait for another.
    devices = jax.local_devices()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
    batch_size = batch_size or BATCH_PER_DEVICE * len(devices)
    sharding.check_batch_size(batch_size, mesh, "--batch_size")
    config = config.copy_and_resolve_references()
    config.data.check_images = 0  # all of them are read anyway
    flips = 2 if config.data.random_flip else 1
    sources = build.data_sources(config)
    splits = [
        Split("train", sources[0], crops, flips, shard_size),
        Split("test", sources[1], 1, 1, shard_size),
    ]
    network = build.autoencoder(config)  # computes in the config's dtype
    index = describe(config, first_stage, origin, splits, dtype)
    if begin(out, index):
        logging.info("%s: complete, nothing to do", out)
        return True
    params = jax.device_put(jax.device_get(first_stage.params), sharding.replicated(mesh))
    program = make_program(network, params, mesh, dtype)
    stopped = False
    for split in splits:
        read = functools.partial(
            views,
            split,
            image_size=config.data.image_size,
            resize=config.data.resize,
            seed=config.seed,
        )
        shards = [
            i
            for i in range(process, split.num_shards, count)
            if not latents.shard_path(out, split.name, i, split.num_shards).exists()
        ]
        stopped = not encode_shards(
            *(split, shards, out, read, program),
            batch_size=batch_size,
            num_threads=config.data.num_threads,
            should_stop=should_stop,
        )
        if stopped:
            break
    # All come here, also those that were done before the others were asked to stop.
    if processes.highest(stopped):
        return False
    if process == 0:
        finish(out, index, splits, config.data.max_damaged_share)
    processes.wait_for_all("finished")
    return True


def describe(
    config: ConfigDict, first_stage: FirstStage, origin: str, splits: list[Split], dtype: str
) -> dict[str, Any]:
    """Contents of `latents.json` for a folder that is not finished."""
    network = build.autoencoder(config)
    side = config.data.image_size // network.downsampling_factor
    return {
        "format": latents.FORMAT,
        "done": False,
        "image_size": config.data.image_size,
        "moments_shape": [side, side, network.moments_channels],
        "dtype": dtype,
        "crops_seed": config.seed,
        "data": {key: config.data[key] for key in DATA_KEYS},
        "label_names": list(splits[0].source.records.label_names),
        "splits": {
            split.name: {
                "images": len(split.source),
                "views": [split.crops, split.flips],
                "shard_size": split.shard_size,
            }
            for split in splits
        },
        "scale_factor": first_stage.scale_factor,
        "autoencoder": {
            "kind": config.first_stage.kind,
            "fields": json.loads(config.first_stage.autoencoder.to_json()),
            "fingerprint": first_stages.encoder_fingerprint(first_stage.params),
            "source": origin,
        },
    }


def begin(out: pathlib.Path, index: dict[str, Any]) -> bool:
    """Makes the folder, unless there is one of the same settings; whether that is finished.

    Raises:
      UserError: it holds latents of other settings, or cannot be written to.
    """
    found = latents.read_index(out)
    if found is not None:
        different = differences(found, json.loads(json.dumps(index)), FREE_KEYS)
        if different:
            raise UserError(
                f"{out} holds latents of other settings; they differ in {different}. "
                "Take another --out, or delete that folder"
            )
    processes.wait_for_all("compared")  # all have looked before the first one writes
    try:
        out.mkdir(parents=True, exist_ok=True)
        if found is None and jax.process_index() == 0:
            checkpoints.write_json(out / latents.INDEX_FILE, index)
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error.strerror}") from error
    return found is not None and found["done"]


def make_program(network: Any, params: Any, mesh: Mesh, dtype: str) -> Callable[..., jax.Array]:
    """uint8 [B, H, W, C] on the host -> moments [B, h, w, c] on their way from the devices."""

    @functools.partial(
        jax.jit,
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=compiler_options(),
    )
    def program(params: Any, batch: jax.Array) -> jax.Array:
        posterior = network.apply({"params": params}, to_float(batch), method="encode")
        return posterior.moments.astype(dtype)

    def start(batch: np.ndarray) -> jax.Array:
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        return sharding.over(mesh, program)(params, rows)

    return start


def finish(
    out: pathlib.Path, index: dict[str, Any], splits: list[Split], max_damaged_share: float
) -> None:
    """Looks whether every file is there and whole, and says so in `latents.json`.

    Raises:
      UserError: one is not, or too many images were damaged.
    """
    for split in splits:
        counts = [
            latents.count_records(latents.shard_path(out, split.name, i, split.num_shards))
            for i in range(split.num_shards)
        ]
        size = len(split.source)
        damaged, allowed = size - sum(counts), int(max_damaged_share * size)
        if damaged > allowed:
            raise UserError(
                f"{damaged} of {size} images of {split.name} cannot be decoded; at most {allowed} "
                f"may be skipped (data.max_damaged_share={max_damaged_share})"
            )
        if damaged:
            logging.warning("%s: %d damaged images are left out", split.name, damaged)
        index["splits"][split.name]["records"] = counts
    index["done"] = True
    checkpoints.write_json(out / latents.INDEX_FILE, index)


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Config file, then overrides; default the workdir's own config."
    )
    flags.DEFINE_string(
        "first_stage", None, "A workdir, a checkpoint in it (WORKDIR/first_stage/STEP), a "
        "diffusers folder or a CompVis file; default the config's first_stage.init_from.",
    )  # fmt: skip
    flags.DEFINE_string("out", None, "Folder for the latents.", required=True)
    flags.DEFINE_enum("dtype", latents.DTYPES[0], latents.DTYPES, "That moments are stored in.")
    flags.DEFINE_integer(
        "crops", 1, "Crops of each training image: 1 at the centre, or N random ones, of which "
        "training takes another each time.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer(
        "batch_size", None, f"Images that a process encodes at once; default {BATCH_PER_DEVICE} "
        "for each of its devices.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer("shard_size", SHARD_SIZE, "Images in a file.", lower_bound=1)


def open_inputs(
    config: ConfigDict | None, path: str | None
) -> tuple[ConfigDict, FirstStage, pathlib.Path]:
    """The config and the first stage that the flags ask for, and where the latter is.

    Raises:
      UserError: they do not say enough, or there is no complete first stage.
    """
    path = path or (config.first_stage.init_from if config is not None else None)
    if not path:
        raise UserError("give --first_stage=PATH: a workdir, a diffusers folder or a CompVis file")
    origin = pathlib.Path(path).expanduser()
    found = first_stages.open_first_stage(
        origin, sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    )
    if found.config is not None:
        first_stages.complete_step(found.config, origin.absolute())
    config = config or found.config
    if config is None:
        raise UserError(f"--first_stage={path} does not say which data to encode; give --config")
    return config, found, origin


def main() -> None:
    loggers.set_up_logging()
    config, first_stage, origin = open_inputs(FLAGS.config, FLAGS.first_stage)
    with StopRequest() as stop:
        finished = encode_dataset(
            *(config, first_stage, str(origin), FLAGS.out),
            dtype=FLAGS.dtype,
            crops=FLAGS.crops,
            batch_size=FLAGS.batch_size,
            shard_size=FLAGS.shard_size,
            should_stop=stop,
        )
    status = processes.highest(stop.exit_status)
    if not finished:
        sys.exit(status)
    if jax.process_index() == 0:
        print(f"-> {FLAGS.out}; train from them with --config.data.latents={FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run(main)
