"""The one error that bad input raises."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

LONGEST = 2000  # characters of a message; what a damaged file holds may have millions
LINE_END = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


class SecateurError(ValueError):
    """Something given to Secateur cannot be used.

    The message names the thing, what was found and what was expected, in one line that can be printed. The command
    line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(as_line(str(message)))


def as_line(text: str) -> str:
    """A text in one line that every terminal shows as it is meant, whatever names and values of a file are in it.

    >>> as_line("a\\n  b\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"
    if not text.isprintable():
        text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in LINE_END.sub(" ", text).strip())
    return text


def causes_of(error: BaseException, *, suppressed: bool = False) -> Iterator[BaseException]:
    """The error, what led to that, and so on; each once, since an error may have led to one that it was made of.

    Args:
        suppressed: also what `raise ... from None` hides.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        hidden = cause.__suppress_context__ and not suppressed
        cause = cause.__cause__ or (None if hidden else cause.__context__)


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Make one line of what another library raises at something that it cannot use; it has no error of its own for it.

    Only around code of that library: an error of ours would be hidden here.

    Args:
        what: begins the message; names the file.

    Raises:
        SecateurError: it raised something. OSError: as it is.
    """
    try:
        yield
    except (SecateurError, OSError):
        raise
    except Exception as error:
        raise SecateurError(f"{what} ({type(error).__name__}: {str(error)[:300]})") from error
