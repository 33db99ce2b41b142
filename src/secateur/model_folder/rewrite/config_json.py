"""The config.json of a pruned folder: the source's own, edited in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.model_folder.read.config import of_own_class
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import CONFIG, quantisations
from secateur.model_folder.rewrite.expert_names import ExpertNames, renamed
from secateur.model_folder.rewrite.zero_slots import kept_slots
from secateur.plans import Plan
from secateur.surgery.config_json import with_counts, with_zero_slots

# Where configs say how many layers predict further tokens.
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def edited_config(folder: ModelFolder, plan: Plan, mtp: str | None) -> dict[str, Any]:
    """config.json with the counts that the plan, which lists every layer, leaves; only what must change does.

    Raises:
        SecateurError: the layers end up with different counts in a model that cannot have that, the quantisation names
            single experts in a way that no rule knows, or multi-token-prediction layers would not have the count that
            config.json gives and nobody said what should become of them.
    """
    config: dict[str, Any] = copy.deepcopy(dict(folder.files.config))
    if found := quantisations(config):
        names = ExpertNames(folder, plan)
        for place, key in found:
            place[key] = renamed(place[key], names, f"{folder.files.path / CONFIG}: {key}")
    if plan.leaves_zero_slots:
        if kept := kept_slots(folder, plan):
            config = with_zero_slots(of_own_class(config, folder.config), folder.slots, kept, folder.config.num_layers)
    else:
        config = _with_counts(config, folder, plan, mtp)
    if mtp == "drop":
        for place in (config, config.get("text_config")):
            for key in MTP_KEYS:
                if isinstance(place, dict) and type(place.get(key)) is int:
                    place[key] = 0
    return config


def _with_counts(config: dict[str, Any], folder: ModelFolder, plan: Plan, mtp: str | None) -> dict[str, Any]:
    after = {layer: plan.layers[layer].experts_after for layer in folder.all_counts}
    main = {layer: after[layer] for layer in folder.counts}
    _check_mtp(folder, after, max(main.values()), mtp)
    if len(set(main.values())) > 1:
        if folder.config.is_nested:
            raise SecateurError(
                f"config.json: the experts are in the text model inside a {folder.config.model_type!r}, which can only "
                f"have one count for all layers; the plan leaves {sorted(set(main.values()))}"
            )
        config = of_own_class(config, folder.config)
    return with_counts(config, folder.counts, main, folder.config.num_layers)


def _check_mtp(folder: ModelFolder, after: Mapping[int, int], count: int, mtp: str | None) -> None:
    for layer in folder.mtp_counts if mtp is None else ():
        if after[layer] != count:
            raise SecateurError(
                f"layer {layer} predicts further tokens (MTP) and would keep {after[layer]} experts, but config.json "
                f"would say {count}: name it in the plan, or say what becomes of it with --mtp whole or --mtp drop"
            )
