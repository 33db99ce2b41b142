"""What a config.json says of a model's experts, checked; and the layouts that files of such a model may have."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.errors import SecateurError
from secateur.families import router_needs, top_k_in
from secateur.model_folder.read.layout import Layout, find_layouts
from secateur.modeling_secateur import (
    PREFIX,
    TOP_K_KEYS,
    class_named,
    counts_in,
    expert_count_key,
    kept_in,
    probe_counts,
    with_expert_count,
)
from secateur.surgery.config_json import has_expert_count, is_pruned, with_one_count

_TWO_SETS = "every layer holds two sets of experts, for text and for images, and a plan names one"
_DIFFUSION = "it is a diffusion model whose encoder and decoder share their experts, and no rule for that exists yet"

# Why no plan can be applied to files of a model type; a table in docs/prune.md says the same.
REFUSED = {
    "deepseek_v4": "some of its layers route every token by a table of expert ids (tid2eid), and no rule says where "
    "the tokens of a dropped expert go",
    "diffusion_gemma": _DIFFUSION,
    "diffusion_gemma_text": _DIFFUSION,
    "doge": "its experts are single neurons that pairs of keys address, so no row of a router belongs to one of them",
    "ernie4_5_vl_moe": _TWO_SETS,
    "ernie4_5_vl_moe_text": _TWO_SETS,
    "jetmoe": "its attention holds a second, separate set of experts with the same count, which no plan names",
    "longcat_flash": "its zero experts share the router with the real ones, and transformers reads weights for them "
    "that they do not use, so files number them among the real ones",
    "qwen3_omni_moe": "its thinker and its talker hold experts each, and a plan is about one of the two; the thinker "
    "in a folder of its own (qwen3_omni_moe_thinker) can be pruned",
    "vitpose_backbone": "each of its experts belongs to a data set, and no router chooses among them",
    "zaya": "its router has a skip class beside the experts, which it knows by the one count in config.json, and no "
    "rule for it exists yet",
}
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model by its config.

    read_as: how its class was found where config.json does not name it as transformers does; in words, "" otherwise.
    is_as_written: whether transformers reads the config from the folder itself; if not, it has to be given `config`.
    model_class, config: native. text: the config that holds the experts, `config` itself unless that has several.
    count: experts of a layer by the config; slots: of every layer's router, where the config lists them. kept: of
    layers with zero slots those whose experts are there; then the routers stay as they are, and limit nothing.
    """

    model_type: str
    read_as: str
    is_as_written: bool
    model_class: Any
    config: PreTrainedConfig
    text: PreTrainedConfig
    count: int
    slots: Mapping[int, int] | None
    kept: Mapping[int, tuple[int, ...]]
    top_k: int
    num_groups: int
    min_experts: int
    layouts: tuple[Layout, ...]

    @property
    def num_layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def is_pruned(self) -> bool:
        """Whether the files are of a `Pruned...` class, made from `model_class`."""
        return self.slots is not None

    @property
    def is_nested(self) -> bool:
        return self.text is not self.config


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        SecateurError: a family in REFUSED or unknown to this transformers release, a config without an expert count or
            top-k, or one that transformers does not accept.
    """
    try:
        native = with_one_count(_as_native(config))
    except (TypeError, RecursionError) as error:
        raise SecateurError(f"config.json: {error}") from error
    model_type = native.get("model_type")
    if not isinstance(model_type, str):
        raise SecateurError(f"config.json: model_type is {model_type!r:.60}, expected a name")
    _refuse(model_type)
    if not has_expert_count(config):
        raise SecateurError("config.json: it has no count of routed experts")
    _check_layers(config)
    try:
        return _read(model_type, config, native)
    except SecateurError as error:
        raise SecateurError(f"config.json, model type {model_type!r}: {error}") from error
    except Exception as error:  # transformers has no error of its own for a config it cannot use
        message = f"{type(error).__name__}: {error}"
        raise SecateurError(f"config.json: transformers cannot build this {model_type!r} ({message:.300})") from error


def _read(model_type: str, raw: Mapping[str, Any], native: dict[str, Any]) -> ModelConfig:
    model_class = _model_class(native, has_code="auto_map" in raw)
    read_as = _read_as(model_type, native, model_class)
    if model_type not in CONFIG_MAPPING:  # names of tensors are looked up by the model type
        native["model_type"] = model_class.config_class.model_type
    config_class: Any = CONFIG_MAPPING.get(model_type, model_class.config_class)
    config = config_class.from_dict(native)
    text = config.get_text_config()
    for one in (config, text):
        if one.dtype is not None and not isinstance(one.dtype, torch.dtype):
            raise SecateurError(f"dtype is {one.dtype!r:.60}, expected the name of a type of torch's")
    if not isinstance(config, model_class.config_class):
        config = text
    _refuse(text.model_type)
    if config.is_encoder_decoder:
        raise SecateurError("this family is not supported: it is an encoder-decoder model, and both hold experts")
    top_k = _top_k(text)
    pruned = is_pruned(raw)
    kept = kept_in(config) if pruned else {}
    num_groups, min_experts = (1, 1) if kept else router_needs(text, top_k)
    return ModelConfig(
        model_type=model_type,
        read_as=read_as,
        is_as_written=native == _as_native(raw),
        model_class=model_class,
        config=config,
        text=text,
        count=functools.reduce(getattr, expert_count_key(text).split("."), text),
        slots=counts_in(config) if pruned else None,
        kept=kept,
        top_k=top_k,
        num_groups=num_groups,
        min_experts=min_experts,
        layouts=_layouts(model_class, config, top_k),
    )


def of_own_class(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A copy of a config.json with the names of the class that reads it, and without code of the source's.

    A `Pruned...` class is made of transformers' own class; code of another builds one count for all layers.
    """
    if is_pruned(config):
        return dict(config)
    names = {"model_type": model.config.model_type, "architectures": [model.model_class.__name__]}
    return {key: names.get(key, value) for key, value in config.items() if key != "auto_map"}


