"""Is a folder what its upcycle.json makes of the parents? Every tensor is read and worked out anew, one at a time.

The tensors are read by safetensors' own reader, and means and products worked out whole: another way than they were
written. The record says only what was asked for, which neurons went where, and what the routers are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from secateur.errors import SecateurError
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.checks.check import Check, check_of
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.tensor_files import CONFIG, read_tensor_files
from secateur.model_folder.rewrite.compare import same_files
from secateur.upcycling.expected import Grown, expected_tensors
from secateur.upcycling.forms import blueprint, check_form
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.parents import Parents, read_parents
from secateur.upcycling.recipe import Division
from secateur.upcycling.record import UpcycleFile, read_record
from secateur.upcycling.write import carried, digests

PARENTS = "the parents are those of upcycle.json, by their SHA-256"
CLAIMS = {
    "copied": "every expert and every copied tensor equals its part of the parent",
    "averaged": "every averaged tensor is the nearest of its type to the mean of the parents",
    "router": "the routers are there, as upcycle.json has them; experts of one unit have equal rows",
}
RECORDED = "upcycle.json says of every tensor what it was made of"
WHOLE = "the folder has these tensors and no others, and its architecture loads them"
CONFIGURED = "config.json is what the architecture needs"
SIDE_FILES = "the tokenizer and other files are the first parent's"


def check_upcycled(paths: Sequence[Path], out: Path, on_bytes: OnProgress = silent) -> list[Check]:
    """All checks of a folder that `upcycle` wrote.

    Raises:
        SecateurError: a folder is damaged or no model, or upcycle.json does not fit the parents.
    """
    record, asked = read_record(out)
    if len(paths) != len(record.parents):
        count, names = len(record.parents), ", ".join(one.name for one in record.parents)
        raise SecateurError(
            f"{out}: it was grown from {count} models, found {len(paths)}; expected {names:.200}, in this order"
        )
    check_form(asked, len(paths))
    parents = read_parents(paths, allow_unrelated=asked.allow_unrelated)
    plan = blueprint(asked, parents)
    layout_of(plan).check(parents, plan)
    grown = Grown(
        parents=parents,
        plan=plan,
        asked=asked,
        division=_division(record, parents, out),
        written=read_tensor_files(out),
    )
    wrong = [
        f"{parent.path}: other files"
        for parent, here, then in zip(parents.each, digests(parents), record.parents, strict=True)
        if here["files"] != then.files
    ]
    checks = [check_of(PARENTS, wrong, f"{len(paths)} parents")]
    return [*checks, *_tensors(grown, record, on_bytes), *_others(grown)]


def _tensors(grown: Grown, record: UpcycleFile, on_bytes: OnProgress) -> list[Check]:
    written = grown.written
    faults: dict[str, list[str]] = {made: [] for made in CLAIMS}
    counts = dict.fromkeys(CLAIMS, 0)
    strays, told, left, done = [], [], set(written.tensors), 0
    unknown = set(record.tensors)
    for one in expected_tensors(grown):
        said = record.tensors.get(one.name)
        if said is None or (said.made, said.of, said.times) != (one.made, one.of, one.times):
            told.append(f"{one.name} is {one.made} of {', '.join(one.of)} times {one.times:g}")
        unknown.discard(one.name)
        if one.name not in left:
            strays.append(f"{one.name} is missing")
            continue
        left.remove(one.name)
        counts[one.made] += 1
        done += written.tensors[one.name].length
        on_bytes(done, written.num_bytes)
        why = one.fault() or (_unlike_record(grown, record, one.name) if one.made == "router" else "")
        if why:
            faults[one.made].append(f"{one.name} {why}")
    strays += [f"{name} is unexpected" for name in sorted(left)]
    told += [f"{name} is unexpected" for name in sorted(unknown)]
    return [
        *(check_of(claim, faults[made], f"{counts[made]} tensors") for made, claim in CLAIMS.items()),
        check_of(RECORDED, told, f"{len(record.tensors)} tensors"),
        check_of(WHOLE, strays or _load_problems(written.path), f"{len(written.tensors)} tensors"),
    ]


def _unlike_record(grown: Grown, record: UpcycleFile, name: str) -> str:
    data = grown.ours(name).contiguous().view(torch.uint8).numpy().tobytes()
    return "" if hashlib.sha256(data).hexdigest() == record.routers.get(name) else "is not the one of upcycle.json"


def _division(record: UpcycleFile, parents: Parents, out: Path) -> Division:
    found = record.division
    whole = list(range(parents.width))
    for layer, one in found.items():
        if layer >= parents.layers or sorted(one) != whole:
            raise SecateurError(f"{out}: upcycle.json: 'division.{layer}' is no order of {parents.width} neurons")
    if found and len(found) != parents.layers:
        raise SecateurError(f"{out}: upcycle.json: a division of {len(found)} layers, expected {parents.layers}")
    return found


def _others(grown: Grown) -> list[Check]:
    parents, written = grown.parents, grown.written
    expected, out = layout_of(grown.plan).config(parents, grown.plan), written.path
    wrong = [
        f"{key} is {written.config.get(key)!r:.60}, expected {expected.get(key)!r:.60}"
        for key in {**expected, **written.config}
        if expected.get(key) != written.config.get(key)
    ]
    files = carried(parents)
    differ = [
        f"{name} differs"
        for name in files
        if not (out / name).is_file() or not same_files(parents.first.path / name, out / name)
    ]
    return [
        check_of(CONFIGURED, wrong, f"{len(expected)} keys of {CONFIG}"),
        check_of(SIDE_FILES, differ, f"{len(files)} files"),
    ]


def _load_problems(folder: Path) -> list[str]:
    from secateur.model_folder.read.load import problems_by_names

    return [f"{key}: {names[:3]}" for key, names in problems_by_names(read_model_folder(folder)).items()]
