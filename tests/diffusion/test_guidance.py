"""Classifier-free guidance: its ends, its linearity in the scale, one call for both halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latent_diffusion_jax.diffusion.guidance import classifier_free, unguided

B = 3
Z_T = np.random.default_rng(0).normal(size=(B, 4, 2, 2)).astype(np.float32)
T = np.array([7, 300, 999], np.int32)
COND = {"shift": np.array([0.5, -1.0, 2.0], np.float32), "gain": np.array([1.0, 2.0, 3.0])}
NULL = {"shift": np.zeros(B, np.float32), "gain": np.full(B, 0.1)}


def predict(z_t, t, cond):
    shift, gain, t = (x[:, None, None, None] for x in (cond["shift"], cond["gain"], t))
    return jnp.tanh(gain * z_t + shift) + t / 1000


def guided(scale, **options):
    return np.asarray(classifier_free(predict, COND, NULL, **options)(Z_T, T, scale))


def test_scale_one_is_conditional_and_scale_zero_unconditional():
    conditional, unconditional = predict(Z_T, T, COND), predict(Z_T, T, NULL)
    assert np.abs(conditional - unconditional).max() > 0.5
    np.testing.assert_allclose(guided(1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(guided(0.0), unconditional, atol=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.25, 7.5])
def test_guidance_is_linear_in_the_scale(scale):
    expected = guided(0.0) + scale * (guided(1.0) - guided(0.0))
    np.testing.assert_allclose(guided(scale), expected, atol=1e-5)


def test_both_halves_are_one_call_of_twice_the_batch():
    calls = []

    def recorded(z_t, t, cond):
        calls.append((z_t, t, cond))
        return predict(z_t, t, cond)

    classifier_free(recorded, COND, NULL)(Z_T, T, 2.0)
    assert len(calls) == 1
    z_t, t, cond = calls[0]
    np.testing.assert_array_equal(z_t, np.concatenate([Z_T, Z_T]))
    np.testing.assert_array_equal(t, np.concatenate([T, T]))
    assert cond["shift"].shape == cond["gain"].shape == (2 * B,)


def test_a_new_scale_does_not_compile_again():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(scale)
        return classifier_free(predict, COND, NULL)(Z_T, T, scale)

    for scale in (0.0, 1.0, 7.5):
        np.testing.assert_allclose(run(scale), guided(scale), atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaling_equals_diffusers(rescale):
    conditional = torch.tensor(np.array(predict(Z_T, T, COND)))
    expected = rescale_noise_cfg(torch.tensor(guided(7.5)), conditional, rescale)
    np.testing.assert_allclose(guided(7.5, rescale=rescale), expected.numpy(), atol=1e-5)


def test_variances_are_those_of_the_conditional_model():
    def both(z_t, t, cond):
        found = predict(z_t, t, cond)
        return jnp.concatenate([found, 2 * found], axis=-1)

    found = classifier_free(both, COND, NULL, channels=2)(Z_T, T, 5.0)
    np.testing.assert_allclose(found[..., :2], guided(5.0), atol=1e-5)
    np.testing.assert_allclose(found[..., 2:], 2 * predict(Z_T, T, COND), atol=1e-5)


def test_without_guidance_the_network_is_asked_once_for_each_row():
    found = unguided(predict, COND)(Z_T, T, 7.5)
    np.testing.assert_array_equal(found, predict(Z_T, T, COND))
