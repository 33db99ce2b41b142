"""What `verify` claims, by short names: a test says which claims fall, and that no other does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.model_folder.checks import computes, contents
from secateur.model_folder.checks.check import Check

SHORT = {
    contents.COUNTS: "counts",
    contents.TENSORS: "tensors",
    contents.CONFIGURED: "config",
    contents.SIDE_FILES: "side files",
    contents.NO_STRAYS: "no strays",
    contents.INDEXED: "index",
    contents.RECORDS: "records",
    computes.LOADS: "loads",
    **{computes.EQUAL.format(words): "logits" for words in computes.WITHOUT.values()},
    computes.SPEAKS: "speaks",
}
ALL = frozenset(SHORT.values())


def outcome(checks: Iterable[Check | Mapping[str, Any]]) -> dict[str, bool | None]:
    """{short name of a claim: passed}, in the order of the checks; of `Check` or of its JSON."""
    found = [check if isinstance(check, Check) else Check(**check) for check in checks]
    return {SHORT[check.claim]: check.passed for check in found}


def fallen(checks: Iterable[Check | Mapping[str, Any]]) -> set[str]:
    """The claims that failed."""
    return {name for name, passed in outcome(checks).items() if passed is False}


def not_checked(checks: Iterable[Check | Mapping[str, Any]]) -> set[str]:
    """The claims that were not looked at."""
    return {name for name, passed in outcome(checks).items() if passed is None}


def detail(checks: Iterable[Check], claim: str) -> str:
    """What a check with this short name found."""
    return next(check.detail for check in checks if SHORT[check.claim] == claim)