def _as_native(config: Mapping[str, Any]) -> dict[str, Any]:
    """The native config of a pruned one; another as it is. Without what would only be read for its own sake."""
    native = {key: floats(value) for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    if is_pruned(config):
        native["model_type"] = native.pop("base_model_type", None)
        native["architectures"] = [str(name).removeprefix(PREFIX) for name in native.get("architectures") or []]
    return native


def _check_layers(config: Mapping[str, Any]) -> None:
    """Before anything is built: a damaged number would fill the memory."""
    for place in (config, config.get("text_config")):
        for key in LAYER_KEYS:
            value = place.get(key) if isinstance(place, dict) else None
            if value is not None and (type(value) is not int or not 0 < value <= MAX_LAYERS):
                raise SecateurError(f"config.json: {key} is {value!r:.40}, expected 1 to {MAX_LAYERS}")


def floats(value: Any) -> Any:
    """What transformers writes as {"__float__": "Infinity"}, as it reads it."""
    if isinstance(value, dict):
        is_float = value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN")
        return float(value["__float__"]) if is_float else {key: floats(entry) for key, entry in value.items()}
    return [floats(entry) for entry in value] if isinstance(value, list) else value


def _model_class(native: Mapping[str, Any], *, has_code: bool) -> Any:
    names = native.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise SecateurError(f"architectures is {names!r:.100}, expected one class")
    found = class_named(names[0])
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or found is PreTrainedModel:
        also = "" if native["model_type"] in CONFIG_MAPPING else ", which does not know the model type either"
        code = "; code that lies beside a model is never run" if has_code else ""
        version = transformers.__version__
        raise SecateurError(f"{names[0]!r:.100} is no model class of transformers {version}{also}{code}")
    return found


def _read_as(model_type: str, native: Mapping[str, Any], model_class: Any) -> str:
    """How a class was found that is not the one which both names in config.json are of."""
    (named,) = native["architectures"]
    name = model_class.__name__
    if model_type not in CONFIG_MAPPING:
        return f"transformers does not know the model type {model_type!r}; read by its architecture, {name}"
    return "" if named == name else f"transformers calls the class {named!r} {name}"


def _refuse(model_type: str) -> None:
    if reason := REFUSED.get(model_type):
        raise SecateurError(f"model type {model_type!r} is not supported: {reason}")


def _top_k(text: PreTrainedConfig) -> int:
    """Experts a token; the most of any layer where the config has a list."""
    if (found := top_k_in(text)) is not None and found > 0:
        return found
    raise SecateurError(
        "this family is not supported: its config does not say how many experts a token goes to (looked for "
        f"{', '.join(TOP_K_KEYS)})"
    )


def _layouts(model_class: Any, config: PreTrainedConfig, top_k: int) -> tuple[Layout, ...]:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for key in TOP_K_KEYS:
        if isinstance(getattr(text, key, None), list):
            setattr(text, key, top_k)  # a list for each layer has no part in where the experts lie
    counts = probe_counts(text)
    return find_layouts(model_class, with_expert_count(small, counts[0]), with_expert_count(small, counts[1]), counts)
