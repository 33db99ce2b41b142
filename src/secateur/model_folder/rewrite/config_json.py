"""The config.json of a pruned folder: the source's own, edited in place."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import QUANTISATION
from secateur.model_folder.rewrite.zero_slots import kept_slots
from secateur.plans import Plan
from secateur.surgery.config_json import is_pruned, with_counts, with_zero_slots

# Where configs say how many layers predict further tokens.
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
DOT = r"\\*\."  # in JSON of names that are regular expressions a dot may come behind backslashes


def edited_config(folder: ModelFolder, plan: Plan, mtp: str | None) -> dict[str, Any]:
    """config.json with the counts that the plan, which lists every layer, leaves; only what must change does.

    Raises:
        SecateurError: the layers end up with different counts in a model that cannot have that, a quantised layer is
            named with an expert's number, or multi-token-prediction layers would not have the count that config.json
            gives and nobody said what should become of them.
    """
    config: dict[str, Any] = copy.deepcopy(dict(folder.files.config))
    _check_no_numbers(config, folder)
    if plan.leaves_zero_slots:
        if kept := kept_slots(folder, plan):
            config = with_zero_slots(_without_own_code(config), folder.slots, kept, folder.config.num_layers)
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
        config = _without_own_code(config)
    return with_counts(config, folder.counts, main, folder.config.num_layers)


def _without_own_code(config: dict[str, Any]) -> dict[str, Any]:
    """Without code that a source names, which builds one count and no zero slots; the class is transformers' own."""
    return {key: value for key, value in config.items() if key != "auto_map" or is_pruned(config)}


def _check_mtp(folder: ModelFolder, after: Mapping[int, int], count: int, mtp: str | None) -> None:
    for layer in folder.mtp_counts if mtp is None else ():
        if after[layer] != count:
            raise SecateurError(
                f"layer {layer} predicts further tokens (MTP) and would keep {after[layer]} experts, but config.json "
                f"would say {count}: name it in the plan, or say what becomes of it with --mtp whole or --mtp drop"
            )


def _check_no_numbers(config: Mapping[str, Any], folder: ModelFolder) -> None:
    text = json.dumps([config.get(key) for key in QUANTISATION])
    for before in folder.layout.own:
        if found := re.search(DOT.join([*map(re.escape, before.split(".")), r"[0-9]+[^\"]*"]), text):
            raise SecateurError(
                f"config.json: its quantization_config names single experts ({found[0]:.80}), whose numbers change; "
                "no rule for that exists"
            )
