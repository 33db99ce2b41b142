"""Model folders on the disk for tests: tiny models of every family, saved in several files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from secateur.plans import LayerPlan, Plan
from support.tiny_models import tiny_config, tiny_model

logging.disable_progress_bar()

INDEX = "model.safetensors.index.json"


def saved(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A tiny model of a row of FAMILIES, and its folder with about eight files."""
    model = tiny_model(name)
    model.eval().save_pretrained(folder, **{"max_shard_size": "60KB", **options})
    return model


def loaded(folder: Path) -> PreTrainedModel:
    """The model of a folder, which must have every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    with torch.no_grad():
        for tensor in model.parameters():  # they lie anywhere in a mapped file, and matrix products round by alignment
            tensor.data = tensor.data.clone()
    return model


def run_card(folder: Path) -> PreTrainedModel:
    """What the lines in the card of a folder load."""
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"folder": folder}
    exec(lines, names)
    model: PreTrainedModel = names["model"]
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """What config.json says of a row of FAMILIES."""
    config = tiny_config(name)
    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields | {"architectures": [architecture]} | changes


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_files: int = 2) -> Path:
    """A folder of these tensors, made without transformers."""
    folder.mkdir(parents=True)
    names = list(tensors)
    listed: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        mine = names[number::num_files]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": listed}))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def plan_of(*layers: tuple[int, list[int]], experts: int = 8) -> Plan:
    """(layer, order) of every layer that changes."""
    chosen = {layer: LayerPlan(experts_before=experts, order=tuple(order)) for layer, order in layers}
    return Plan(layers=chosen, criterion="test")


def gathered(tensors: Mapping[str, Tensor], plan: Plan, experts: str, rows: tuple[str, ...]) -> dict[str, Tensor]:
    """What a plan makes of tensors, by names and index_select: another way than Secateur's.

    experts: pattern of a name up to an expert's number, its first group the layer. rows: endings of names of tensors
    with all experts on axis 0.
    """
    result = {}
    for name, value in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        one = plan.layers.get(int(layer[1])) if layer else None
        match = re.match(experts + r"(\d+)\.", name)
        if one is not None and match:
            if int(match[2]) in one.order:
                result[f"{name[: match.start(2)]}{one.order.index(int(match[2]))}{name[match.end(2) :]}"] = value
        elif one is not None and name.endswith(rows):
            result[name] = value[list(one.order)]
        else:
            result[name] = value
    return result


def same_bytes(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types, shapes and bytes."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype
        and value.shape == right[name].shape
        and torch.equal(value.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name, value in left.items()
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """An undo.json as who means to change it writes it, with the digest of what is in it now."""
    text = json.dumps({key: value for key, value in record.items() if key != "seal"}, sort_keys=True)
    return record | {"seal": hashlib.sha256(text.encode()).hexdigest()}
