"""Texts of users: what is no text is named, and nothing of it reaches a terminal."""

import pytest

from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.texts import check_text, printable


@pytest.mark.parametrize("text", ["", "a duck", "zwei\tGänse\r\n", "鴨\u2028\x85\u200d🦆"])
def test_text_is_fine(text):
    check_text(text, "caption")


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\ud800", "\udc80"])
def test_control_characters_are_named(character):
    with pytest.raises(UserError, match=r"^caption 7 has the control character .* at place 3;"):
        check_text(f"a {character}duck", "caption 7")


def test_messages_are_one_line_without_commands_to_a_terminal():
    assert printable("a\n b\x1b[31mc\x07 ü") == "a b\\x1b[31mc\\x07 ü"
