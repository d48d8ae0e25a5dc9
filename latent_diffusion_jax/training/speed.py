"""How fast training is, and traces that say why."""

import contextlib
import pathlib
import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from latent_diffusion_jax.runtime.chips import find_chip


class Speed:
    """Figures of the steps since they were last asked for.

    Attributes:
      waited: seconds that the loop has waited for data since then.
    """

    def __init__(self, batch_size: int, flops: float, mesh: Mesh):
        """`flops` are the model's of one step over the mesh (`runtime.flops`)."""
        self._batch_size, self._flops_of_device = batch_size, flops / mesh.size
        self._chip = find_chip(mesh.devices.flat[0].device_kind)
        self.restart(0)

    def restart(self, step: int) -> None:
        """What follows is measured from here on."""
        self._step, self._time, self.waited = step, time.perf_counter(), 0.0

    def measure(self, step: int) -> dict[str, float]:
        """Seconds and images, TFLOP/s of a device, utilisation (MFU) where the device's peak is
        known, and the share of the time that was spent waiting for data."""
        steps, elapsed = step - self._step, time.perf_counter() - self._time
        if not steps:
            return {"images_per_second": 0.0, "seconds_per_step": 0.0}
        seconds = elapsed / steps
        found = {
            "images_per_second": self._batch_size / seconds,
            "seconds_per_step": seconds,
            "tflops_per_device": self._flops_of_device / seconds / 1e12,
            "waiting_for_data": self.waited / elapsed,
        }
        if self._chip is not None:
            found["mfu"] = self._flops_of_device / seconds / self._chip.flops
        self.restart(step)
        return found


class Profile:
    """A trace of some steps, for XProf."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int], start_step: int):
        """`steps` are the first one after `start_step` that is traced, and how many are."""
        self._folder = folder
        self._first = start_step + steps[0]
        self._last = self._first + steps[1]
        self._on = False

    @contextlib.contextmanager
    def step(self, step: int, before: Any = None):
        """Around the step that follows step `step`.

        `before` is what that step gave. A trace begins and ends when it is there, so that what is
        in it are whole steps.
        """
        if self._first <= step < self._last and not self._on:
            jax.block_until_ready(before)
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        if self._on and step >= self._last:
            jax.block_until_ready(before)
            self.close()
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            yield

    def close(self) -> None:
        """Ends the trace and writes it, where there is one."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            logging.info("trace of steps %d to %d in %s", self._first, self._last, self._folder)
