"""A file that is changed, replaced or gone while it is in use is noticed, and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.files.seen import SMALL, Seen


def shorten(path: Path) -> None:
    os.truncate(path, 1)


def write_over(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, (1, 1))


def replace(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def change_at_the_same_time(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"y" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (Path.unlink, r"it is gone \(No such file or directory\)"),
    "cut": (shorten, "it had .* bytes, and has 1"),
    "written over": (write_over, "it was written to"),
    "replaced by its copy": (replace, "another file has taken its place"),
    "changed within the same time": (change_at_the_same_time, "it was written to"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_named(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"a" * 100)
    seen = Seen.of(paths)
    seen.check()
    change(paths[1])
    with pytest.raises(SecateurError, match=f"b: it was changed while it was in use: {message}; nothing was written"):
        seen.check()
    seen.check([paths[0]])


def test_of_a_large_file_only_what_the_folder_says_of_it_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a" * (SMALL + 1))
    seen = Seen.of([path])
    assert seen.states[path].digest is None
    write_over(path)
    with pytest.raises(SecateurError, match="it was written to"):
        seen.check()


def test_what_may_not_be_read_is_left_to_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a").write_text("a")
    monkeypatch.setattr("secateur.files.seen.sha256_of", refuse)
    Seen.of([tmp_path / "a"]).check()


def test_of_a_folder_its_own_files_count_but_for_those_that_only_people_read(tmp_path: Path) -> None:
    for name in ("a.json", "README.md", "report.html", "inside/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    assert Seen.beside_each_other(tmp_path).states.keys() == {tmp_path / "a.json"}
    assert Seen.beside_each_other(tmp_path / "nowhere") == Seen()
