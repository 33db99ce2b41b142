"""TODO."""

from __future__ import annotations

FORMAT = "secateur-apply-report"
VERSION = 1
