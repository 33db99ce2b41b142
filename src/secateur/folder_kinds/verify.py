"""Prove what a folder was made of, whatever made it: `apply` and `prune` from one model, `upcycle` from dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.progress import OnStage, stage
from secateur.model_folder.checks.claims import Verification, as_json, check_tokens, verify_model
from secateur.upcycling.record import holds_record


def verify(
    source: StrPaths,
    pruned: StrPath,
    *,
    tokens: int = 32,
    text: StrPath | None = None,
    seed: int = 0,
    on_progress: OnStage | None = None,
) -> Verification:
    """Prove that a pruned model is what its plan makes of its source, or a grown one what its record makes of parents.

    Pruned: every tensor and every other file is compared with the source byte by byte. The result must load with
    nothing missing and compute what the source computes with the dropped experts barred; both models run one decoder
    layer at a time. Where the result fits in memory, it must generate, too.
    Grown: every tensor is made anew from the parents, copies byte for byte, averages to the last place. Neither runs.

    Args:
        source: the folder of the model that was pruned; or of all parents, in the order that `upcycle` was given.
        pruned: the folder that `apply`, `prune` or `upcycle` wrote.
        tokens: of a pruned model: length of the sample that both models are run on; 0 runs neither.
        text: of a pruned model: a file to take the sample from; random without it. seed: of the random sample.
        on_progress: called with ("comparing", bytes compared, bytes to compare) and ("running the source" or "running
            the result", decoder layers done, in all).

    Returns:
        All checks, and whether they passed. A check that fails raises nothing; later ones are left out where they make
        no sense after it.

    Raises:
        SecateurError: one of the folders is no model folder, is damaged, was changed meanwhile, or the result has no
            report of `apply` and no record of `upcycle`.

    Example:
        >>> secateur.verify("models/Qwen3-30B-A3B", "pruned").passed
        True
        >>> secateur.verify(["seed", "code", "law"], "grown").passed
        True
    """
    check_given(verify, locals())
    check_tokens(tokens)
    sources, result = [Path(one) for one in as_texts(source)], Path(pruned)
    sample = None if text is None else Path(text)
    if holds_record(result):
        content = _grown(sources, result, sample, on_progress)
    else:
        if len(sources) != 1:
            raise SecateurError(
                f"{result}: found {len(sources)} sources, but it was not grown from several models; expected one"
            )
        checks = verify_model(sources[0], result, num_tokens=tokens, text=sample, seed=seed, on_progress=on_progress)
        content = as_json(sources[0], result, checks)
    return Verification.of(content)


def _grown(parents: list[Path], grown: Path, text: Path | None, on_progress: OnStage | None) -> dict[str, Any]:
    from secateur.upcycling.checks import check_upcycled

    if text is not None:
        raise SecateurError(f"--text: {grown} was grown by `upcycle`; its tensors are compared and nothing is run")
    return as_json(parents, grown, check_upcycled(parents, grown, stage("comparing", on_progress)))
