"""Prove that a pruned folder is what its plan makes of its source: names, bytes, loading, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.given import StrPath, check_given
from secateur.files.json import read_object
from secateur.files.progress import OnProgress, OnStage, counted, silent, stage
from secateur.files.records import as_record
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.rewrite.compare import differences
from secateur.model_folder.rewrite.report import REPORT, read_applied
from secateur.model_folder.rewrite.zero_slots import kept_slots
from secateur.plans import Plan
from secateur.results import Result

SHOWN = 5  # failures of one check in a message
WITHOUT = {False: "the dropped experts barred", True: "the dropped experts silent"}  # by Plan.leaves_zero_slots


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim. passed: None where it was not looked at, with the reason in `detail`."""

    claim: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verification(Result):
    """What `verify` found. passed: no check failed. checks: in the order they were made."""

    passed: bool
    checks: tuple[Check, ...]

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        words = {True: "passed", False: "FAILED", None: "not checked"}
        rows = [(check.claim, words[check.passed], check.detail) for check in self.checks]
        return ("claim", "result", "detail"), rows


def verify(
    source: StrPath,
    pruned: StrPath,
    *,
    tokens: int = 32,
    text: StrPath | None = None,
    seed: int = 0,
    on_progress: OnStage | None = None,
) -> Verification:
    """Prove that a pruned model is what its plan makes of its source.

    Every kept tensor is compared with its source byte by byte. Where the models fit in memory, the pruned one must load
    with nothing missing, compute what the source computes with the dropped experts barred, and generate.

    Args:
        source: the folder of the model that was pruned. pruned: the folder that `apply` wrote.
        tokens: length of the sample that both models are run on; 0 loads neither.
        text: a file to take the sample from; random without it. seed: of the random sample.
        on_progress: called with ("comparing", bytes compared, bytes to compare).

    Returns:
        All checks, and whether they passed. A check that fails raises nothing; later ones are left out where they make
        no sense after it.

    Raises:
        SecateurError: one of the two is no model folder, is damaged, or the pruned one has no report of `apply`.

    Example:
        >>> secateur.verify("models/Qwen3-30B-A3B", "pruned").passed
        True
    """
    check_given(verify, locals())
    check_tokens(tokens)
    source, pruned = Path(source), Path(pruned)
    sample = None if text is None else Path(text)
    on_bytes = stage("comparing", on_progress)
    checks = verify_model(source, pruned, num_tokens=tokens, text=sample, seed=seed, on_bytes=on_bytes)
    content = as_json(source, pruned, checks)
    return Verification(passed=content["passed"], checks=tuple(checks), content=content)


def verify_model(
    source: Path,
    pruned: Path,
    *,
    num_tokens: int = 32,
    text: Path | None = None,
    seed: int = 0,
    on_bytes: OnProgress = silent,
) -> list[Check]:
    """Compare a pruned folder with the source it was made from.

    Args:
        num_tokens: of the sample that both models are run on; 0 loads neither. text: a file to take it from; without
            one the tokens are random, from `seed`.
        on_bytes: called with (bytes compared, bytes to compare).

    Returns:
        All checks, in the order they were made. A later one is left out where it makes no sense after a failure.

    Raises:
        SecateurError: one of the two is no model folder, is damaged, or the pruned one has no report of `apply`.
    """
    plan, mtp = read_applied(pruned / REPORT)
    before, after = read_model_folder(source), read_model_folder(pruned)
    left_out = before.mtp if mtp == "drop" else frozenset()
    plan = plan.filled(before.all_counts)
    counts = _counts(before, after, plan)
    if not counts.passed:
        return [counts]
    return [counts, _bytes(before, after, plan, left_out, on_bytes), *_run(before, after, plan, num_tokens, text, seed)]


