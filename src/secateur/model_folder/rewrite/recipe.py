"""How a plan was made, in words: rows for the model card and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.criteria import CRITERIA
from secateur.plans import REROUTE, ZERO_SLOT

MEANINGS = {
    REROUTE: "its row of the router went too: its tokens go to the next experts",
    ZERO_SLOT: "its slot stayed in the router and contributes nothing",
}
LOCAL = ("specs", "file")  # paths of whoever made the plan: in plan.json, but not on a card for everybody


def recipe(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, its value) for all that the JSON of a plan tells of its making; what it does not tell has no row."""
    details = plan.get("details") or {}
    rows = (
        ("criterion", _criterion(plan["criterion"])),
        ("kept", _keep(details.get("keep"))),
        ("rule", _pairs(details.get("rule"))),
        ("counts of the layers", details.get("allocation")),
        ("a removed expert", MEANINGS[plan.get("removed") or REROUTE]),
        ("seed", details.get("seed")),
        *((f"calibration: {name.replace('_', ' ')}", _short(value)) for name, value in _data(details)),
        ("routed tokens that lose their expert", _share(details.get("rerouted_share"))),
        ("super-experts protected", _by_layer(details.get("super_experts"), "protected")),
        ("of these the criterion would have dropped", _by_layer(details.get("super_experts"), "rescued")),
        ("never routed to", _ids(details.get("never_routed"))),
        ("experts whose weights are all 0", _ids(details.get("zero_weights"))),
        ("statistics", plan.get("stats_digest") and f"sha256 {plan['stats_digest']}"),
    )
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _criterion(name: str) -> str:
    known = CRITERIA.get(name)
    if known is None:
        return name
    return f"{name}: {known.help} ({'arXiv ' if known.source[0].isdigit() else ''}{known.source})"


def _keep(keep: Any) -> str | None:
    if not isinstance(keep, Mapping):
        return None
    (kind, value), *_ = keep.items()
    words = {
        "share": f"{value} of the experts",
        "count": f"{value} experts a layer",
        "num_bytes": f"what fits in {value} bytes",
        "layers": f"experts of each layer: {_pairs(value)}",
    }
    return words.get(kind)


def _data(details: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data = details.get("data")
    return [(name, value) for name, value in data.items() if name not in LOCAL] if isinstance(data, Mapping) else []


def _share(value: Any) -> str | None:
    return f"{100 * value:.2f} %" if isinstance(value, float) else None


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


def _by_layer(found: Any, kind: str) -> str | None:
    return _ids(found.get(kind)) if isinstance(found, Mapping) else None


def _ids(found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return None
    if not found:
        return "none"
    return "; ".join(f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in found.items())
