"""Edit a transformers `config.json` for new expert counts, in place: only what must change does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.errors import SecateurError
from secateur.files.limits import MAX_LAYER, SHOWN
from secateur.modeling_secateur import (
    COUNT_KEYS,
    MODEL_TYPE,
    PREFIX,
    auto_class,
    auto_map_of,
    class_named,
    most,
)

MODULE = "modeling_secateur"


def is_pruned(config: Mapping[str, Any]) -> bool:
    """True for the config of a `Pruned...` class, whose layers differ or have zero slots."""
    return config.get("model_type") == MODEL_TYPE


def has_expert_count(config: Mapping[str, Any]) -> bool:
    """True for a transformers config with a routed-expert count."""
    return isinstance(config.get("model_type"), str) and bool(_count_places(config))


def with_one_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` that says the routed-expert count as one number, where it lists one for each layer.

    Raises:
        SecateurError: it says several numbers; the message names them and where they are.
    """
    changed = copy.deepcopy(dict(config))
    said: dict[int, str] = {}
    for place, key in _count_places(changed):
        for count in place[key] if isinstance(place[key], list) else [place[key]]:
            said.setdefault(count, key)
        place[key] = most(place[key])
    if len(said) > 1:
        listed = " and ".join(f"{count} ({key})" for count, key in said.items())
        raise SecateurError(f"config.json: it says {listed} for the number of routed experts, expected one number")
    return changed


