"""A placement as SGLang takes it."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import SecateurError
from secateur.placement.one_layer import Placement


def sglang_location(placements: Mapping[int, Placement], num_layers: int | None) -> dict[str, list[list[int]]]:
    """SGLang's `--init-expert-location`: one row for each layer of the model, physical -> logical expert.

    The rows are one table, found by layer id. So all layers need the same number of experts, and layers without
    experts need a row too: ascending ids.

    Raises:
        SecateurError: layers with different numbers of experts, or layer ids that are missing or too high.
    """
    counts = {len(placement.order) for placement in placements.values()}
    if len(counts) > 1:
        raise SecateurError(f"layers have {sorted(counts)} experts, but SGLang's table has one width for all layers")
    missing = sorted(set(range(max(placements) + 1)) - set(placements))
    if num_layers is None and missing:
        raise SecateurError(
            f"there are no loads for layers {missing}, but SGLang's table has a row for every layer of the model; "
            "give --num-layers if these have no experts"
        )
    if num_layers is not None and max(placements) >= num_layers:
        raise SecateurError(f"there are loads for layer {max(placements)}, but --num-layers is {num_layers}")
    ascending = range(counts.pop())
    rows = range(len(placements) if num_layers is None else num_layers)
    table = [list(placements[row].order if row in placements else ascending) for row in rows]
    return {"physical_to_logical_map": table}
