"""Latent diffusion in JAX: train both stages, sample with one compiled program."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_diffusion_jax.pipelines import Pipeline

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> "Pipeline":
    """Loads a model to draw with; see `pipelines.load`."""
    from latent_diffusion_jax import pipelines  # imports all of JAX, which few modules need

    return pipelines.load(path, **options)
