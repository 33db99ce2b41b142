"""The one file that a function writes."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import SecateurError


def check_new_file(out: Path, force: bool, *sources: Path, option: str = "--out") -> None:
    """Refuse the `option` where it would write over something, or into what is only read.

    Raises:
        SecateurError: it is a folder, there already without `force`, one of the sources or inside it, or in no folder.
    """
    for source in sources:
        if out.resolve() == source.resolve() or (source.is_dir() and out.resolve().is_relative_to(source.resolve())):
            raise SecateurError(f"{option} {out}: it is {source} or inside it, which is only read")
    if out.is_dir():
        raise SecateurError(f"{option} {out}: a folder, expected a file to write")
    if out.exists() and not force:
        raise SecateurError(f"{option} {out}: it is there already; --force writes over a file")
    if not out.parent.is_dir():
        raise SecateurError(f"{option} {out}: no folder {out.parent}")
