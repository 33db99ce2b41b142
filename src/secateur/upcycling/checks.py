"""Is a folder what its upcycle.json makes of the parents? Every tensor is read and worked out anew, one at a time.

The tensors are read by safetensors' own reader, and means and products worked out whole: another way than they were
written. The record says only what was asked for, which neurons went where, and what the routers are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.checks.check import Check, check_of
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import CONFIG, TensorFiles, read_tensor_files
from secateur.model_folder.rewrite.compare import same_files
from secateur.upcycling.forms import Blueprint, blueprint, check_form
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents, check_target_takes, read_parents
from secateur.upcycling.recipe import (
    SHARED_FACTOR,
    Division,
    expert_name,
    neurons_of,
    new_config,
    router_names,
    shared_name,
)
from secateur.upcycling.record import UpcycleFile, read_record
from secateur.upcycling.targets import FFN
from secateur.upcycling.write import carried, digests

PARENTS = "the parents are those of upcycle.json, by their SHA-256"
COPIES = "every expert and every copied tensor equals its part of the parent"
MEANS = "every averaged tensor is the nearest of its type to the mean of the parents"
ROUTERS = "the routers are there, as upcycle.json has them; experts of one unit have equal rows"
WHOLE = "the folder has these tensors and no others, and the stock architecture loads them"
CONFIGURED = "config.json is what the architecture needs"
SIDE_FILES = "the tokenizer and other files are the first parent's"
NEAR = 0.5 * (1 + 1e-3)  # units in the last place; doubles become bfloat16 by way of float32
SIGMAS = 8.0  # of noise, that no entry exceeds


def check_upcycled(paths: Sequence[Path], out: Path, on_bytes: OnProgress = silent) -> list[Check]:
    """All checks of a folder that `upcycle` wrote.

    Raises:
        SecateurError: a folder is damaged or no model, or upcycle.json does not fit the parents.
    """
    record, asked = read_record(out)
    check_form(asked, len(paths))
    parents = read_parents(paths, allow_unrelated=asked.allow_unrelated)
    plan = blueprint(asked, parents)
    check_target_takes(parents, plan.target)
    written = read_tensor_files(out)
    division = _division(record, parents, plan, out)
    told = [{"name": one.name, "files": one.files} for one in record.parents]
    wrong = [
        f"{parent.path}: other files"
        for parent, here, then in zip(parents.each, digests(parents), told, strict=False)
        if here["files"] != then["files"]
    ]
    if len(told) != len(paths):
        wrong.append(f"{len(paths)} parents, expected {len(told)}")
    checks = [check_of(PARENTS, wrong, f"{len(paths)} parents")]
    expected = _Expected(parents, plan, asked, division, written, record)
    return [*checks, *expected.checks(on_bytes), *_others(parents, plan, out, written)]


class _Expected:
    """Works out every tensor of the mixture anew."""

    def __init__(
        self,
        parents: Parents,
        plan: Blueprint,
        asked: Asked,
        division: Division,
        written: TensorFiles,
        record: UpcycleFile,
    ) -> None:
        self.parents, self.plan, self.asked, self.division = parents, plan, asked, division
        self.written, self.record = written, record
        self.left = set(written.tensors)
        self.done = 0

    def checks(self, on_bytes: OnProgress) -> list[Check]:
        found: dict[str, list[str]] = {COPIES: [], MEANS: [], ROUTERS: []}
        counts = dict.fromkeys(found, 0)
        missing = []
        for claim, name, fault in self._all():
            if name not in self.left:
                missing.append(f"{name} is missing")
                continue
            self.left.remove(name)
            counts[claim] += 1
            self.done += self.written.tensors[name].length
            on_bytes(self.done, self.written.num_bytes)
            if why := fault():
                found[claim].append(f"{name} {why}")
        strays = [*missing, *(f"{name} is unexpected" for name in sorted(self.left))]
        if not strays:
            strays = _load_problems(self.written.path)
        return [
            *(check_of(claim, wrong, f"{counts[claim]} tensors") for claim, wrong in found.items()),
            check_of(WHOLE, strays, f"{len(self.written.tensors)} tensors"),
        ]

    def _all(self) -> Iterator[tuple[str, str, Any]]:
        plan = self.plan
        for name in self.parents.first.files.tensors:
            parts = split(name)
            if parts is None or parts.rest not in FFN.values():
                claim = COPIES if len(self.parents.each) == 1 or self.asked.attention_from is not None else MEANS
                yield claim, name, lambda name=name: self._rest(name)
        for layer in range(self.parents.layers):
            listed = self.division.get(layer)
            for number, source in enumerate(plan.experts):
                neurons = neurons_of(plan, source, listed)
                for role in FFN:
                    factor = plan.factor if role == "down" else 1.0
                    yield COPIES, expert_name(plan, layer, number, role), self._part(
                        expert_name(plan, layer, number, role), source.parent, layer, role, neurons, factor,
                        self.asked.noise,
                    )  # fmt: skip
            if plan.target.shared:
                busy: Sequence[int] = range(plan.shared) if listed is None else listed[: plan.shared]
                for role in FFN:
                    name, factor = shared_name(layer, role), SHARED_FACTOR if role == "down" else 1.0
                    yield COPIES, name, self._part(name, 0, layer, role, busy, factor, 0.0)
            for name in filter(None, router_names(plan, layer)):
                yield ROUTERS, name, lambda name=name: self._router(name)

    def _rest(self, name: str) -> str:
        only = self.asked.attention_from
        each = self.parents.each if only is None else [self.parents.each[only]]
        ours, theirs = _read(self.written, name), [_read(one.files, name) for one in each]
        if len(theirs) == 1:
            return "" if _same(ours, theirs[0]) else "differs from its parent"
        return _unlike(ours, torch.stack([one.double() for one in theirs]).mean(0))

    def _part(
        self, name: str, number: int, layer: int, role: str, neurons: Sequence[int], factor: float, noise: float
    ) -> Any:
        def fault() -> str:
            ours = _read(self.written, name)
            whole = _read(self.parents.each[number].files, f"model.layers.{layer}.{FFN[role]}")
            at = torch.tensor(list(neurons), dtype=torch.long)
            part = whole.index_select(1 if role == "down" else 0, at)
            if noise:
                wanted = part.double() * factor
                bound = SIGMAS * noise * float(wanted.square().mean().sqrt()) + float(_ulp(ours).max())
                far = float((ours.double() - wanted).abs().max()) if ours.shape == wanted.shape else float("inf")
                return "" if far <= bound else f"is {far:.3g} from its parent, more than its noise"
            if factor == 1:
                return "" if _same(ours, part) else "differs from its part of the parent"
            return _unlike(ours, part.double() * factor)

        return fault

    def _router(self, name: str) -> str:
        ours = _read(self.written, name)
        digest = hashlib.sha256(ours.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        if digest != self.record.routers.get(name):
            return "is not the one of upcycle.json"
        if ours.shape[0] == len(self.plan.experts):
            first: dict[int, int] = {}
            for row, source in enumerate(self.plan.experts):
                if not torch.equal(ours[row], ours[first.setdefault(source.unit, row)]):
                    return f"has another row for expert {row} than for others of its unit"
        return ""


def _division(record: UpcycleFile, parents: Parents, plan: Blueprint, out: Path) -> Division:
    found = {int(layer): one for layer, one in record.division.items()}
    whole = list(range(parents.width))
    for layer, one in found.items():
        if layer >= parents.layers or sorted(one) != whole:
            raise SecateurError(f"{out}: upcycle.json: 'division.{layer}' is no order of {parents.width} neurons")
    if found and len(found) != parents.layers:
        raise SecateurError(f"{out}: upcycle.json: a division of {len(found)} layers, expected {parents.layers}")
    return found


def _others(parents: Parents, plan: Blueprint, out: Path, written: TensorFiles) -> list[Check]:
    expected = new_config(parents, plan)
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


def _read(files: TensorFiles, name: str) -> Tensor:
    with safe_open(files.path / files.tensors[name].file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(name)
        return found


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    )


def _ulp(values: Tensor) -> Tensor:
    """The distance of each entry to the next larger one in size, of its own type."""
    if not values.numel():
        return torch.zeros(1, dtype=torch.float64)
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp_min(float(info.tiny))).exponent - 1
    return torch.ldexp(torch.full_like(values, float(info.eps), dtype=torch.float64), exponent)


def _unlike(ours: Tensor, wanted: Tensor) -> str:
    """Why a stored tensor is not what rounds to it; "" where it is."""
    if ours.shape != wanted.shape:
        return f"has shape {list(ours.shape)}, expected {list(wanted.shape)}"
    if not ours.numel():
        return ""
    off = ((ours.double() - wanted).abs() / _ulp(ours)).max()
    return "" if float(off) <= NEAR else f"is off by {float(off):.3g} units in the last place"
