"""What a plan needs to know of a model folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from secateur.decide.model_facts import ModelFacts
from secateur.model_folder.read.inspect import bytes_per_expert
from secateur.model_folder.read.model_folder import ModelFolder


def model_facts(source: ModelFolder, *, with_mtp: bool = False) -> ModelFacts:
    """Of the decoder layers, and `with_mtp` of the multi-token-prediction layers, which are else left to `apply`."""
    folder, model = source.files, source.config
    per_expert = bytes_per_expert(source)
    counts = source.all_counts if with_mtp else dict(source.counts)
    return ModelFacts(
        model_type=model.model_type,
        digest=_digest(source),
        top_k=model.top_k,
        num_groups=model.num_groups,
        min_experts=model.min_experts,
        total_bytes=folder.num_bytes,
        has_one_count=model.is_nested,
        num_experts=counts,
        bytes_per_expert={layer: per_expert[layer] for layer in counts},
    )


def facts_for_zero_slots(known: ModelFacts, folder: ModelFolder | None) -> ModelFacts:
    """The facts for plans that leave the routers as they are: these limit nothing, and no row of them goes.

    Args:
        found: the folder of the model, if it is at hand; without it the bytes of an expert include its row.
    """
    sizes = known.bytes_per_expert
    if folder is not None:
        alone = bytes_per_expert(folder, zero_slots=True)
        sizes = {layer: alone[layer] for layer in folder.counts}
    return dataclasses.replace(known, num_groups=1, min_experts=1, has_one_count=False, bytes_per_expert=sizes)


def _digest(folder: ModelFolder) -> str:
    """Of what a plan is about. A fine-tuned or quantised variant of a model has the same: its routers do."""
    routers = sorted(
        [place.layer, list(folder.files.tensors[name].shape)]
        for name, place in folder.located.items()
        if place.role == "router" and place.layer in folder.counts
    )
    model = folder.config
    described = [model.text.model_type, model.top_k, model.num_groups, sorted(folder.counts.items()), routers]
    described += [sorted(model.kept.items())] if model.kept else []
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
