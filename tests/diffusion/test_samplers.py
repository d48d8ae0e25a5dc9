"""Every sampler against `diffusers`, step by step with the same noise."""

import importlib

import diffusers
import jax
import numpy as np
import pytest
import torch

from latent_diffusion_jax.diffusion import plan as plans
from latent_diffusion_jax.diffusion.samplers import SAMPLERS, plan_sampler
from latent_diffusion_jax.diffusion.schedules import make_schedule
from latent_diffusion_jax.runtime.randomness import normal_per_key
from tests.diffusion.toy import BETAS, SCHEDULE, normal, predict, torch_predict

ROWS, SHAPE = 2, (3, 2)
Z_T = normal(0, ROWS, *SHAPE)
KEYS = jax.random.split(jax.random.key(0), ROWS)
OF_DIFFUSERS = {"epsilon": "epsilon", "z_0": "sample", "v": "v_prediction"}

run = jax.jit(lambda z, plan: plans.sample(predict, z, plan, KEYS)[0])


def noise(i: int) -> np.ndarray:
    """What the sampler draws in row i."""
    return np.array(normal_per_key(jax.vmap(jax.random.fold_in, (0, None))(KEYS, i), SHAPE))


def ours(plan: plans.Plan, z_T: np.ndarray = Z_T) -> list[np.ndarray]:
    """Samples after each row."""
    plan, z = plans.padded(plan, 2000), plans.start(plan, z_T)
    rows = int(plan.num_rows)
    return [np.asarray(run(z, plan._replace(num_rows=np.int32(k + 1)))) for k in range(rows)]


def theirs(scheduler, num_steps: int, monkeypatch, **step_options) -> list[np.ndarray]:
    """Samples after each call of the network, at unit variance."""
    calls = [0]

    def draw(*args, **kwargs):
        return torch.tensor(noise(calls[0]), dtype=torch.float64)

    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(num_steps)
    sample = torch.tensor(Z_T, dtype=torch.float64) * scheduler.init_noise_sigma
    found = []
    for i, t in enumerate(scheduler.timesteps):
        calls[0] = i
        seen = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(torch_predict(seen, t), t, sample, **step_options).prev_sample
        scale = 1.0
        if "Euler" in type(scheduler).__name__ or "Heun" in type(scheduler).__name__:
            scale = (float(scheduler.sigmas[scheduler.step_index]) ** 2 + 1) ** 0.5
        found.append(sample.numpy() / scale)
    return found


def assert_same(a: list[np.ndarray], b: list[np.ndarray], tolerance: float = 1e-4) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        error = np.abs(x - y).max() / np.abs(y).max()
        assert error < tolerance, f"after {i + 1} of {len(a)} calls: {error:.1e}"


def scheduler_of(name: str, prediction_type: str = "epsilon", **options):
    options = dict(clip_sample=False) | options
    kind = getattr(diffusers, name)
    known = kind.__init__.__wrapped__.__code__.co_varnames
    return kind(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        prediction_type=OF_DIFFUSERS[prediction_type],
        **{key: value for key, value in options.items() if key in known},
        **BETAS,
    )


# name of ours, class of theirs, our options, theirs
CASES = {
    "ddim": ("ddim", "DDIMScheduler", {}, {}),
    "plms": ("plms", "PNDMScheduler", {}, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "euler": ("euler", "EulerDiscreteScheduler", {}, {}),
    "euler_ancestral": ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("heun", "HeunDiscreteScheduler", {}, {}),
    "dpm++_2m": ("dpm++_2m", "DPMSolverMultistepScheduler", {}, {}),
    "dpm++_2m_sde": (
        "dpm++_2m_sde",
        "DPMSolverMultistepScheduler",
        {},
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": ("unipc", "UniPCMultistepScheduler", {}, {}),
    "unipc_order_3": ("unipc", "UniPCMultistepScheduler", {"order": 3}, {"solver_order": 3}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "z_0", "v"])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("linspace", 0), ("trailing", 0)])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_trajectories_equal_diffusers(
    case, prediction_type, spacing, offset, num_steps, monkeypatch
):
    name, kind, our_options, their_options = CASES[case]
    if spacing == "linspace" and case in ("ddim", "plms"):
        spacing, offset = "trailing", 0  # theirs steps by T // S whatever the spacing
    if case == "plms" or (case, prediction_type) == ("euler_ancestral", "z_0"):
        prediction_type = (
            "epsilon"  # theirs refuses z_0, or averages other predictions than epsilon
        )
    plan = plan_sampler(
        name, SCHEDULE, prediction_type, num_steps, spacing=spacing, offset=offset, **our_options
    )
    scheduler = scheduler_of(
        kind, prediction_type, timestep_spacing=spacing, steps_offset=offset, **their_options
    )
    expected = theirs(scheduler, num_steps, monkeypatch)
    assert_same(ours(plan), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "z_0", "v"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_2s_equals_diffusers(prediction_type, num_steps, monkeypatch):
    """Its class has one spacing, "linspace"."""
    plan = plan_sampler("dpm++_2s", SCHEDULE, prediction_type, num_steps, spacing="linspace")
    scheduler = scheduler_of("DPMSolverSinglestepScheduler", prediction_type)
    assert_same(ours(plan), theirs(scheduler, num_steps, monkeypatch))


@pytest.mark.parametrize("prediction_type", ["epsilon", "z_0", "v"])
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_lcm_equals_diffusers(prediction_type, num_steps, monkeypatch):
    plan = plan_sampler("lcm", SCHEDULE, prediction_type, num_steps)
    assert_same(ours(plan), theirs(scheduler_of("LCMScheduler", prediction_type), num_steps,
                                   monkeypatch))  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 20, 250])
