"""Bytes for people."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def in_words(num_bytes: float) -> str:
    """Three significant digits with a decimal unit: 6.58 MB; 999 bytes; 1.21 TB."""
    power = 0
    while power < len(UNITS) - 1 and abs(num_bytes) >= 999.5:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.3g} {UNITS[power]}"
