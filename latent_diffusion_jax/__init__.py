"""Latent diffusion in JAX: train both stages, sample with one compiled program."""

__version__ = "0.1.0"
