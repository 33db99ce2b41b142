"""Place the experts of every layer of a model, and write that down for those who re-order them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur import placement
from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, write_together
from secateur.files.given import StrPath, check_given
from secateur.files.new_file import check_new_file
from secateur.files.progress import OnStage, stage
from secateur.placement.loads import Loads, as_loads, read_loads
from secateur.placement.one_layer import Placement
from secateur.placement.sglang import sglang_location
from secateur.plans import LayerPlan, Plan, plan_at
from secateur.results import Result

FORMAT = "secateur-placement"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Placements(Result):
    """What `place` found. layers: {layer: its placement}. plan: the same as a plan that re-orders and drops nothing."""

    layers: Mapping[int, Placement]
    plan: Plan = field(repr=False)

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        keys = ("balance_before", "balance_after", "balance_bound", "moved")
        rows = [
            (name, len(layer["order"]), *(layer[key] for key in keys)) for name, layer in self.content["layers"].items()
        ]
        return ("layer", "experts", *(key.replace("_", " ") for key in keys)), rows


def place(
    loads: StrPath | Mapping[int, Sequence[float]],
    ranks: int,
    *,
    method: Literal["swaps", "greedy", "exact"] = "swaps",
    groups: int = 1,
    nodes: int = 1,
    few_moves: float | None = None,
    out: StrPath | None = None,
    plan: StrPath | None = None,
    sglang: StrPath | None = None,
    num_layers: int | None = None,
    force: bool = False,
    on_progress: OnStage | None = None,
) -> Placements:
    """Place the experts of every layer on expert-parallel ranks, so that all ranks get the same load.

    Rank r owns the r-th block of the new order (`order[new] = old`). Balance is the busiest rank's load over the mean;
    the bound is what no order can go below.

    Args:
        loads: {layer: (E,) tokens of each expert}, or a file of them: JSON, saved statistics, or a run's loads.jsonl
            (its last window).
        ranks: expert-parallel ranks.
        method: swaps, greedy (LAEP's), or exact (small layers; up to 60 s each).
        groups: router groups; experts stay in theirs. nodes: they are levelled before their ranks.
        few_moves: move few experts only, for at most this share more on the busiest rank.
        out: a file for the placement, as JSON. plan: one for the plan, for what re-orders experts.
        sglang: a file for SGLang's --init-expert-location, for the model as it is, not re-ordered.
        num_layers: with `sglang`: layers of the model, where some have no experts.
        force: write over these files if they are there.
        on_progress: called with ("placing", layers done, layers in all).

    Returns:
        The placement of each layer, and the plan.

    Raises:
        SecateurError: unusable loads, an unknown method, numbers that do not divide (see `placement.place`), or a file
            to write that is not free.
        OSError: a file cannot be written.

    Example:
        >>> found = secateur.place({0: [100, 90, 60, 50, 40, 30, 20, 10]}, 4)
        >>> found.layers[0].order, found.layers[0].balance
        ((0, 7, 2, 5, 3, 4, 1, 6), 1.1)
    """
    check_given(place, locals())
    if num_layers is not None and sglang is None:
        raise SecateurError("--num-layers says how many rows --sglang writes; it needs --sglang")
    _check_targets({"out": out, "plan": plan, "sglang": sglang}, loads)
    name = "loads" if isinstance(loads, Mapping) else str(loads)
    given = as_loads(loads, name) if isinstance(loads, Mapping) else read_loads(Path(loads))
    on_layer = stage("placing", on_progress)
    placements = {}
    for layer, experts in given.items():
        try:
            placements[layer] = placement.place(
                experts, ranks, method=method, num_groups=groups, num_nodes=nodes, tolerance=few_moves
            )
        except SecateurError as error:
            raise SecateurError(f"{name}, layer {layer}: {error}") from None
        on_layer(len(placements), len(given))
    settings = {"ranks": ranks, "method": method, "groups": groups, "nodes": nodes, "tolerance": few_moves}
    content = _content(given, placements, settings)
    made = _plan(placements, settings)
    texts = {} if out is None else {"out": (Path(out), json.dumps(content, indent=1) + "\n")}
    if sglang is not None:
        texts["sglang"] = Path(sglang), json.dumps(sglang_location(placements, num_layers)) + "\n"
    # what a killed run has written already is as it would be written now
    for option, (path, text) in texts.items():
        check_new_file(path, force or _is_text(path, text), option=f"--{option}")
    if plan is not None:
        check_new_file(Path(plan), force or plan_at(Path(plan)) == made, option="--plan")
    writers: dict[Path, Callable[[], None]] = {
        path: functools.partial(atomic_write, path, text) for path, text in texts.values()
    }
    if plan is not None:
        writers[Path(plan)] = lambda: made.save(Path(plan))
    write_together(writers)
    return Placements(layers=placements, plan=made, content=content)


def _is_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _check_targets(written: Mapping[str, StrPath | None], loads: StrPath | Mapping[int, Any]) -> None:
    """Raises SecateurError: a file cannot be written, is the loads, or is another one of them."""
    sources = () if isinstance(loads, Mapping) else (Path(loads),)
    seen: dict[Path, str] = {}
    for option, path in written.items():
        if path is not None:
            check_new_file(Path(path), True, *sources, option=f"--{option}")
            before = seen.setdefault(Path(path).resolve(), option)
            if before != option:
                raise SecateurError(f"--{option} {path}: --{before} writes to the same file")


def _content(loads: Loads, placements: Mapping[int, Placement], settings: Mapping[str, Any]) -> dict[str, Any]:
    ranks = settings["ranks"]
    layers = {
        str(layer): {
            "order": list(found.order),
            "rank_loads": list(found.rank_loads),
            "balance_before": placement.balance(placement.rank_loads(loads[layer], range(len(loads[layer])), ranks)),
            "balance_after": found.balance,
            "balance_bound": found.lower_bound * ranks / sum(found.rank_loads),
            "moved": found.moved,
        }
        for layer, found in placements.items()
    }
    return {"format": FORMAT, "version": VERSION, "settings": dict(settings), "layers": layers}


def _plan(placements: Mapping[int, Placement], settings: Mapping[str, Any]) -> Plan:
    layers = {
        layer: LayerPlan(experts_before=len(found.order), order=found.order) for layer, found in placements.items()
    }
    return Plan(layers=layers, criterion="placement", details=dict(settings))
