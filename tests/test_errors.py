"""The message of an error: one line that every terminal shows, whatever is in a file."""

from __future__ import annotations

from secateur.errors import LONGEST, SecateurError, as_line, causes_of


def test_a_message_is_one_line_that_can_be_printed() -> None:
    assert str(SecateurError("a\n  b\x1b[31m \udcff \u202e")) == r"a b\x1b[31m \udcff \u202e"
    assert str(SecateurError("é ± 漢 [red]  two spaces")) == "é ± 漢 [red]  two spaces"


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    line = as_line("found " + "x" * 10**6 + ", expected y")
    assert line.startswith("found xxx")
    assert line.endswith("x, expected y")
    assert len(line) <= LONGEST


def test_what_led_to_an_error_is_found_once_each_also_in_a_ring() -> None:
    first, second, third = ValueError("first"), ValueError("second"), ValueError("third")
    third.__cause__, third.__context__, second.__context__ = second, first, first
    assert list(causes_of(third)) == [third, second, first]
    first.__context__ = third
    assert list(causes_of(third)) == [third, second, first]
    second.__suppress_context__ = True
    assert list(causes_of(third)) == [third, second]
    assert list(causes_of(third, suppressed=True)) == [third, second, first]
