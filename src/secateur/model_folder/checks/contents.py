"""What must lie in a pruned folder, file by file; no model is built for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import modeling_secateur
from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.json import read_object
from secateur.files.progress import OnProgress, counted
from secateur.model_folder.checks.check import SHOWN, Check, check_of
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import CONFIG, INDEX, STATS
from secateur.model_folder.rewrite.apply import history_of, index_metadata
from secateur.model_folder.rewrite.compare import differences, same_files
from secateur.model_folder.rewrite.config_json import edited_config
from secateur.model_folder.rewrite.pieces import kept_tensors
from secateur.model_folder.rewrite.report import REPORT, VERIFIED, describe
from secateur.model_folder.rewrite.side_files import CARD, CODE, PAGE, PLAN, SideFiles, side_files
from secateur.model_folder.rewrite.writer import file_metadata
from secateur.model_folder.rewrite.zero_slots import kept_slots
from secateur.plans import Plan
from secateur.surgery.config_json import is_pruned
from secateur.version import __version__

COUNTS = "every layer has the experts that the plan keeps, and config.json says so"
TENSORS = "every kept tensor equals its source byte for byte"
CONFIGURED = "every key of config.json is as in the source, or as the plan changes it"
SIDE_FILES = "the tokenizer and all other files are as in the source, or as the plan changes them"
NO_STRAYS = "no file is there that does not belong to the result"
INDEXED = "the index and the headers of the weight files say what they hold"
RECORDS = "plan.json and report.json tell of this pruning"
OF_THIS_RUN = ("secateur", "source", "name")  # in report.json: which program, and what the source was called then


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is compared. given: the plan of the step. plan: the same, listing every layer. mtp: see `apply`."""

    before: ModelFolder
    after: ModelFolder
    given: Plan
    plan: Plan
    mtp: str | None

    @property
    def left_out(self) -> frozenset[str]:
        return self.before.mtp if self.mtp == "drop" else frozenset()


def counts_check(pruning: Pruning) -> Check:
    """Experts of each layer by names, shapes and config.json; where it fails, the plan is not of these two folders."""
    before, after, plan = pruning.before, pruning.after, pruning.plan
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
    return Check(claim=COUNTS, passed=passed, detail=detail)


def content_checks(pruning: Pruning, on_bytes: OnProgress) -> list[Check]:
    """All that is claimed of the files, once the counts are right."""
    files = side_files(pruning.before, pruning.plan)
    return [
        _tensors(pruning, on_bytes),
        _config(pruning),
        _side_files(pruning, files),
        _no_strays(pruning, files),
        _index(pruning),
        _records(pruning, files),
    ]


def _tensors(pruning: Pruning, on_bytes: OnProgress) -> Check:
    before, after = pruning.before, pruning.after
    on_chunk = counted(after.files.num_bytes, on_bytes)
    found = [str(one) for one in differences(before, after, pruning.plan, pruning.left_out, on_chunk=on_chunk)]
    detail = f"{len(after.files.tensors)} tensors, {in_words(after.files.num_bytes)}"
    if found:
        detail = f"{len(found)} tensors are not: " + "; ".join(found[:SHOWN])
    return Check(claim=TENSORS, passed=not found, detail=detail)


def _config(pruning: Pruning) -> Check:
    expected = edited_config(pruning.before, pruning.plan, pruning.mtp)
    failures = list(unlike(expected, dict(pruning.after.files.config)))
    return check_of(CONFIGURED, failures, f"{len(expected)} keys")


def _side_files(pruning: Pruning, files: SideFiles) -> Check:
    old, new = pruning.before.files.path, pruning.after.files.path
    failures = [_unlike_file(old / name, new / name, str(name)) for name in files.copied]
    failures += [_unlike_bytes(content, new / name, str(name)) for name, content in files.rewritten.items()]
    counted = len(failures)
    if is_pruned(pruning.after.files.config):
        failures.append(_unlike_code(new))
        counted += 1
    return check_of(SIDE_FILES, [one for one in failures if one], f"{counted} files")


