"""What messages show of others' files, whose names and values may be megabytes."""

import reprlib
from typing import Any

from latent_diffusion_jax.runtime.texts import escaped

MAX_TEXT = 1_000  # characters

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as Python writes it, with dots for the middle of what is long."""
    return _SHORT.repr(value)


def in_short(text: str) -> str:
    """A text in one line, with dots for the middle where it is long."""
    half = MAX_TEXT // 2
    return escaped(text if len(text) <= MAX_TEXT else f"{text[:half]} ... {text[-half:]}")
