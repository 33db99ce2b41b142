"""What a pruned model does: it loads, computes what its source computes without the dropped experts, and generates.

Both models run one decoder layer at a time, so neither has to fit in memory. Where the pruned one does, it is loaded as
a whole instead, and generates.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.data.batch import Batch
from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.files.progress import OnProgress, OnStage, silent, stage
from secateur.model_folder.checks.check import LONGEST, Check
from secateur.model_folder.checks.contents import Pruning
from secateur.model_folder.checks.oracle import kept_spans, without_dropped
from secateur.model_folder.checks.sample import NEW_TOKENS, generated, is_of_images, sample_for
from secateur.model_folder.read.load import UNEXPECTED, WHILE_LOADING, load, problems_by_names, why_not_loaded
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import KeptStates

LOADS = "it loads with no tensor missing, unexpected or newly initialised"
EQUAL = "its logits are those of the source with {}"
WITHOUT = {False: "the dropped experts barred", True: "the dropped experts silent"}  # by Plan.leaves_zero_slots
SPEAKS = "it generates"
ROUNDING = 1e-4  # of the largest value, where experts changed places and sums are taken in another order
UNABLE = (RuntimeError, ValueError, TypeError, IndexError)  # what the code of a model raises where it cannot run


@dataclass(frozen=True, kw_only=True)
class Run:
    """logits: of the sample. hidden: what every decoder layer handed on; nothing of a model that ran as a whole."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class NotRun(Exception):  # noqa: N818 - no error: the reason why a claim is not looked at
    """A model cannot be run here, and that is no failure of its folder."""


def computing_checks(
    pruning: Pruning, num_tokens: int, text: Path | None, seed: int, on_progress: OnStage | None = None
) -> list[Check]:
    """The claims for which a model is built.

    Args:
        num_tokens: of the sample that both models are run on; 0 runs neither. text: a file to take it from; random
            without one, from `seed`.
        on_progress: called with ("running the source" or "running the result", decoder layers done, in all).

    Raises:
        SecateurError: the source itself cannot be run.
    """
    equal = EQUAL.format(WITHOUT[pruning.plan.leaves_zero_slots])
    if pruning.before.files.is_quantised:
        reason = "its weights are quantised: they are compared as bytes, with their names and config.json"
        return [Check(claim=claim, passed=None, detail=reason) for claim in (LOADS, equal, SPEAKS)]
    loads = _loads(pruning)
    if not loads.passed:
        return [loads]
    if num_tokens == 0:
        return [loads, *(Check(claim=claim, passed=None, detail="--tokens 0") for claim in (equal, SPEAKS))]
    sample = sample_for(pruning.before.files.path, pruning.before, num_tokens, text, seed)
    try:
        expected = _source_run(pruning, sample, stage("running the source", on_progress))
    except NotRun as reason:
        return [loads, *(Check(claim=claim, passed=None, detail=str(reason)) for claim in (equal, SPEAKS))]
    too_large = why_not_loaded(pruning.after, WHILE_LOADING)
    on_step = stage("running the result", on_progress)
    if too_large is not None:
        speaks = Check(claim=SPEAKS, passed=None, detail=too_large)
        if not expected.hidden:
            return [loads, Check(claim=equal, passed=None, detail=too_large), speaks]
        return [loads, _compared(pruning, sample, expected, None, equal, on_step), speaks]
    try:
        model, problems = load(pruning.after.files.path, pruning.after)
    except Exception as error:  # see _loads
        return [Check(claim=LOADS, passed=False, detail=_short(error))]
    if problems := _of_result(problems, pruning.before):
        return [Check(claim=LOADS, passed=False, detail=str(problems)[:LONGEST])]
    return [loads, _compared(pruning, sample, expected, model, equal, on_step), _speaks(model, sample)]


def _loads(pruning: Pruning) -> Check:
    """By the names, types and shapes in the files, as transformers itself reports them."""
    folder = pruning.after
    try:
        found = problems_by_names(folder)
        problems = _of_result(found, pruning.before)
    except Exception as error:  # whatever transformers makes of a wrong folder, it is the folder's failure
        return Check(claim=LOADS, passed=False, detail=_short(error))
    detail = str(problems)[:LONGEST] if problems else str(folder.config.model_class.__name__)
    if left := len(found.get(UNEXPECTED, ())) - len(problems.get(UNEXPECTED, ())):
        detail += f"; it leaves {left} names unread, as it does of the source"
    return Check(claim=LOADS, passed=not problems, detail=detail)