def _unlike_file(old: Path, new: Path, name: str) -> str:
    if not new.is_file():
        return f"{name} is missing"
    return "" if same_files(old, new) else f"{name} differs from the source's"


def _unlike_bytes(content: bytes, new: Path, name: str) -> str:
    if not new.is_file():
        return f"{name} is missing"
    return "" if new.read_bytes() == content else f"{name} is not what the plan makes of the source's"


def _unlike_code(new: Path) -> str:
    """The code that transformers runs for layers that differ; only that of our own version is known."""
    if not (new / CODE).is_file():
        return f"{CODE} is missing"
    if read_object(new / REPORT).get("secateur") != __version__:
        return ""
    return "" if same_files(Path(modeling_secateur.__file__), new / CODE) else f"{CODE} is not Secateur's"


def _no_strays(pruning: Pruning, files: SideFiles) -> Check:
    after = pruning.after.files
    own = {PLAN, REPORT, PAGE, CARD, VERIFIED, STATS} | ({CODE} if is_pruned(after.config) else set())
    expected = own | {str(name) for name in (*files.copied, *files.rewritten)}
    found = [str(name) for name in (*after.others, *after.left_out)]
    strays = [f"{name} is neither of the source nor of `apply`" for name in found if name not in expected]
    return check_of(NO_STRAYS, strays, f"{len(found) + len(after.headers)} files beside {CONFIG}")


def _index(pruning: Pruning) -> Check:
    before, after = pruning.before.files, pruning.after.files
    failures: list[str] = []
    if (after.index is None) != (before.index is None):
        failures.append(f"{INDEX} is {'missing' if after.index is None else 'unexpected'}")
    elif after.index is not None:
        expected = {"metadata": index_metadata(before, after.num_bytes), "weight_map": after.index.get("weight_map")}
        failures += unlike(expected, dict(after.index), f"{INDEX}: ")
    for name, header in after.headers.items():
        failures += unlike(file_metadata(before), dict(header.metadata), f"{name}: ")
    listed = "no index, as in the source" if after.index is None else f"{len(after.tensors)} tensors listed"
    return check_of(INDEXED, failures, f"{listed}, {len(after.headers)} files")


def _records(pruning: Pruning, files: SideFiles) -> Check:
    source, result = pruning.before.files.path, pruning.after.files.path
    failures: list[str] = []
    try:
        found = Plan.load(result / PLAN)
        steps = history_of(source, pruning.given)
        failures += unlike(steps.to_json(), found.to_json(), f"{PLAN}: ")
    except SecateurError as error:
        failures.append(str(error))
    kept = kept_tensors(pruning.before, pruning.plan, pruning.left_out)
    expected = describe(pruning.before, pruning.given, pruning.plan, kept, pruning.mtp, files)
    report = read_object(result / REPORT)
    known = expected.keys() if report.get("secateur") == __version__ else expected.keys() & report.keys()
    failures += unlike(
        {key: value for key, value in expected.items() if key in known and key not in OF_THIS_RUN},
        {key: value for key, value in report.items() if key in expected and key not in OF_THIS_RUN},
        f"{REPORT}: ",
    )
    return check_of(RECORDS, failures, f"criterion {pruning.given.criterion}")


def unlike(expected: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """In words, every key of JSON that differs, is missing or unexpected."""
    for key in _in_order(expected, found):
        name = f"{path}{key}"
        if key not in found:
            yield f"{name} is missing"
        elif key not in expected:
            yield f"{name} is unexpected"
        elif isinstance(expected[key], dict) and isinstance(found[key], dict):
            yield from unlike(expected[key], found[key], f"{name}.")
        elif _text(expected[key]) != _text(found[key]):
            yield f"{name} is {_text(found[key]):.80}, expected {_text(expected[key]):.80}"


def _in_order(*objects: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key for one in objects for key in one))


def _text(value: Any) -> str:
    """Of JSON, where 1 and 1.0 and true are three values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
