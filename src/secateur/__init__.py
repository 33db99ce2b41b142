"""Secateur prunes the experts of Mixture-of-Experts models: while they pre-train, after fine-tuning, as checkpoints.

Importing this package loads neither torch nor transformers. Once transformers' auto classes are loaded, before or
after, they know the model type of pruned models, so `AutoModelForCausalLM.from_pretrained(folder)` needs no flag.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur import auto_classes
from secateur.errors import SecateurError
from secateur.version import __version__ as __version__

if TYPE_CHECKING:
    from secateur.decide.rule import Rule
    from secateur.finetuning.finetune import finetune
    from secateur.folder_kinds.apply import apply
    from secateur.folder_kinds.verify import verify
    from secateur.model_folder.evaluation.evaluate import evaluate
    from secateur.model_folder.measure.observe import observe
    from secateur.model_folder.plan import plan
    from secateur.model_folder.prune import prune
    from secateur.model_folder.read.inspect import inspect
    from secateur.models.vmoe.convert import convert_vmoe
    from secateur.placement.every_layer import place
    from secateur.plans import Plan
    from secateur.pretraining.pretrain import pretrain
    from secateur.replay.phases import phases
    from secateur.reporting.write import report
    from secateur.stats import RouterStats
    from secateur.surgery.events import PruneEvent
    from secateur.surgery.zero_slots import remove_into_zero_slots_
    from secateur.train.callback import LAEPCallback
    from secateur.train.laep import LAEP
    from secateur.train.load_callback import LoadCallback
    from secateur.train.phases import PhaseConstants
    from secateur.train.schedule import Pruning
    from secateur.upcycling.upcycle import upcycle

__all__ = [
    "LAEP",
    "LAEPCallback",
    "LoadCallback",
    "PhaseConstants",
    "Plan",
    "PruneEvent",
    "Pruning",
    "RouterStats",
    "Rule",
    "SecateurError",
    "apply",
    "convert_vmoe",
    "evaluate",
    "finetune",
    "inspect",
    "observe",
    "phases",
    "place",
    "plan",
    "pretrain",
    "prune",
    "remove_into_zero_slots_",
    "report",
    "upcycle",
    "verify",
]

# public name -> module that defines it, imported at first use
_HOMES = {
    "LAEP": "secateur.train.laep",
    "LAEPCallback": "secateur.train.callback",
    "LoadCallback": "secateur.train.load_callback",
    "PhaseConstants": "secateur.train.phases",
    "Plan": "secateur.plans",
    "PruneEvent": "secateur.surgery.events",
    "Pruning": "secateur.train.schedule",
    "RouterStats": "secateur.stats",
    "Rule": "secateur.decide.rule",
    "apply": "secateur.folder_kinds.apply",
    "convert_vmoe": "secateur.models.vmoe.convert",
    "evaluate": "secateur.model_folder.evaluation.evaluate",
    "finetune": "secateur.finetuning.finetune",
    "inspect": "secateur.model_folder.read.inspect",
    "observe": "secateur.model_folder.measure.observe",
    "phases": "secateur.replay.phases",
    "place": "secateur.placement.every_layer",
    "plan": "secateur.model_folder.plan",
    "pretrain": "secateur.pretraining.pretrain",
    "prune": "secateur.model_folder.prune",
    "remove_into_zero_slots_": "secateur.surgery.zero_slots",
    "report": "secateur.reporting.write",
    "upcycle": "secateur.upcycling.upcycle",
    "verify": "secateur.folder_kinds.verify",
}

auto_classes.when_auto_classes_load()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        hint = "; the command eval is the function evaluate" if name == "eval" else ""
        raise AttributeError(f"module 'secateur' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
