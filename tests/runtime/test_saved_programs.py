"""Compiled programs in files: they run elsewhere, and others are not taken for them."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.runtime import saved_programs
from latent_diffusion_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def lowered(factor: float = 2.0):
    """Of a step over eight devices, whose state is given away."""
    mesh = jax.make_mesh((8,), ("data",))
    split, same = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())

    def step(state, batch):
        return {"w": state["w"] - factor * jnp.mean(batch)}, {"loss": jnp.sum(batch)}

    jitted = jax.jit(step, in_shardings=(same, split), out_shardings=(same, same), donate_argnums=0)
    shapes = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    return jitted.lower(shapes, jax.ShapeDtypeStruct((16,), jnp.float32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "v5e_2x4" / "diffusion"
    program = lowered()
    assert saved_programs.save(path, program, program.compile()) == path.stat().st_size
    return path


ELSEWHERE = """
import pathlib, runpy, sys
import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
from latent_diffusion_jax.runtime import saved_programs

program = runpy.run_path(sys.argv[2])["lowered"]()
step = saved_programs.load(pathlib.Path(sys.argv[1]), program, jax.devices())
state, batch = ({"w": np.ones(4, np.float32)}, np.arange(16, dtype=np.float32))
mesh = jax.make_mesh((8,), ("data",))
state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
new, metrics = step(state, batch)
assert state["w"].is_deleted()
print(float(new["w"][0]), float(metrics["loss"]))
"""


def test_another_process_runs_it(saved):
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(saved), __file__],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [float(word) for word in done.stdout.split()] == [1 - 2 * 7.5, 120.0]


def test_what_is_not_the_same_is_not_run(saved, tmp_path):
    devices = jax.devices()
    with pytest.raises(UserError, match="compiled from another config, mesh or number of devices"):
        saved_programs.load(saved, lowered(3.0), devices)
    with pytest.raises(UserError, match=r"cannot read the compiled program .*nothing"):
        saved_programs.load(saved.with_name("nothing"), lowered(), devices)
    path = tmp_path / "damaged"
    path.with_suffix(".json").write_bytes(saved.with_suffix(".json").read_bytes())
    path.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot load the compiled program .*damaged"):
        saved_programs.load(path, lowered(), devices)
    path.with_suffix(".json").write_text('{"jax": "0.1"}')
    with pytest.raises(UserError, match=r"another version of JAX than this run's \(jax 0\.1, here"):
        saved_programs.load(path, lowered(), devices)


def test_it_computes_the_same_here(saved):
    step = saved_programs.load(saved, lowered(), jax.devices())
    mesh = jax.make_mesh((8,), ("data",))
    state = jax.device_put({"w": np.zeros(4, np.float32)}, jax.NamedSharding(mesh, jax.P()))
    batch = jax.device_put(np.ones(16, np.float32), jax.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_array_equal(step(state, batch)[0]["w"], -2.0)
