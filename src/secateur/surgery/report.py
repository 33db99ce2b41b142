"""The form of the record that every `apply` leaves, whether of a model folder or of a training checkpoint."""

from __future__ import annotations

FORMAT = "secateur-apply-report"
VERSION = 1
