"""Run a command in a memory control group of its own: with so many bytes, page cache included, and no more.

Version 1 of control groups; of version 2 a group that may be written. Where neither is, `why_not` says so.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A version of control groups: its folder, and the names of its files."""

    folder: Path
    limit: str
    most: str


KINDS = (
    Kind(folder=ROOT / "memory", limit="memory.limit_in_bytes", most="memory.max_usage_in_bytes"),
    Kind(folder=ROOT, limit="memory.max", most="memory.peak"),
)


@dataclass(frozen=True, kw_only=True)
class Limited:
    """What a command did. peak: bytes that its group held at most, page cache included; at most the limit."""

    status: int
    output: str
    errors: str
    peak: int


def why_not() -> str | None:
    """Why no group can be made here; None where one can."""
    return None if _kind() is not None else f"no memory control group can be made under {ROOT}"


def run_limited(words: Sequence[str], limit: int, environment: Mapping[str, str] | None = None) -> Limited:
    """Run a command that gets `limit` bytes of memory; it is killed by the system if it needs more."""
    kind = _kind()
    if kind is None:
        raise OSError(str(why_not()))
    with _group(kind, limit) as group:
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, str(group), *words],
            capture_output=True,
            text=True,
            env=environment,
        )
        most = (group / kind.most).read_text() if (group / kind.most).is_file() else "0"
    return Limited(status=done.returncode, output=done.stdout, errors=done.stderr, peak=int(most))


def _kind() -> Kind | None:
    for kind in KINDS:
        try:
            with _group(kind, 2**30):
                return kind
        except OSError:
            continue
    return None


@contextmanager
def _group(kind: Kind, limit: int) -> Iterator[Path]:
    group = kind.folder / f"secateur-{os.getpid()}-{secrets.token_hex(4)}"
    if not (kind.folder / "cgroup.procs").is_file():
        raise FileNotFoundError(kind.folder)
    group.mkdir()
    try:
        (group / kind.limit).write_text(str(limit))
        yield group
    finally:
        group.rmdir()
