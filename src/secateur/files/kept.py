"""Files that unfinished work has finished, by their digests: the next start reads what was written, or says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.digest import sha256_of
from secateur.files.work_folder import Work


class Kept:
    """The digests are in the note of the work, under "kept"; without its digest there, a file counts for nothing.

    A file is forgotten before it is written anew, and added when it is whole.
    """

    def __init__(self, work: Work[Any], digests: Mapping[str, str]) -> None:
        self._work, self._digests = work, dict(digests)
        self._asked: Mapping[str, Any] = {}

    def note(self, asked: Mapping[str, Any]) -> None:
        """Write down what this start is asked for; see `Work.note`."""
        self._asked = asked
        self._work.note({**asked, "kept": self._digests})

    def add(self, name: str) -> None:
        """Know a file of the work folder from now on."""
        self._digests[name] = sha256_of(self._work.path / name)
        self.note(self._asked)

    def forget(self, name: str) -> None:
        """Know it no longer."""
        if self._digests.pop(name, None) is not None:
            self.note(self._asked)

    def has(self, name: str) -> bool:
        """Whether a file that was added is there.

        Raises:
            SecateurError: as `check`.
        """
        if name not in self._digests or not (self._work.path / name).is_file():
            return False
        self.check(name, self._work.path / name)
        return True

    def check(self, name: str, path: Path) -> None:
        """Compare `path`, the file that was added under a name or a copy of it, with what was added.

        Raises:
            SecateurError: it holds something else.
        """
        found = sha256_of(path)
        if found != self._digests[name]:
            raise SecateurError(
                f"{self._work.path / name}: it was changed since it was written (SHA-256 {found}, expected "
                f"{self._digests[name]} by {self._work.noted.name}); put it back, or begin anew with --restart"
            )
