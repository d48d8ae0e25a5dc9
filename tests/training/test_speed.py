"""Figures of speed, and traces of steps."""

import math
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from latent_diffusion_jax.training.speed import Speed


def mesh_of(kind: str, size: int):
    device = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(size=size, devices=np.array([device] * size))


def test_figures_are_those_of_the_steps_since_the_last_ones(monkeypatch):
    clock = iter([0.0, 100.0, 104.0, 104.0, 106.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = Speed(batch_size=8, flops=394e12, mesh=mesh_of("TPU v5 lite", 4))
    speed.restart(10)
    speed.waited = 1.0
    found = speed.measure(12)  # two steps in four seconds
    assert found["seconds_per_step"] == 2.0 and found["images_per_second"] == 4.0
    assert found["tflops_per_device"] == pytest.approx(394 / 4 / 2)
    assert found["mfu"] == pytest.approx(394 / 4 / 2 / 197)
    assert found["waiting_for_data"] == 0.25
    found = speed.measure(16)
    assert found["seconds_per_step"] == 0.5 and found["waiting_for_data"] == 0.0


def test_utilisation_is_not_said_of_devices_whose_peak_is_not_known():
    speed = Speed(8, 1e9, mesh_of("cpu", 1))
    assert "mfu" not in speed.measure(1) and math.isfinite(speed.measure(2)["tflops_per_device"])


def test_no_step_has_no_speed():
    speed = Speed(8, 1e9, mesh_of("cpu", 1))
    speed.restart(5)
    assert speed.measure(5) == {"images_per_second": 0.0, "seconds_per_step": 0.0}


TRACED = """
import pathlib, sys
import jax
from latent_diffusion_jax.training.speed import Profile

profile = Profile(pathlib.Path(sys.argv[1]), (1, int(sys.argv[2])), start_step=7)
double = jax.jit(lambda x: 2 * x)
for step in range(7, 12):
    with profile.step(step):
        double(jax.numpy.ones(4)).block_until_ready()
profile.close()
"""


@pytest.mark.parametrize("steps", [0, 2])
def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path, steps):
    # In a process of its own: where the compiler for TPUs is loaded and there is no TPU, as in
    # other tests, the profiler of that library takes the process down.
    command = [sys.executable, "-c", TRACED, str(tmp_path), str(steps)]
    subprocess.run(command, check=True, timeout=300)
    traces = list(tmp_path.rglob("*.xplane.pb"))
    assert len(traces) == (1 if steps else 0)
    found = [
        dict(event.stats)["step_num"]
        for trace in traces
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert found == [9, 10][:steps]
