"""The routers of a LoRA fine-tuning that PEFT saved apart from its model.

A router may have been trained as a low-rank change (lora_A, lora_B) or as a whole (`modules_to_save`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.json import read_object
from secateur.files.safetensors_header import read_header
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import INDEX, SINGLE

if TYPE_CHECKING:
    from secateur.model_folder.read.layout import Layout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B, WHOLE = "lora_A.weight", "lora_B.weight", "weight"
# What changes the meaning of the matrices; a plain LoRA has none of it.
VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias",
    "layer_replication",
)  # fmt: skip
# Ways to begin that leave the model as it was; others ("pissa", "olora", ...) change the weights beneath the adapter.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def holds_adapter(folder: Path) -> bool:
    """Whether it is the folder of an adapter; beside a whole model it is the model's."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter; scale: what the product of its matrices is multiplied with."""

    folder: Path
    scale: float
    names: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read its config and the names of its tensors.

        Raises:
            SecateurError: another kind of adapter, a damaged one, or one in a pickled file.
        """
        config = read_object(folder / CONFIG)
        if config.get("peft_type") != "LORA":
            raise SecateurError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r:.40}, expected 'LORA'")
        used = [name for name in VARIANTS if config.get(name)]
        if used:
            raise SecateurError(f"{folder / CONFIG}: {used[0]} is on; merge this adapter and give the merged model")
        start = config.get("init_lora_weights")
        if start not in PLAIN_STARTS:
            raise SecateurError(
                f"{folder / CONFIG}: init_lora_weights is {start!r:.40}, which changes the model beneath the adapter; "
                "merge this adapter and give the merged model"
            )
        if not (folder / WEIGHTS).is_file():
            raise SecateurError(f"{folder}: expected {WEIGHTS}; adapters in pickled files are never opened")
        header = read_header(folder / WEIGHTS)
        return cls(folder=folder, scale=_scale(folder, config), names=frozenset(header.entries))

    def router_rows(
        self, folder: ModelFolder, before: Mapping[int, Mapping[str, Tensor]]
    ) -> dict[int, dict[str, Tensor]]:
        """The rows of all routers after fine-tuning, in the form of `before`, those of the model it was made for.

        Raises:
            SecateurError: a tensor of a router that is not understood, or that does not fit the model.
        """
        tensors = safetensors.torch.load_file(self.folder / WEIGHTS)
        modules = _router_modules(folder)
        after: dict[int, dict[str, Tensor]] = {}
        used: set[str] = set()
        for layer, rows in before.items():
            after[layer] = dict(rows)
            stems = {name: modules[layer][name] for name in rows if name in modules[layer]}
            for name, stem in stems.items():
                mine = {  # a number for each expert, such as a bias, says nothing of rows
                    key: key.rpartition(f"{stem}.")[2]
                    for key in self.names
                    if f"{stem}." in key and tensors[key].dim() > 1
                }
                used |= mine.keys()
                if mine:
                    parts = {end: tensors[key] for key, end in mine.items()}
                    after[layer][name] = self._changed(f"layer {layer}, {name}", rows[name], parts)
        if not used:
            raise SecateurError(
                f"{self.folder}: the adapter has no tensor of a router, so fine-tuning says nothing of the experts; "
                "expected one that trains the routers (target_parameters or modules_to_save)"
            )
        return after

    def _changed(self, name: str, rows: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        if parts.keys() == {WHOLE}:
            return _shaped(name, parts[WHOLE], rows)
        if parts.keys() != {LORA_A, LORA_B}:
            raise SecateurError(f"{name}: the adapter has {sorted(parts)}, expected {LORA_A} and {LORA_B}, or {WHOLE}")
        first, second = parts[LORA_A].shape, parts[LORA_B].shape
        if len(first) != 2 or len(second) != 2 or (second[0], first[1]) != rows.shape or second[1] != first[0]:
            raise SecateurError(
                f"{self.folder / WEIGHTS}: {name}: {LORA_A} is {tuple(first)} and {LORA_B} {tuple(second)}, expected "
                f"a product of {tuple(rows.shape)}"
            )
        change = parts[LORA_B].double() @ parts[LORA_A].double()
        return rows.double() + self.scale * _shaped(name, change, rows)


def _shaped(name: str, value: Tensor, rows: Tensor) -> Tensor:
    if value.shape != rows.shape:
        raise SecateurError(f"{name}: {tuple(value.shape)} in the adapter, {tuple(rows.shape)} in the model")
    return value


def _scale(folder: Path, config: Mapping[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise SecateurError(f"{folder / CONFIG}: r is {rank!r:.20} and lora_alpha {alpha!r:.20}, expected numbers")
    if not math.isfinite(alpha):
        raise SecateurError(f"{folder / CONFIG}: lora_alpha is {alpha}, expected a finite number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _router_modules(folder: ModelFolder) -> dict[int, dict[str, str]]:
    """{layer: {router tensor by its name in the files: path of its module in the live model, from the layer on}}.

    Adapters have the names of the live model; where files have others, the two lists of names agree in their order.
    """
    live = folder.config.layouts[-1]
    here, there = _router_keys(folder.layout), _router_keys(live)
    if len(here) != len(there):
        raise SecateurError(f"routers are {here} in the files and {there} in the model; expected as many")
    stems = {old: new.rpartition(".")[0] for old, new in zip(here, there, strict=True)}
    (container, *_) = sorted(live.containers)
    return {layer: {key: f".{container}.{layer}.{stem}" for key, stem in stems.items()} for layer in folder.counts}


def _router_keys(layout: Layout) -> list[str]:
    return sorted(key for key, found in layout.stacked.items() if found.role == "router" and key.endswith(".weight"))
