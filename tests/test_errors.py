"""The message of an error: one line that every terminal shows, whatever is in a file."""

from __future__ import annotations

from secateur.errors import LONGEST, SecateurError, as_line


def test_a_message_is_one_line_that_can_be_printed() -> None:
    assert str(SecateurError("a\n  b\x1b[31m \udcff \u202e")) == r"a b\x1b[31m \udcff \u202e"
    assert str(SecateurError("é ± 漢 [red]  two spaces")) == "é ± 漢 [red]  two spaces"


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    line = as_line("found " + "x" * 10**6 + ", expected y")
    assert line.startswith("found xxx")
    assert line.endswith("x, expected y")
    assert len(line) <= LONGEST