def _counts(before: ModelFolder, after: ModelFolder, plan: Plan) -> Check:
    expected = {layer: plan.layers[layer].experts_after for layer in before.counts}
    wrong_plan = [
        layer for layer, layer_plan in plan.layers.items() if before.all_counts.get(layer) != layer_plan.experts_before
    ]
    kept = kept_slots(before, plan) if plan.leaves_zero_slots and not wrong_plan else {}
    slots = before.slots if plan.leaves_zero_slots else expected
    passed = not wrong_plan and (expected, kept, slots) == (dict(after.counts), dict(after.config.kept), after.slots)
    detail = f"{sum(expected.values())} experts in {len(expected)} layers"
    detail += f", of {sum(slots.values())} slots" if kept else ""
    if wrong_plan:
        detail = f"the plan is for another source, layers {wrong_plan}"
    elif not passed:
        detail = f"found {dict(after.counts)}" + (f" at the slots {dict(after.config.kept)}" if kept else "")
    claim = "every layer has the experts that the plan keeps, and config.json says so"
    return Check(claim=claim, passed=passed, detail=detail)


def _bytes(
    before: ModelFolder, after: ModelFolder, plan: Plan, left_out: frozenset[str], on_bytes: OnProgress
) -> Check:
    on_chunk = counted(after.files.num_bytes, on_bytes)
    found = [str(difference) for difference in differences(before, after, plan, left_out, on_chunk=on_chunk)]
    detail = f"{len(after.files.tensors)} tensors, {in_words(after.files.num_bytes)}"
    if found:
        detail = f"{len(found)} tensors are not: " + "; ".join(found[:SHOWN])
    return Check(claim="every kept tensor equals its source byte for byte", passed=not found, detail=detail)


def _run(
    before: ModelFolder, after: ModelFolder, plan: Plan, num_tokens: int, text: Path | None, seed: int
) -> list[Check]:
    import torch

    from secateur.families import logits_of
    from secateur.model_folder.checks.sample import NEW_TOKENS, ROUNDING, generated, logits_without_dropped, sample_for
    from secateur.model_folder.read.load import load, why_not_loaded

    loads = "it loads with no tensor missing, unexpected or newly initialised"
    equal = f"its logits are those of the source with {WITHOUT[plan.leaves_zero_slots]}"
    speaks = "it generates"
    reason = "--tokens 0" if num_tokens == 0 else why_not_loaded(before)
    if reason is not None:
        return [Check(claim=claim, passed=None, detail=reason) for claim in (loads, equal, speaks)]
    sample = sample_for(before.files.path, before, num_tokens, text, seed)
    try:
        expected = logits_without_dropped(before.files.path, before, plan, sample)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise SecateurError(f"{before.files.path}: the source itself cannot be run ({error})"[:500]) from error
    try:
        model, problems = load(after.files.path, after)
        found = logits_of(model, sample)
        said = generated(model, sample)
    except Exception as error:  # whatever transformers makes of a wrong folder, it is the folder's failure
        return [Check(claim=loads, passed=False, detail=f"{type(error).__name__}: {error}"[:500])]
    ascending = all(plan.layers[layer].is_ascending for layer in before.counts)
    difference = float((found - expected).abs().max())
    same = torch.equal(found, expected)
    close = difference <= ROUNDING * max(float(expected.abs().max()), 1.0)
    how = "bit for bit" if same else f"largest difference {difference:.3g}"
    seen = f"{len(sample)} images" if sample.is_floating_point() else f"{sample.shape[1]} tokens"
    speech = "it is no language model" if said is None else " ".join(map(str, said))
    return [
        Check(claim=loads, passed=not problems, detail=str(problems)[:500] if problems else type(model).__name__),
        Check(claim=equal, passed=same if ascending else close, detail=f"{seen}, {how}"),
        Check(claim=speaks, passed=None if said is None else len(said) == NEW_TOKENS, detail=speech),
    ]


def as_json(source: Path, pruned: Path, checks: list[Check]) -> dict[str, Any]:
    """The result as JSON; `passed` is False where any check failed."""
    return {
        "format": "secateur-verify",
        "version": 1,
        "source": str(source),
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
