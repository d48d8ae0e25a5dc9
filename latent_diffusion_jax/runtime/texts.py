"""Texts of users, which may hold what terminals and tokenizers would take for commands."""

import re

from latent_diffusion_jax.runtime.errors import UserError

# All control characters but tab and the ends of lines, and what JSON can have of UTF-16's pairs.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


def check_text(text: str, what: str) -> None:
    """Raises UserError where a text holds control characters.

    Args:
      text: a caption or a prompt.
      what: it is, and where, to begin the message with.
    """
    if found := _CONTROL.search(text):
        raise UserError(
            f"{what} has the control character {found[0]!r} at place {found.start() + 1}; only "
            "text, tabs and ends of lines are expected"
        )


def printable(text: str) -> str:
    """A text in one line, in which what cannot be printed is shown as its number."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """A text in which what cannot be printed, ends of lines too, is shown as its number."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def first_line(error: BaseException) -> str:
    """What an error says, as far as it is one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
