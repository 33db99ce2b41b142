"""One claim about a pruned folder, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 5  # failures of one check in a message
LONGEST = 500  # characters of a detail


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim. passed: None where it was not looked at, with the reason in `detail`."""

    claim: str
    passed: bool | None
    detail: str


def check_of(claim: str, failures: Sequence[str], detail: str) -> Check:
    """A claim that holds where there are no failures; `detail` says what was looked at."""
    if not failures:
        return Check(claim=claim, passed=True, detail=detail)
    more = f" and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
    return Check(claim=claim, passed=False, detail=f"{'; '.join(failures[:SHOWN])}{more}"[:LONGEST])