def test_ddim_with_noise_equals_diffusers(num_steps, eta, monkeypatch):
    plan = plan_sampler("ddim", SCHEDULE, "epsilon", num_steps, eta=eta)
    scheduler = scheduler_of("DDIMScheduler", timestep_spacing="trailing")
    assert_same(ours(plan), theirs(scheduler, num_steps, monkeypatch, eta=eta))


def test_stable_diffusions_ddim_and_plms_stop_at_the_first_timestep(monkeypatch):
    for name, kind in (("ddim", "DDIMScheduler"), ("plms", "PNDMScheduler")):
        plan = plan_sampler(
            name, SCHEDULE, "epsilon", 10, spacing="leading", offset=1, final="first"
        )
        options = dict(set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True)
        expected = theirs(scheduler_of(kind, **options), 10, monkeypatch)
        assert_same(ours(plan), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "z_0", "v"])
@pytest.mark.parametrize(
    ("variance", "theirs_called"), [("posterior", "fixed_small"), ("beta", "fixed_large")]
)
@pytest.mark.parametrize("num_steps", [20, 250])
def test_ddpm_equals_diffusers(prediction_type, variance, theirs_called, num_steps, monkeypatch):
    plan = plan_sampler(
        "ddpm", SCHEDULE, prediction_type, num_steps, spacing="leading", variance=variance
    )
    scheduler = scheduler_of("DDPMScheduler", prediction_type, variance_type=theirs_called)
    # It clamps the variance of a step of no noise, and multiplies by no noise there.
    assert_same(ours(plan), theirs(scheduler, num_steps, monkeypatch), tolerance=2e-4)


def test_learned_variances_equal_diffusers(monkeypatch):
    def both(z_t, t, guidance_scale):
        return jax.numpy.concatenate([predict(z_t, t), jax.numpy.sin(3 * z_t)], axis=-1)

    plan = plan_sampler("ddpm", SCHEDULE, "epsilon", 50, spacing="leading", variance="learned")
    z_0, _ = plans.sample(both, plans.start(plan, Z_T), plan, KEYS)
    scheduler = scheduler_of("DDPMScheduler", variance_type="learned_range")
    module = importlib.import_module(type(scheduler).__module__)
    calls = [0]
    monkeypatch.setattr(
        module, "randn_tensor",
        lambda *args, **kwargs: torch.tensor(noise(calls[0]).swapaxes(1, 2), dtype=torch.float64),
    )  # fmt: skip
    scheduler.set_timesteps(50)
    # Its channels are on axis 1.
    sample = torch.tensor(Z_T, dtype=torch.float64).swapaxes(1, 2)
    for i, t in enumerate(scheduler.timesteps):
        calls[0] = i
        output = torch.cat([torch_predict(sample, t), torch.sin(3 * sample)], dim=1)
        sample = scheduler.step(output, t, sample).prev_sample
    expected = sample.swapaxes(1, 2).numpy()
    assert np.abs(np.asarray(z_0) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["euler", "heun", "dpm++_2m", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 6, 20])
def test_karras_sigmas_equal_diffusers(case, num_steps, monkeypatch):
    name, kind, _, options = CASES[case]
    num_steps += case == "unipc" and num_steps == 1  # theirs ends in nan after one step
    plan = plan_sampler(name, SCHEDULE, "epsilon", num_steps, spacing="linspace", sigmas="karras")
    scheduler = scheduler_of(kind, timestep_spacing="linspace", use_karras_sigmas=True, **options)
    assert_same(ours(plan), theirs(scheduler, num_steps, monkeypatch))


