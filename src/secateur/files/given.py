"""What a caller of a function may give where files, folders or numbers are expected."""

from __future__ import annotations

import os
from collections.abc import Sequence

from secateur.errors import SecateurError

StrPath = str | os.PathLike[str]
StrPaths = StrPath | Sequence[StrPath]  # one, or several


def as_texts(given: StrPaths | None) -> list[str]:
    """All that was given, as text; one path is not taken apart into its letters."""
    if given is None:
        return []
    return [os.fspath(given)] if isinstance(given, str | os.PathLike) else [os.fspath(path) for path in given]


def check_least(least: int, **options: float | None) -> None:
    """Refuse a number below `least`, by the option that it was given with; None is none.

    Raises:
        SecateurError: names the first one.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise SecateurError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
