"""20,000 steps take no more memory, threads, files or compiled programs at the end than before.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_long_run.py
"""

import gc
import os
import pathlib
import threading

import jax
import pytest

from latent_diffusion_jax.train import train

STEPS = 20_000
EVERY = 500  # steps between looks, and between checkpoints
SETTLED = 6_000  # steps after which all that happens in a run has happened several times


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["first_stage", "diffusion"])
def test_nothing_grows(smoke_config, tmp_path, stage):
    """Of images; the second stage encodes them, and draws a few at each evaluation."""
    if stage == "first_stage":
        smoke_config.stages = (stage,)
        smoke_config.first_stage.num_steps = STEPS
    else:
        smoke_config.first_stage.num_steps = 1
        smoke_config.num_steps = STEPS
    smoke_config.first_stage.autoencoder.channel_multipliers = (1, 1)
    smoke_config.data.image_size, smoke_config.data.num_threads = 16, 2
    smoke_config.log_every, smoke_config.eval_every = EVERY // 10, EVERY
    smoke_config.checkpoint_every, smoke_config.keep_checkpoints = EVERY, 2
    smoke_config.sample.steps = 2
    seen, asked = [], 0

    def look() -> bool:
        nonlocal asked
        asked += 1
        if asked % EVERY == EVERY // 2:  # between two checkpoints
            gc.collect()
            seen.append(
                {
                    "memory": resident(),
                    "threads": threading.active_count(),
                    "files": len(os.listdir("/proc/self/fd")),
                    "programs": len(jax.devices()[0].client.live_executables()),
                }
            )
        return False

    assert train(smoke_config, tmp_path / "run", look)
    early = [figures for figures in seen if seen.index(figures) * EVERY >= SETTLED][:5]
    late = seen[-5:]
    assert len(seen) > 30
    for name in seen[0]:
        before = sorted(figures[name] for figures in early)[2]  # the median
        after = sorted(figures[name] for figures in late)[2]
        print(
            f"\n{name}: {seen[0][name]} at first, {before} at {SETTLED} steps, {after} at the end"
        )
        assert after <= before * (1.02 if name == "memory" else 1.0), name
