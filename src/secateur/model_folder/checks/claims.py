"""Prove that a pruned folder is what its plan makes of its source: names, bytes, loading, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from secateur.errors import SecateurError
from secateur.files.json import read_object
from secateur.files.progress import OnStage, stage
from secateur.files.records import as_record
from secateur.model_folder.checks.check import Check
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.report import REPORT, read_applied, read_experts_from
from secateur.results import Result


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """What `verify` found. passed: no check failed. checks: in the order they were made."""

    passed: bool
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Verification:
        """From what `as_json` gave."""
        return cls(passed=content["passed"], checks=tuple(Check(**one) for one in content["checks"]), content=content)

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        words = {True: "passed", False: "FAILED", None: "not checked"}
        rows = [(check.claim, words[check.passed], check.detail) for check in self.checks]
        return ("claim", "result", "detail"), rows


def verify_model(
    source: Path,
    pruned: Path,
    *,
    num_tokens: int = 32,
    text: Path | None = None,
    seed: int = 0,
    on_progress: OnStage | None = None,
) -> list[Check]:
    """Compare a pruned folder with the source it was made from.

    Args:
        num_tokens: of the sample that both models are run on; 0 runs neither. text: a file to take it from; without
            one the tokens are random, from `seed`.
        on_progress: see `verify`.

    Returns:
        All checks, in the order they were made. A later one is left out where it makes no sense after a failure.

    Raises:
        SecateurError: one of the two is no model folder, is damaged, was changed meanwhile, or the pruned one has no
            report of `apply`.
    """
    given, mtp = read_applied(pruned / REPORT)
    before, after = read_model_folder(source, read_experts_from(pruned / REPORT)), read_model_folder(pruned)
    plan = given.filled(before.all_counts)
    # here: what headers alone refuse needs no model class
    from secateur.model_folder.checks.computes import computing_checks
    from secateur.model_folder.checks.contents import Pruning, content_checks, counts_check

    pruning = Pruning(before=before, after=after, given=given, plan=plan, mtp=mtp)
    counts = counts_check(pruning)
    if not counts.passed:
        return [counts]
    contents = content_checks(pruning, stage("comparing", on_progress))
    computing = computing_checks(pruning, num_tokens, text, seed, on_progress)
    for folder in (before, after):
        folder.files.seen.check(advice="start again when nobody changes it")
    return [counts, *contents, *computing]


def as_json(source: Path | Sequence[Path], pruned: Path, checks: Sequence[Check]) -> dict[str, Any]:
    """The result as JSON; `passed` is False where any check failed. Several sources are a list."""
    return {
        "format": "secateur-verify",
        "version": 1,
        "source": str(source) if isinstance(source, Path) else list(map(str, source)),
        "pruned": str(pruned),
        "passed": all(check.passed is not False for check in checks),
        "checks": [{"claim": check.claim, "passed": check.passed, "detail": check.detail} for check in checks],
    }


class CheckEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of `Check`."""

    claim: str
    passed: bool | None
    detail: str


class VerifyFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """verify.json."""

    format: Literal["secateur-verify"]
    version: Literal[1]
    source: str
    pruned: str
    passed: bool
    checks: tuple[CheckEntry, ...]


def read_verified(path: Path) -> dict[str, Any]:
    """The result as `as_json` gave it.

    Raises:
        SecateurError: no such file, or something else in it.
    """
    verified = read_object(path)
    as_record(verified, VerifyFile, str(path))
    return verified


def check_tokens(num_tokens: int) -> None:
    """Refuse a sample that shows nothing."""
    if num_tokens == 1 or num_tokens < 0:
        raise SecateurError(f"--tokens {num_tokens}: expected 0, or 2 and more")
