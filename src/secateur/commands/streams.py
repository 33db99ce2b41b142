"""Words in and out of a command: an empty one is refused, and every sign can be printed on every terminal."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence

from secateur.errors import SecateurError

# signs of our own outputs -> what stands for them where the terminal has only ASCII (PYTHONIOENCODING, old locales)
SIGNS = {"±": "+-", "×": "x", "→": "->", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "│": "|", "─": "-", "·": "."}
HANDLER = "secateur-signs"


def all_signs_printable() -> None:
    """From now on standard output and error take every text: what they cannot show is written in ASCII."""
    codecs.register_error(HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not one that a test has put there
            stream.reconfigure(errors=HANDLER)


def check_words(words: Sequence[str]) -> None:
    """Refuse an empty argument: as a path it would be the folder that one is in.

    Raises:
        SecateurError: names the word before it.
    """
    if "" in words:
        at = words.index("")
        where = f"after {words[at - 1]!r:.80}" if at else "as the command"
        raise SecateurError(f"an empty argument {where}, expected a value; an empty variable of the shell gives one")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(SIGNS.get(sign) or ascii(sign)[1:-1] for sign in signs), error.end
