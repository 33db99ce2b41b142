"""How a plan was made, in words: rows for the model card and the page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from secateur.criteria import CRITERIA
from secateur.errors import SecateurError
from secateur.files.records import Expert, Finite, Layer, as_record
from secateur.plans import REROUTE, ZERO_SLOT

MEANINGS = {
    REROUTE: "its row of the router went too: its tokens go to the next experts",
    ZERO_SLOT: "its slot stayed in the router and contributes nothing",
}
LOCAL = ("specs", "file")  # paths of whoever made the plan: in plan.json, but not on a card for everybody

Ids = dict[Layer, tuple[Expert, ...]]


class SuperExperts(Struct, frozen=True, kw_only=True):
    """Ids by layer."""

    protected: Ids | None = None
    rescued: Ids | None = None


class Details(Struct, frozen=True, kw_only=True):
    """What our commands write into the details of a plan."""

    keep: Annotated[dict[str, Any], Meta(min_length=1)] | None = None
    rule: dict[str, Any] | None = None
    allocation: str | None = None
    seed: int | None = None
    data: dict[str, Any] | None = None
    rerouted_share: Finite | None = None
    super_experts: SuperExperts = SuperExperts()
    never_routed: Ids | None = None
    zero_weights: Ids | None = None


def recipe(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, its value) for all that the JSON of a plan tells of its making; what it does not tell has no row."""
    details = _told(plan.get("details") or {})
    rows = (
        ("criterion", _criterion(plan["criterion"])),
        ("kept", _keep(details.keep)),
        ("rule", _pairs(details.rule)),
        ("counts of the layers", _allocation(details)),
        ("a removed expert", MEANINGS[plan.get("removed") or REROUTE]),
        ("seed", details.seed),
        *(
            (f"calibration: {name.replace('_', ' ')}", _short(value))
            for name, value in (details.data or {}).items()
            if name not in LOCAL
        ),
        ("routed tokens that lose their expert", _share(details.rerouted_share)),
        ("super-experts protected", _ids(details.super_experts.protected)),
        ("of these the criterion would have dropped", _ids(details.super_experts.rescued)),
        ("never routed to", _ids(details.never_routed)),
        ("experts whose weights are all 0", _ids(details.zero_weights)),
        ("statistics", plan.get("stats_digest") and f"sha256 {plan['stats_digest']}"),
    )
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _criterion(name: str) -> str:
    known = CRITERIA.get(name)
    if known is None:
        return name
    return f"{name}: {known.help} ({'arXiv ' if known.source[0].isdigit() else ''}{known.source})"


def _told(details: Mapping[str, Any]) -> Details:
    """The details that are of our commands' form; others may write there what they like, and it gets no row."""
    ours = {}
    for name in Details.__struct_fields__:
        with contextlib.suppress(SecateurError, KeyError):
            as_record({name: details[name]}, Details, "details")
            ours[name] = details[name]
    return as_record(ours, Details, "details")


def _keep(keep: Mapping[str, Any] | None) -> str | None:
    if keep is None:
        return None
    (kind, value), *_ = keep.items()
    words = {
        "share": f"{value} of the experts",
        "count": f"{value} experts a layer",
        "num_bytes": f"what fits in {value} bytes",
        "layers": f"experts of each layer: {_pairs(value)}",
    }
    return words.get(kind)


def _allocation(details: Details) -> str | None:
    """How the counts of the layers were found; a plan made for given ones names an allocation that decided nothing."""
    return "given one by one" if details.keep and "layers" in details.keep else details.allocation


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f} %"


def _pairs(value: Any) -> str | None:
    """What a mapping holds in one line; longer lists by their length."""
    if not isinstance(value, Mapping) or not value:
        return None
    return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items() if entry is not None)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"({_pairs(value) or ''})"
    if isinstance(value, list):
        return " ".join(map(_short, value)) if len(value) <= 4 else f"({len(value)} entries)"
    return str(value)


def _ids(found: Ids | None) -> str | None:
    if found is None:
        return None
    if not found:
        return "none"
    return "; ".join(f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in found.items())
