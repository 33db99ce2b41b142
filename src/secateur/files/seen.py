"""Are files that are read for a long time still the ones that were read first?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secateur.errors import SecateurError
from secateur.files.digest import sha256_of

ONLY_FOR_PEOPLE = (".md", ".html")
AGAIN = "nothing was written, start again when nobody changes it"
SMALL = 2**20  # bytes of a file of which the content is compared too


@dataclass(frozen=True, kw_only=True)
class State:
    """What tells a file from another that takes its place. digest: of a small one."""

    size: int
    mtime_ns: int
    inode: tuple[int, int]
    digest: str | None


@dataclass(frozen=True)
class Seen:
    """Files as they were when this was made, which is before they are read."""

    states: Mapping[Path, State] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Seen:
        return cls({path: _state(path) for path in paths})

    @classmethod
    def beside_each_other(cls, folder: Path) -> Seen:
        """Of the files that lie in a folder itself, but for those that only people read; none of what is no folder."""
        files = (path for path in sorted(folder.iterdir()) if path.is_file()) if folder.is_dir() else ()
        return cls.of(path for path in files if path.suffix not in ONLY_FOR_PEOPLE)

    def __or__(self, other: Seen) -> Seen:
        return Seen({**self.states, **other.states})

    def check(self, paths: Iterable[Path] | None = None, *, advice: str = AGAIN) -> None:
        """Compare the files, or some of them, with what they are now.

        Args:
            advice: what the message ends with.

        Raises:
            SecateurError: one is gone, or is not the same; the message names it.
        """
        for path in self.states if paths is None else paths:
            before = self.states[path]
            try:
                now = _state(path)
            except OSError as error:
                raise _changed(path, f"it is gone ({error.strerror})", advice) from error
            if now.size != before.size:
                raise _changed(path, f"it had {before.size} bytes, and has {now.size}", advice)
            if now.inode != before.inode:
                raise _changed(path, "another file has taken its place", advice)
            if now != before:
                raise _changed(path, "it was written to", advice)


def _changed(path: Path, how: str, advice: str) -> SecateurError:
    return SecateurError(f"{path}: it was changed while it was in use: {how}; {advice}")


def _state(path: Path) -> State:
    status = path.stat()
    digest = None
    if status.st_size <= SMALL and path.is_file():
        with contextlib.suppress(PermissionError):  # whoever reads it says so
            digest = sha256_of(path)
    inode = (status.st_dev, status.st_ino)
    return State(size=status.st_size, mtime_ns=status.st_mtime_ns, inode=inode, digest=digest)
