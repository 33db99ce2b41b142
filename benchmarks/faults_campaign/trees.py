"""What lies in a folder, as values that can be compared: every name, hidden ones too, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

Tree = dict[str, str]  # {path: digest of its content, or "folder"}

# What says how a run went, and not what came of it.
TOLD = {"finetune.json": {"resumed_after_step"}}


def tree_of(root: Path) -> Tree:
    """All that lies under `root`; a symbolic link is what it says."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            path = Path(folder, name)
            found[path.relative_to(root).as_posix()] = f"link {os.readlink(path)}" if path.is_symlink() else "folder"
        for name in files:
            path = Path(folder, name)
            found[path.relative_to(root).as_posix()] = _digest(path)
    return dict(sorted(found.items()))


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    data = path.read_bytes()
    if not data:
        return "empty"
    if path.name in TOLD:
        try:
            value = json.loads(data)
            data = json.dumps({key: one for key, one in value.items() if key not in TOLD[path.name]}).encode()
        except (ValueError, AttributeError):
            pass
    return hashlib.sha256(data).hexdigest()


def under(tree: Mapping[str, str], names: Iterable[str]) -> Tree:
    """The part of a tree that these names and what lies under them make."""
    wanted = tuple(names)
    return {path: one for path, one in tree.items() if is_under(path, wanted)}


def without(tree: Mapping[str, str], names: Iterable[str]) -> Tree:
    wanted = tuple(names)
    return {path: one for path, one in tree.items() if not is_under(path, wanted)}


def is_under(path: str, names: Iterable[str]) -> bool:
    """Whether it is one of these names, or lies under one."""
    return any(path == name or path.startswith(f"{name}/") for name in names)


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """In words what is not as expected; "" where all is."""
    said = [
        (f"left over: {_listed(found.keys() - expected.keys())}", found.keys() - expected.keys()),
        (f"missing: {_listed(expected.keys() - found.keys())}", expected.keys() - found.keys()),
    ]
    changed = {path for path in found.keys() & expected.keys() if found[path] != expected[path]}
    said.append((f"other content: {_listed(changed)}", changed))
    return "; ".join(words for words, paths in said if paths)


def _listed(paths: Iterable[str], most: int = 4) -> str:
    every = sorted(paths)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def has_written(now: Mapping[str, str], before: Mapping[str, str]) -> bool:
    """True where a byte has been written: a new file that holds something, or one that changed or went."""
    new = {path: one for path, one in now.items() if before.get(path) != one}
    return any(one not in ("folder", "empty") for one in new.values()) or bool(before.keys() - now.keys())