def _of_result(problems: Mapping[str, Sequence[str]], source: ModelFolder) -> dict[str, list[str]]:
    """What transformers reports, but for names that its class has no place for in the source either."""
    if not problems:
        return {}
    unread = set(problems_by_names(source).get(UNEXPECTED, ()))
    left = {kind: [one for one in found if kind != UNEXPECTED or one not in unread] for kind, found in problems.items()}
    return {kind: found for kind, found in left.items() if found}


def _source_run(pruning: Pruning, sample: Tensor, on_step: OnProgress) -> Run:
    """The source with its dropped experts barred or silent: layer by layer, or as a whole where that cannot be.

    Raises:
        NotRun: it cannot be run layer by layer, and does not fit in memory. SecateurError: it cannot be run at all.
    """
    source = pruning.before
    reason = "it reads images and is run as a whole"
    try:
        if not is_of_images(source):
            return _streamed(source, sample, on_step, pruning)
    except SecateurError as error:
        reason = str(error)
    except UNABLE as error:
        raise SecateurError(_cannot(source, error)) from error
    if too_large := why_not_loaded(source, WHILE_LOADING):
        raise NotRun(f"{reason}; {too_large}"[:LONGEST])
    try:
        model, _ = load(source.files.path, source)
        with without_dropped(model, source, pruning.plan):
            run = Run(logits=logits_of(model, sample))
    except UNABLE as error:
        raise SecateurError(_cannot(source, error)) from error
    if not bool(run.logits.isfinite().all()):
        raise SecateurError(_cannot(source, "its logits are not finite"))
    del model
    gc.collect()
    return run


def _cannot(source: ModelFolder, why: object) -> str:
    return f"{source.files.path}: the source itself cannot be run ({why})"[:LONGEST]


def _streamed(
    folder: ModelFolder, sample: Tensor, on_step: OnProgress = silent, source_of: Pruning | None = None
) -> Run:
    """One decoder layer in memory at a time; of a source without what its pruning drops."""
    streamed = StreamedModel(folder, spans={} if source_of is None else kept_spans(folder, source_of.plan))
    batches, states, logits = [Batch(input_ids=sample)], KeptStates(), []
    changed: AbstractContextManager[None] = nullcontext()
    if source_of is not None:
        changed = without_dropped(streamed.model, folder, source_of.plan)
    with changed:
        streamed.run_layers(batches, states, on_step=on_step)
        streamed.run_head(batches, states, lambda index, batch, found: logits.append(found))
    return Run(logits=logits[0], hidden=tuple(states.handed_on))


def _compared(
    pruning: Pruning, sample: Tensor, expected: Run, model: nn.Module | None, claim: str, on_step: OnProgress
) -> Check:
    """The result on the same sample: the loaded `model`, or layer by layer."""
    ascending = all(pruning.plan.layers[layer].is_ascending for layer in pruning.before.counts)
    try:
        found = _streamed(pruning.after, sample, on_step) if model is None else Run(logits=logits_of(model, sample))
    except Exception as error:  # see _loads
        return Check(claim=claim, passed=False, detail=_short(error))
    same = torch.equal(found.logits, expected.logits)
    difference = float((found.logits - expected.logits).abs().max())
    seen = f"{len(sample)} images" if sample.is_floating_point() else f"{sample.shape[1]} tokens"
    how = "bit for bit" if same else f"largest difference {difference:.3g}"
    by_layer = "" if model is not None else ", one layer in memory at a time"
    passed = same if ascending else _is_close(found.logits, expected.logits)
    where = "" if passed else _first_different(pruning, sample, expected, found, ascending)
    return Check(claim=claim, passed=passed, detail=f"{seen}, {how}{by_layer}{where}"[:LONGEST])


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= ROUNDING * max(float(expected.abs().max()), 1.0)


def _first_different(pruning: Pruning, sample: Tensor, expected: Run, found: Run, ascending: bool) -> str:
    """Which layer is the first to hand on something else, where both models can be run layer by layer."""
    if not expected.hidden:
        return ""
    try:
        hidden = found.hidden or _streamed(pruning.after, sample).hidden
    except (SecateurError, *UNABLE):
        return ""
    agree = torch.equal if ascending else _is_close
    pairs = enumerate(zip(hidden, expected.hidden, strict=True))
    first = next((layer for layer, (ours, theirs) in pairs if not agree(ours, theirs)), None)
    return ", first after the last layer" if first is None else f", first in layer {first}"


def _speaks(model: PreTrainedModel, sample: Tensor) -> Check:
    try:
        said = generated(model, sample)
    except Exception as error:  # of code of the model
        return Check(claim=SPEAKS, passed=False, detail=_short(error))
    if said is None:
        return Check(claim=SPEAKS, passed=None, detail="it is no language model")
    return Check(claim=SPEAKS, passed=len(said) == NEW_TOKENS, detail=" ".join(map(str, said)))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST]
