"""Small JSON files beside the weights that say something of the experts: what they say of the kept ones."""

from __future__ import annotations

import json

from secateur.errors import SecateurError
from secateur.files.json import parse_json
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.rewrite.expert_names import ExpertNames, renamed
from secateur.plans import Plan
from secateur.surgery.config_json import has_expert_count


def quantisation_file(folder: ModelFolder, plan: Plan, name: str, content: bytes) -> bytes:
    """A file that says how the weights are quantised, such as ModelOpt's hf_quant_config.json.

    Raises:
        SecateurError: no JSON, or it names single experts in a way that no rule knows.
    """
    where = f"{folder.files.path / name}"
    value = parse_json(content, where)
    changed = renamed(value, ExpertNames(folder, plan), where)
    return content if changed == value else _text(changed)


def authors_params(folder: ModelFolder, plan: Plan, name: str, content: bytes) -> bytes | None:
    """params.json, the config of a model in the form of its authors; None where it cannot say what is left.

    It has one count for all layers, and no zero slots.
    """
    try:
        value = parse_json(content, name)
    except SecateurError:
        return None
    said = value.get("moe") if isinstance(value, dict) else None
    if said is None:
        return content
    counts = {plan.layers[layer].experts_after for layer in folder.counts}
    fits = isinstance(said, dict) and said.get("num_experts") == max(folder.counts.values())
    if not fits or len(counts) > 1 or plan.leaves_zero_slots:
        return None
    said["num_experts"] = counts.pop()
    return _text(value)


def other_config(folder: ModelFolder, plan: Plan, name: str, content: bytes) -> bytes | None:
    """A config in a folder inside, for code of the authors'; None where it says how many experts there are."""
    try:
        value = parse_json(content, name)
    except SecateurError:
        return content
    said = isinstance(value, dict) and has_expert_count({"model_type": "", **value})
    return None if said else content


def _text(value: object) -> bytes:
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()