def loading_lines(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The lines of Python that load a folder with this config.json, which is called `folder` in them."""
    (architecture,) = config["architectures"]
    pruned = is_pruned(config)
    native: Any = class_named(architecture.removeprefix(PREFIX)) if pruned else class_named(architecture)
    loader = _named_for(architecture, config) if pruned else getattr(auto_class(native), "__name__", architecture)
    ours = native.__module__.partition(".")[0] == __name__.partition(".")[0]
    own_code = (pruned and not ours) or (config["model_type"] not in CONFIG_MAPPING and "auto_map" in config)
    flag = ", trust_remote_code=True" if own_code else ""
    return (
        *(["import secateur  # tells transformers of this model class"] if ours else []),
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained(folder{flag})",
    )


def _named_for(architecture: str, config: Mapping[str, Any]) -> str:
    """The auto class that a pruned config names for its own architecture."""
    told = config.get("auto_map")
    for auto, made in told.items() if isinstance(told, dict) else ():
        if made == f"{MODULE}.{architecture}":
            return str(auto)
    raise SecateurError(f"config.json: auto_map is {told!r:.100}, expected an auto class for {MODULE}.{architecture}")


def with_counts(
    config: Mapping[str, Any],
    before: Mapping[int, int],
    after: Mapping[int, int],
    num_layers: int | None = None,
) -> dict[str, Any]:
    """A copy of `config` for the counts `after`; `before` and `after` map every MoE layer to its experts.

    num_layers: decoder layers of the model, where the config does not say it as num_hidden_layers.

    Layers with one count keep the native class. Where they differ the config becomes that of the `Pruned...` class,
    whose code must then lie beside it as modeling_secateur.py.

    Raises:
        SecateurError: the config does not say `before`, or lacks what the `Pruned...` class needs.
    """
    changed = copy.deepcopy(dict(config))
    largest, now = max(before.values()), max(after.values())
    pruned = is_pruned(changed)
    for place, key in _count_places(changed):
        if most(place[key]) != largest:
            raise SecateurError(
                f"config.json: {key} is {place[key]}, but the checkpoint holds {largest} experts a layer"
            )
        is_list = isinstance(place[key], list) and len(set(after.values())) == 1  # a `Pruned...` class reads a number
        place[key] = [now] * len(place[key]) if is_list else now
    if not pruned and len(set(before.values())) > 1:
        raise SecateurError(f"config.json: it has one count for all layers, but the checkpoint holds {dict(before)}")
    num_layers = changed.get("num_hidden_layers") if num_layers is None else num_layers
    if pruned and moe_config(before, num_layers) != changed.get("moe_config"):
        raise SecateurError(f"config.json: {changed.get('moe_config')}, but the checkpoint holds {dict(before)}")
    if len(set(after.values())) > 1:
        return _as_pruned(changed, moe_config(after, num_layers))
    return _as_native(changed) if pruned else changed


def with_zero_slots(
    config: Mapping[str, Any], slots: Mapping[int, int], kept: Mapping[int, Sequence[int]], num_layers: int
) -> dict[str, Any]:
    """A copy of `config` whose routers keep all slots, and whose layers in `kept` hold the experts of these slots only.

    Raises:
        SecateurError: the config lacks what the `Pruned...` class needs.
    """
    return _as_pruned(copy.deepcopy(dict(config)), moe_config(slots, num_layers, kept))


def moe_config(
    slots: Mapping[int, int], num_layers: Any, kept: Mapping[int, Sequence[int]] | None = None
) -> dict[str, Any]:
    """What the config of a `Pruned...` class says of its layers, see `modeling_secateur`.

    Raises:
        SecateurError: `num_layers` is no number of decoder layers that holds the layers with experts.
    """
    if type(num_layers) is not int or not 0 <= max(slots) < num_layers <= MAX_LAYER + 1:
        raise SecateurError(
            f"config.json: num_hidden_layers is {num_layers!r:.{SHOWN}}, expected {max(slots) + 1} to {MAX_LAYER + 1}, "
            f"as layer {max(slots)} has experts"
        )
    blocks = {"per_layer_experts_blocks": [slots.get(layer, 0) for layer in range(num_layers)]}
    return blocks | ({"kept_experts": {str(layer): list(kept[layer]) for layer in sorted(kept)}} if kept else {})


def _as_pruned(config: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    config["moe_config"] = layers
    if not is_pruned(config):
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1 or "auto_map" in config:
            raise SecateurError(
                f"config.json: architectures is {architectures!r} and auto_map {config.get('auto_map')!r}; layers that "
                "differ need one architecture of transformers' own"
            )
        native = _model_class(architectures[0])
        name = PREFIX + architectures[0]
        config_class = f"{MODULE}.{_config_class(config['model_type'])}"
        config["base_model_type"], config["model_type"] = config["model_type"], MODEL_TYPE
        config["architectures"] = [name]
        config["auto_map"] = {"AutoConfig": config_class} | auto_map_of(native)
    return config


def _model_class(name: object) -> Any:
    found = class_named(name) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or found is PreTrainedModel:
        raise SecateurError(f"config.json: architectures is [{name!r:.100}], which is no model class of transformers")
    return found


def _config_class(model_type: str) -> str:
    if model_type not in CONFIG_MAPPING:
        raise SecateurError(f"config.json: model_type {model_type!r} is none of this transformers release")
    native: Any = CONFIG_MAPPING[model_type]
    return f"{PREFIX}{native.__name__}"


def _as_native(config: dict[str, Any]) -> dict[str, Any]:
    base, names = config.pop("base_model_type", None), config.get("architectures")
    if not isinstance(base, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SecateurError(
            f"config.json: base_model_type is {base!r:.100} and architectures {names!r:.100}, expected what the class "
            "was made from, and a list of names"
        )
    config["model_type"] = base
    config["architectures"] = [name.removeprefix(PREFIX) for name in names]
    for key in ("moe_config", "auto_map"):
        config.pop(key, None)
    return config


def _count_places(config: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the routed-expert count stands: every alias of it, also in the config of the text model."""
    found = []
    for root in (config, config.get("text_config")):
        for dotted in COUNT_KEYS:
            *parents, key = dotted.split(".")
            place: Any = root
            for parent in parents:
                place = place.get(parent) if isinstance(place, dict) else None
            if isinstance(place, dict) and most(place.get(key)) is not None:
                found.append((place, key))
    return found
