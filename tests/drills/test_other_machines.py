"""A run that goes on elsewhere, on other devices, processes and meshes, sees the same samples.

pytest -m slow -o faulthandler_timeout=0 tests/drills/test_other_machines.py

Sums are rounded in another order there. As in test_distributed.py, Adam's epsilon is so large that
its steps are the gradients' size, and the discriminator has no weight, which gradients decide that
are nearly zero: both would make more of rounding than there is.
"""

import re
import signal

import numpy as np
import pytest

from tests.drills.runs import STAGES, last_step, start, steps_done
from tests.test_distributed import TINY, figures, state_of

STEPS = 40  # of each stage
FLAGS = (
    *TINY,
    "--config.unet.channels=64",  # enough to be split over `fsdp`
    f"--config.first_stage.num_steps={STEPS}",
    f"--config.num_steps={STEPS}",
    "--config.log_every=1",
    "--config.eval_every=10",
    "--config.checkpoint_every=1000",
    "--config.keep_checkpoints=100",
)
MACHINES = [  # (processes, devices of each, mesh)
    (1, 1, {"data": 1, "fsdp": 1, "tensor": 1}),
    (2, 2, {"data": 2, "fsdp": 2, "tensor": 1}),
    (1, 4, {"data": 1, "fsdp": 2, "tensor": 2}),
]
MOVES = [(0, 5), (1, 15), (2, STEPS + 5), (0, STEPS + 15), (1, None)]  # (machine, step to leave at)


@pytest.mark.slow
def test_a_run_that_moves_sees_the_same_samples(tmp_path, data_dir):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "moved"

    def start_on(machine, workdir):
        processes, devices, mesh = MACHINES[machine]
        flags = (f"--config.mesh.{axis}={size}" for axis, size in mesh.items())
        flags = (*FLAGS, f"--config.data.data_dir={data_dir}", *flags)
        return start(workdir, flags, processes, devices)

    start_on(0, undisturbed).finish()
    left = []
    for machine, goal in MOVES:
        run = start_on(machine, workdir)
        if goal is None:
            said = run.finish()
        else:
            run.wait_for(lambda goal=goal: steps_done(workdir) >= goal)
            run.process.send_signal(signal.SIGTERM)
            said = run.finish(128 + signal.SIGTERM)
            (stop,) = re.findall(r"(\w+): stopped and saved at step (\d+) of", said)
            assert last_step(workdir, stop[0]) == int(stop[1]) < STEPS
        processes, _, mesh = MACHINES[machine]
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
        assert f"{processes} process(es); mesh: {axes}" in said
        if left:
            assert "{}: goes on from step {}".format(*left[-1]) in said
        left.append(stop)
    assert [stage for stage, _ in left[:-1]] == ["first_stage"] * 2 + ["diffusion"] * 2
    ours, theirs = figures(workdir), figures(undisturbed)
    assert ours.keys() == theirs.keys()
    for stage in STAGES:
        assert last_step(workdir, stage) == STEPS
        losses = [(name, ours[name]) for name in ours if name[0] == stage and "loss" in name[2]]
        assert {name[1] for name, _ in losses} == set(range(1, STEPS + 1))
        errors = {name: abs(value / theirs[name] - 1) for name, value in losses if theirs[name]}
        print(f"\n{stage}: losses differ by {max(errors.values()):.1e}")
        for name, value in losses:
            np.testing.assert_allclose(value, theirs[name], rtol=1e-5, err_msg=str(name))
        weights = [
            state_of(folder, stage, STEPS, ("params", "ema")) for folder in (workdir, undisturbed)
        ]
        assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 50
        largest = max(np.abs(leaf).max() for leaf in weights[1].values())
        for name, leaf in weights[1].items():  # some are zero but for rounding
            np.testing.assert_allclose(
                weights[0][name], leaf, rtol=1e-5, atol=1e-5 * largest, err_msg=name
            )
