"""How much memory a process can still have: what the machine has free, or less where a limit says so."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A version of control groups. controller: in /proc/self/cgroup. filesystem: of its mount.

    limits, usage: file names. cache: the entries of memory.stat that the system takes back when memory runs short.
    """

    controller: str
    filesystem: str
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


KINDS = (
    Kind(
        controller="",
        filesystem="cgroup2",
        limits=("memory.max", "memory.high"),
        usage="memory.current",
        cache=("inactive_file", "active_file"),
    ),
    Kind(
        controller="memory",
        filesystem="cgroup",
        limits=("memory.limit_in_bytes",),
        usage="memory.usage_in_bytes",
        cache=("total_inactive_file", "total_active_file"),
    ),
)
# limit of a process -> the line of /proc/self/status that says how much of it is used
PROCESS_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))


def free_memory(root: Path = ROOT) -> int:
    """Bytes that this process can still have: the least of what the machine, its control groups and its limits leave.

    Args:
        root: where /proc and the control groups are.
    """
    return max(0, int(min([_of_machine(root), *_of_groups(root), *_of_process(root)])))


def _of_machine(root: Path) -> int:
    """What Linux says is available, else all that the machine has."""
    available = _numbers(root / "proc/meminfo").get("MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available * 1024


def _of_groups(root: Path) -> Iterator[float]:
    """Of every control group with a limit that the process is in: its own, and all around it."""
    mounts = [line.split() for line in _lines(root / "proc/self/mountinfo")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        for kind in KINDS:
            if kind.controller in controllers.split(","):
                yield from (_left(folder, kind) for folder in _folders(root, mounts, kind, group))


def _folders(root: Path, mounts: Sequence[Sequence[str]], kind: Kind, group: str) -> Iterator[Path]:
    """The folder of a control group, and of all around it, as far as they can be seen from here."""
    for mount in mounts:
        after = mount[mount.index("-") + 1 :] if "-" in mount[5:] else []
        if (
            not after
            or after[0] != kind.filesystem
            or (kind.controller and kind.controller not in after[-1].split(","))
        ):
            continue
        top = root / mount[4].lstrip("/")
        inside = PurePosixPath(group)
        # in a container the mount shows a part of the tree only, and the group may be named from above that part
        inside = inside.relative_to(mount[3]) if inside.is_relative_to(mount[3]) else PurePosixPath()
        inside = PurePosixPath(*(part for part in inside.parts if part not in ("/", "..")))
        yield from (top / part for part in (inside, *inside.parents))


def _left(folder: Path, kind: Kind) -> float:
    """What the limit of one group leaves; infinite where it has none."""
    limits = [int(text) for name in kind.limits for text in _lines(folder / name)[:1] if text.isdecimal()]
    used = [int(text) for text in _lines(folder / kind.usage)[:1] if text.isdecimal()]
    if not limits or not used:
        return math.inf
    found = _numbers(folder / "memory.stat")
    return max(0, min(limits) - used[0] + sum(found.get(name, 0) for name in kind.cache))


def _of_process(root: Path) -> Iterator[int]:
    used = _numbers(root / "proc/self/status")
    for name, line in PROCESS_LIMITS:
        limit, _ = resource.getrlimit(name)
        if limit != resource.RLIM_INFINITY:
            yield limit - used.get(line, 0) * 1024


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a whole number."""
    words = (line.replace(":", " ").split() for line in _lines(path))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    """Of a file that may not be there, or may not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
