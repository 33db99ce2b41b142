"""What a file holds, as one short text."""

from __future__ import annotations

import hashlib
from pathlib import Path

HASHED = 8 * 2**20  # bytes in memory while a file is hashed


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASHED):
            digest.update(data)
    return digest.hexdigest()