@pytest.mark.parametrize("case", ["ddim", "euler", "dpm++_2m", "dpm++_2m_sde", "unipc"])
def test_schedules_that_end_in_pure_noise_equal_diffusers(case, monkeypatch):
    name, kind, _, options = CASES[case]
    schedule = make_schedule("scaled_linear", 1000, **BETAS, zero_terminal_snr=True)
    plan = plan_sampler(name, schedule, "v", 10)
    scheduler = scheduler_of(
        kind, "v", timestep_spacing="trailing", rescale_betas_zero_snr=True, **options
    )
    # All of theirs but DDIM have 2^-24 in the place of 0.
    assert_same(ours(plan), theirs(scheduler, 10, monkeypatch), 1e-4 if case == "ddim" else 1e-2)


@pytest.mark.parametrize("case", ["ddim", "euler", "heun", "dpm++_2m", "unipc"])
def test_starting_from_latents_equals_diffusers(case, monkeypatch):
    """Image to image: the last part of the steps, with no memory of those left out."""
    name, kind, _, options = CASES[case]
    strength, num_steps = 0.6, 10
    plan = plan_sampler(name, SCHEDULE, "epsilon", num_steps, strength=strength)
    z_0 = normal(1, ROWS, *SHAPE)
    z = np.asarray(plans.start(plan, Z_T, z_0))
    found = np.asarray(run(z, plans.padded(plan, 2000)))

    scheduler = scheduler_of(kind, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(num_steps)
    skipped = num_steps - int(num_steps * strength)
    timesteps = scheduler.timesteps[skipped * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped * scheduler.order)
    sample = scheduler.add_noise(
        torch.tensor(z_0, dtype=torch.float64), torch.tensor(Z_T, dtype=torch.float64),
        timesteps[:1],
    )  # fmt: skip
    for t in timesteps:
        seen = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(torch_predict(seen, t), t, sample).prev_sample
    assert_same([found], [sample.numpy()])


def test_clipped_predictions_stay_in_their_bounds(monkeypatch):
    plan = plan_sampler("ddpm", SCHEDULE, "epsilon", 20, spacing="leading", clip=0.5)
    scheduler = scheduler_of("DDPMScheduler", clip_sample=True, clip_sample_range=0.5)
    expected = theirs(scheduler, 20, monkeypatch)
    assert_same(ours(plan), expected, tolerance=2e-4)
    assert np.abs(expected[-1]).max() <= 0.5


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("of_clipped", [False, True])
def test_ddim_with_clipped_predictions_equals_diffusers(of_clipped, eta, monkeypatch):
    """Its epsilon is the network's own or, if told so, that of the clipped z_0."""
    plan = plan_sampler("ddim", SCHEDULE, "v", 20, clip=0.5, eta=eta, epsilon_of_clipped=of_clipped)
    scheduler = scheduler_of(
        "DDIMScheduler", "v", clip_sample=True, clip_sample_range=0.5, timestep_spacing="trailing"
    )
    options = dict(eta=eta, use_clipped_model_output=of_clipped)
    assert_same(ours(plan), theirs(scheduler, 20, monkeypatch, **options), tolerance=2e-4)


# --- what a plan is ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_any_number_of_steps_is_exactly_that_many(name):
    calls = {"heun": lambda s: 2 * s - 1, "plms": lambda s: s + (s > 1)}.get(name, lambda s: s)
    most = 50 if name == "lcm" else 1000
    for spacing in ("trailing", "leading", "linspace"):
        for num_steps in (*range(1, min(most, 60) + 1), 499, 599, 750, 999, 1000):
            if num_steps <= most:
                plan = plan_sampler(name, SCHEDULE, "epsilon", num_steps, spacing=spacing, offset=1)
                assert int(plan.num_rows) == calls(num_steps)
                assert plan.rows.sigma[-1] == 0.0 and plan.rows.timestep.min() >= 0.0


def test_all_samplers_and_numbers_of_steps_share_one_program():
    traces = []

    @jax.jit
    def draw(z, plan):
        traces.append(1)
        return plans.sample(predict, z, plan, KEYS)[0]

    for name in SAMPLERS:
        for prediction_type in ("epsilon", "v"):
            for num_steps in (1, 7):
                plan = plan_sampler(name, SCHEDULE, prediction_type, num_steps)
                draw(plans.start(plan, Z_T), plans.padded(plan, 2000))
    assert len(traces) == 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_row_does_not_depend_on_its_batch(name):
    z_T, keys = normal(8, 8, 4, 4, 2), jax.random.split(jax.random.key(8), 8)
    plan = plan_sampler(name, SCHEDULE, "epsilon", 10)

    def draw(rows):
        return np.asarray(plans.sample(predict, z_T[rows], plan, keys[rows])[0])

    eight = draw(np.arange(8))
    np.testing.assert_allclose(draw(np.array([5])), eight[[5]], rtol=0, atol=2e-6)
    np.testing.assert_allclose(draw(np.array([1, 5, 2])), eight[[1, 5, 2]], rtol=0, atol=2e-6)


def test_samples_are_float32_of_the_shape_of_the_noise():
    plan = plan_sampler("ddim", SCHEDULE, "epsilon", 3)
    z_T = jax.numpy.zeros((2, 6, 4, 3), jax.numpy.bfloat16)
    z_0, previews = jax.eval_shape(lambda z: plans.sample(predict, z, plan, KEYS), z_T)
    assert z_0.shape == (2, 6, 4, 3) and z_0.dtype == jax.numpy.float32
    assert previews.shape == (0, 2, 6, 4, 3)


def test_previews_show_the_predictions_on_the_way():
    plan = plans.with_previews(plan_sampler("ddim", SCHEDULE, "epsilon", 10), 3)
    z_0, previews = plans.sample(predict, plans.start(plan, Z_T), plan, KEYS, num_previews=3)
    assert np.flatnonzero(plan.rows.preview >= 0).tolist() == [2, 5, 9]
    # DDIM ends in the last prediction.
    np.testing.assert_allclose(previews[-1], z_0, atol=1e-6)
    assert np.abs(np.asarray(previews[0] - previews[1])).max() > 1e-3


def test_guidance_is_on_in_its_interval_alone():
    plan = plan_sampler("ddim", SCHEDULE, "epsilon", 10)
    scales = plans.with_guidance(plan, 7.5, 0.0, (0.25, 0.8), 999).rows.guidance_scale
    inside = (plan.rows.timestep >= 0.25 * 999) & (plan.rows.timestep <= 0.8 * 999)
    np.testing.assert_array_equal(scales, np.where(inside, 7.5, 1.0))
    assert 0 < inside.sum() < 10


def test_known_parts_are_put_back_at_the_level_that_is_reached():
    plan, levels = plan_sampler("ddim", SCHEDULE, "epsilon", 6), []
    known = normal(3, ROWS, *SHAPE)

    def constrain(z, alpha, sigma):
        levels.append((alpha, sigma))
        return z.at[:, 0].set(alpha * known[:, 0] + sigma * Z_T[:, 0])

    z_0, _ = plans.sample(predict, plans.start(plan, Z_T), plan, KEYS, constrain=constrain)
    np.testing.assert_allclose(z_0[:, 0], known[:, 0], atol=1e-6)
    assert np.abs(np.asarray(z_0)[:, 1] - known[:, 1]).max() > 0.1


def test_what_does_not_fit_is_refused():
    ending = make_schedule("scaled_linear", 1000, **BETAS, zero_terminal_snr=True)
    for arguments, options, message in (
        (("dpm", SCHEDULE, "epsilon", 5), {}, "unknown sampler 'dpm'; known: ddpm, ddim"),
        (("ddim", SCHEDULE, "epsilon", 0), {}, r"must be in 1\.\.1000, got 0"),
        (("ddim", SCHEDULE, "epsilon", 1001), {}, r"must be in 1\.\.1000, got 1001"),
        (("lcm", SCHEDULE, "epsilon", 51), {}, r"steps of lcm must be in 1\.\.50, got 51"),
        (("ddim", SCHEDULE, "epsilon", 5), {"strength": 1.5}, r"strength must be in \[0, 1\]"),
        (("ddim", SCHEDULE, "epsilon", 5), {"spacing": "even"}, "unknown timestep spacing 'even'"),
        (("ddim", SCHEDULE, "epsilon", 5), {"sigmas": "log"}, "unknown sigmas 'log'"),
        (("ddim", SCHEDULE, "epsilon", 5), {"final": "last"}, "unknown final level 'last'"),
        (("ddpm", SCHEDULE, "epsilon", 5), {"variance": "big"}, "unknown variance 'big'"),
        (("unipc", SCHEDULE, "epsilon", 5), {"order": 4}, "orders 1 to 3, got 4"),
        (("ddim", ending, "epsilon", 5), {}, "predicts epsilon does not fit a schedule that ends"),
        (("plms", ending, "v", 5), {}, "extrapolates epsilon"),
        (("heun", ending, "v", 5), {}, "extrapolates epsilon"),
        (("euler", ending, "v", 5), {"sigmas": "karras"}, "Karras' sigmas do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_sampler(*arguments, **options)
