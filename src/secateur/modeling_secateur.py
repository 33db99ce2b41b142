"""Mixture-of-Experts models whose layers hold different numbers of experts, or fewer than their routers choose among.

This file needs torch and transformers and nothing else. `save_pretrained` copies it beside the weights, so such a
checkpoint loads in stock transformers with `trust_remote_code=True`; where `secateur` is imported, the same classes
are registered with the auto classes and the flag is not needed.

A pruned class is made from the native one by name: `PrunedQwen3MoeForCausalLM` is `transformers.Qwen3MoeForCausalLM`
built with the largest count of any layer, then cut, layer by layer, to the counts in
`config.moe_config["per_layer_experts_blocks"]` (one number a decoder layer, 0 where a layer has no experts).

That is what the router of a layer chooses among, its slots. A layer in `config.moe_config["kept_experts"]` has zero
slots: it holds the experts of these slots only, in this order; what the router sends to another slot is not computed
and contributes 0, and no other weight changes (arXiv 2405.16646, the authors' token-choice code).

Which tensors have an expert axis is not listed anywhere: the native class is built twice on the meta device, with two
expert counts, and what differs between the two is the answer. It holds for every family, and a layout that does not
follow the count linearly is an error, never a guess.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral import modeling_mixtral

MODEL_TYPE = "secateur_moe"
PREFIX = "Pruned"
LOSS = "load_balancing_loss_func"  # transformers' balance loss, of this name in every family that has it
COUNT_KEYS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "ffn_config.moe_num_experts",
)
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "ffn_config.moe_top_k")
# What `experts` modules are called with, each by one of these names: (T, D) tokens, (T, K) slots, (T, K) gates.
CALL = (
    ("hidden_states",),
    ("top_k_index", "router_indices", "selected_experts"),
    ("top_k_weights", "routing_weights"),
)


@dataclass(frozen=True, kw_only=True)
class LinearInCount:
    """A number that is `rows_per_expert * num_experts + num_trailing`: entries along axis `dim`, or an attribute."""

    dim: int = 0
    rows_per_expert: int
    num_trailing: int

    def size(self, num_experts: int) -> int:
        return num_experts * self.rows_per_expert + self.num_trailing


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """What in a model depends on its expert count.

    tensors: parameter or buffer name -> its expert axis. attributes: (module name, attribute) -> its value.
    """

    tensors: Mapping[str, LinearInCount]
    attributes: Mapping[tuple[str, str], LinearInCount]


def expert_count_key(config: PreTrainedConfig) -> str:
    """The config attribute, in dotted form, that holds the routed-expert count.

    Raises:
        ValueError: the config has none, or several that are not aliases of one another.
    """
    aliases = config.attribute_map
    found = {aliases.get(key, key) for key in COUNT_KEYS if isinstance(_get(config, key), int)}
    # What a class does not declare it does not read: some files say their count under a second name.
    found = {key for key in found if hasattr(type(config), key.partition(".")[0])} or found
    if len(found) != 1:
        raise ValueError(
            f"model type {config.model_type!r}: expected one config key with the number of routed experts "
            f"(known: {', '.join(COUNT_KEYS)}), found {sorted(found) or 'none'}"
        )
    return found.pop()


def with_expert_count(config: PreTrainedConfig, num_experts: int) -> PreTrainedConfig:
    """A copy of a native `config` that asks for `num_experts` routed experts in every MoE layer of its text model."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    *parents, key = expert_count_key(text).split(".")
    setattr(functools.reduce(getattr, parents, text), key, num_experts)
    return changed


def layer_of(name: str) -> int | None:
    """Decoder layer of a module, parameter or buffer name: its first numeric part; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_of_experts(name: str) -> bool:
    """Whether a module or tensor that follows the expert count belongs to `experts`; if not, to a router."""
    return "experts" in name.split(".")


def find_expert_layout(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, counts: tuple[int, int]
) -> ExpertLayout:
    """Compare two meta-device builds of `model_class` whose only difference is the expert count.

    Args:
        model_class: the native class. config: its native config. counts: two counts the family accepts.

    Raises:
        ValueError: something differs between the two builds in a way that is not linear in the count.
    """
    low, high = counts
    models = [_build_on_meta(model_class, with_expert_count(config, count)) for count in counts]
    tensors = {}
    for (name, small), (other, large) in zip(*map(_named_tensors, models), strict=True):
        dims = [dim for dim, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
        if name != other or len(dims) > 1:
            raise ValueError(
                f"{model_class.__name__}: {name} changes in axes {dims} with the expert count, expected one"
            )
        if dims:
            tensors[name] = _fit(name, low, high, small.shape[dims[0]], large.shape[dims[0]], dims[0])
    attributes = {}
    for (name, small), (_, large) in zip(*(model.named_modules() for model in models), strict=True):
        for key, value in vars(small).items():
            if isinstance(value, bool | int | float | str | list | tuple) and value != vars(large)[key]:
                if type(value) is not int:
                    raise ValueError(f"{model_class.__name__}: {name}.{key} ({value!r}) depends on the expert count")
                attributes[name, key] = _fit(f"{name}.{key}", low, high, value, vars(large)[key])
    return ExpertLayout(tensors=tensors, attributes=attributes)


def probe_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """Two small expert counts that routers of this config accept (top-k, router groups, ensemble members respected)."""
    groups = max(1, *(int(_get(config, key) or 1) for key in ("n_group", "num_expert_groups", "ensemble_size")))
    top_k = max(1, *(most(_get(config, key)) or 1 for key in TOP_K_KEYS))
    top_k *= int(_get(config, "ensemble_size") or 1)  # each member has experts of its own
    first = max(2 * groups, -(-top_k // groups) * groups)
    return first, first + groups


def most(value: Any) -> int | None:
    """A whole number of a config, or the largest of a list by layer; None for anything else."""
    values = value if isinstance(value, list) else [value]
    return max(values) if values and all(type(one) is int for one in values) else None


def counts_in(config: PreTrainedConfig) -> dict[int, int]:
    """{decoder layer: slots of its router} of a pruned config; layers without experts are left out.

    Raises:
        ValueError: `moe_config.per_layer_experts_blocks` is missing or is not one whole number a decoder layer.
    """
    blocks = (getattr(config, "moe_config", None) or {}).get("per_layer_experts_blocks")
    layers = config.get_text_config().num_hidden_layers
    if not isinstance(blocks, list) or len(blocks) != layers or any(type(n) is not int or n < 0 for n in blocks):
        raise ValueError(f"moe_config.per_layer_experts_blocks: expected {layers} whole numbers >= 0, found {blocks!r}")
    return {layer: count for layer, count in enumerate(blocks) if count}


def kept_in(config: PreTrainedConfig) -> dict[int, tuple[int, ...]]:
    """{decoder layer: the slots whose experts it holds, in their order} of a config, for layers with zero slots.

    Raises:
        ValueError: `moe_config.kept_experts` is not lists of different slots, each of a layer that has them.
    """
    listed = (getattr(config, "moe_config", None) or {}).get("kept_experts")
    if listed is None:
        return {}
    slots = {str(layer): count for layer, count in counts_in(config).items()}
    if not isinstance(listed, dict) or not listed.keys() <= slots.keys():
        raise ValueError(f"moe_config.kept_experts: expected some of the layers {', '.join(slots)}, found {listed!r}")
    for layer, ids in listed.items():
        whole = isinstance(ids, list) and all(type(slot) is int for slot in ids)
        if not whole or not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(slots[layer])):
            raise ValueError(
                f"moe_config.kept_experts: layer {layer} has {ids!r}, expected different slots from 0 to "
                f"{slots[layer] - 1}, at least one"
            )
    return {int(layer): tuple(ids) for layer, ids in listed.items()}


def count_for(name: str, slots: Mapping[int, int], kept: Mapping[int, Sequence[int]]) -> int | None:
    """By how many experts the size of a tensor, or a number of a module, goes; None in no layer of `slots`.

    Those of `experts` modules go by the experts that a layer holds, those of routers by its slots.
    """
    layer = layer_of(name)
    if layer is None or layer not in slots:
        return None
    return len(kept[layer]) if layer in kept and is_of_experts(name) else slots[layer]


def set_attributes_(
    model: nn.Module, layout: ExpertLayout, slots: Mapping[int, int], kept: Mapping[int, Sequence[int]]
) -> None:
    """Give every module of the layers in `slots` the attribute values of its own expert count, in place."""
    modules = dict(model.named_modules())
    for (name, key), value in layout.attributes.items():
        count = count_for(name, slots, kept)
        if count is not None:
            setattr(modules[name], key, value.size(count))


def cut_to_counts_(
    model: PreTrainedModel, layout: ExpertLayout, slots: Mapping[int, int], kept: Mapping[int, Sequence[int]]
) -> None:
    """Shorten every expert axis of a freshly built model to the counts of its layers, in place (first rows stay)."""
    for name, axis in layout.tensors.items():
        count = count_for(name, slots, kept)
        if count is None:
            raise ValueError(f"{name} has an expert axis but moe_config.per_layer_experts_blocks has no experts there")
        owner = model.get_submodule(name.rpartition(".")[0])
        tensor = getattr(owner, name.rpartition(".")[2])
        replace_tensor_(owner, name.rpartition(".")[2], tensor.detach().narrow(axis.dim, 0, axis.size(count)).clone())
    set_attributes_(model, layout, slots, kept)


def experts_modules(model: nn.Module, layout: ExpertLayout) -> dict[int, nn.Module]:
    """{decoder layer: its `experts` module}."""
    paths = [name.split(".") for name in layout.tensors if is_of_experts(name)]
    found = {".".join(path[: path.index("experts") + 1]) for path in paths}
    return {int(layer): model.get_submodule(path) for path in sorted(found) if (layer := layer_of(path)) is not None}


def skip_removed_(
    model: nn.Module, layout: ExpertLayout, slots: Mapping[int, int], kept: Mapping[int, Sequence[int]]
) -> None:
    """Let the `experts` modules of the layers in `kept` compute nothing for slots that are not listed, in place.

    Raises:
        ValueError: experts that are not called with tokens, slots and gates.
    """
    modules: dict[int, Any] = experts_modules(model, layout)
    for layer, ids in kept.items():
        experts = modules[layer]
        native: Any = getattr(experts, "native_class", type(experts))  # of one with zero slots already, or itself
        experts.__class__ = skipping_class(native)
        experts.kept_slots, experts.num_slots = tuple(ids), slots[layer]


@functools.cache
def skipping_class(native: Any) -> type[nn.Module]:
    """The class of `experts` modules that hold the experts of some slots only: `kept_slots` of `num_slots`.

    Legend: T tokens, K top-k, D model width, L live token-slots: those of T * K whose expert is there.

    Each live token-slot goes to the native forward as a token of its own with one slot and the gate 1; gates are
    applied here, and the K results of a token are added up, as transformers' grouped experts function does it. It is
    the function that all experts compute with gates of 0 for the others, at the cost of the live slots.
    """
    signature = inspect.signature(native.forward)
    _, *names = signature.parameters
    if len(names) != len(CALL) or any(name not in known for name, known in zip(names, CALL, strict=True)):
        raise ValueError(
            f"{native.__name__} is called with {names}, expected tokens, the slots that the router chose, and their "
            "gates: it cannot have zero slots"
        )

    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_states, index, gates = [*signature.bind(self, *args, **kwargs).arguments.values()][1:]
        if getattr(self, "_is_expert_parallel", False):
            raise ValueError(f"{type(self).__name__}: experts with zero slots cannot be split over ranks")
        number = torch.full((self.num_slots,), -1, device=index.device)  # of the expert at each slot
        number[list(self.kept_slots)] = torch.arange(len(self.kept_slots), device=index.device)
        expert = number[index].reshape(-1)
        live = (expert >= 0).nonzero().squeeze(1)  # (L,)
        if not len(live):
            return torch.zeros_like(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        # Some families give their result the type of the gates, which may be narrower than that of the tokens.
        wide = torch.promote_types(gates.dtype, hidden_states.dtype)
        ones = gates.new_ones(len(live), 1, dtype=wide)
        outputs = native.forward(self, tokens[live // index.shape[1]], expert[live, None], ones)
        weighted = outputs.reshape(len(live), -1) * gates.reshape(-1)[live, None]
        parts = weighted.new_zeros(len(expert), weighted.shape[1]).index_copy(0, live, weighted)
        total: torch.Tensor = parts.view(*index.shape, -1).sum(dim=1)
        return total.to(hidden_states.dtype).reshape(hidden_states.shape)

    members = {"forward": forward, "__module__": __name__, "native_class": native}
    return type(PREFIX + native.__name__, (native,), members)


def replace_tensor_(owner: nn.Module, key: str, value: torch.Tensor) -> None:
    """Put `value` in the place of a parameter (a Parameter itself, any other tensor as a new one) or of a buffer."""
    if key in owner._parameters:
        old = owner._parameters[key]
        assert old is not None
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
            value.__dict__.update(vars(old))
        owner._parameters[key] = value  # not wrapped again: an optimizer may hold this very object
    else:
        owner._buffers[key] = value


@functools.cache
def pruned_config_class(native: Any) -> type[PreTrainedConfig]:
    """The config class of pruned models of a native family, from its native config class."""
    name = PREFIX + native.__name__
    members = {"model_type": MODEL_TYPE, "_auto_class": "AutoConfig", "__module__": __name__, "native_class": native}
    return type(name, (native,), members)


@functools.cache
def pruned_model_class(native: Any) -> type[PreTrainedModel]:
    """The class of pruned models of a native class; registers its weight conversions, and it with its auto class."""
    config_class = pruned_config_class(native.config_class)
    name = PREFIX + native.__name__
    auto = auto_class(native) or AutoModelForCausalLM  # code beside a model can be loaded by any

    def build(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        slots, kept = counts_in(config), kept_in(config)
        text = config.get_text_config()
        largest = _get(text, expert_count_key(text))
        if largest != max(slots.values()):
            raise ValueError(f"config: {largest} experts, expected the largest of per_layer_experts_blocks {slots}")
        with _of_class(config, native.config_class):  # some classes build the model inside them by its config's class
            # Built with the largest count, a layer has rows to cut and none to invent.
            native.__init__(self, config, *args, **kwargs)
        layout = find_expert_layout(native, native_config(config), probe_counts(text))
        cut_to_counts_(self, layout, slots, kept)
        skip_removed_(self, layout, slots, kept)

    members: dict[str, Any] = {
        "__init__": build,
        "__module__": __name__,
        "config_class": config_class,
        "native_class": native,
        "_auto_class": auto.__name__,
    }
    # transformers answers these from the source file of the class, which would be this one; without, experts run slowly
    for question in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        members[question] = getattr(native, question)
    balance_loss_by_layer(native)
    if adds_balance_loss(native):
        members["forward"] = _forward_with_layerwise_loss(native)
    pruned = type(name, (native,), members)
    find: Callable[[str], Any] = get_checkpoint_conversion_mapping
    conversions = find(native.__name__) or find(native.config_class.model_type)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    auto.register(config_class, pruned, exist_ok=True)
    return pruned


@contextlib.contextmanager
def _of_class(config: PreTrainedConfig, config_class: Any) -> Iterator[None]:
    """While it lasts, a config is of its native class; the object stays the same, as modules of the model share it."""
    own = type(config)
    config.__class__ = config_class
    try:
        yield
    finally:
        config.__class__ = own


def auto_classes_of(native: Any) -> dict[str, Any]:
    """{auto class: the native class that it makes} for all that loads folders of the family of a native class.

    For one auto class that is `native` itself; for the others what transformers, or who told it, says of its config.
    """
    found = {(auto_class(native) or AutoModelForCausalLM).__name__: native}
    for auto in _auto_classes():
        made = auto._model_mapping.get(native.config_class, ())
        made = made if isinstance(made, tuple | list) else (made,)
        fits = [one for one in made if one is not None and one.config_class is native.config_class]
        if fits:
            found.setdefault(auto.__name__, native if native in fits else fits[0])
    return found


def auto_map_of(native: Any) -> dict[str, str]:
    """What the config.json of a pruned folder of a native class says under `auto_map` of model classes."""
    module = __name__.rpartition(".")[2]
    return {auto: f"{module}.{PREFIX}{made.__name__}" for auto, made in auto_classes_of(native).items()}


def register(native: Any) -> None:
    """Tell the auto classes of the pruned classes of a native class and its family."""
    config_class = pruned_config_class(native.config_class)
    for auto, made in auto_classes_of(native).items():
        getattr(modeling_auto, auto).register(config_class, pruned_model_class(made), exist_ok=True)


def class_named(name: str) -> Any:
    """The class of transformers that has this name, or one that its auto classes were told of; None without either.

    Names are also found in other letters: a PhiMoEForCausalLM is transformers' PhimoeForCausalLM.
    """
    told = [*_content(CONFIG_MAPPING), *(one for auto in _auto_classes() for one in _content(auto._model_mapping))]
    native = {one.__name__: one for one in told if isinstance(one, type) and not hasattr(one, "native_class")}
    found = getattr(transformers, name, native.get(name))
    spelled = None if found is not None else _spellings().get(_spelled(name))
    return found if spelled is None else getattr(transformers, spelled)


@functools.cache
def _spellings() -> dict[str, str]:
    """{a name of transformers, as `_spelled` has it: the name}."""
    return {_spelled(name): name for name in dir(transformers)}


def _spelled(name: str) -> str:
    return name.replace("_", "").lower()


def auto_class(native: Any) -> Any:
    """The auto class that makes a model class, or was told of it; None where none does."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, *_auto_classes()):
        mapping = auto._model_mapping
        if native in _content(mapping) or native.__name__ in mapping._model_mapping.values():
            return auto
    return None


def _auto_classes() -> Iterator[Any]:
    found = (one for one in vars(modeling_auto).values() if isinstance(one, type))
    return (one for one in found if getattr(one, "_model_mapping", None) is not None)


def _content(mapping: Any) -> list[Any]:
    """What was registered with a mapping of transformers, beside what is its own."""
    return list(mapping._extra_content.values())


def native_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A native copy of a pruned config (native configs are copied as they are)."""
    plain = copy.deepcopy(config)
    native = getattr(type(config), "native_class", None)
    if native is not None:
        plain.__class__ = native
        plain.__dict__.pop("model_type", None)  # a config read from a file holds the pruned one, over the class's own
    return plain


def read_pruned_config(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """The pruned config that a config.json holds, of the class for its `base_model_type`; also readies its model class.

    Raises:
        ValueError: `base_model_type` or `architectures` name nothing in this transformers release.
    """
    base = str(config_dict.get("base_model_type"))
    if base not in CONFIG_MAPPING:
        raise ValueError(f"config.json: base_model_type {base!r} is not a model type of this transformers release")
    native: Any = CONFIG_MAPPING[base]
    config = pruned_config_class(native).from_dict(config_dict, **kwargs)
    architecture = (config_dict.get("architectures") or [None])[0]
    try:
        pruned: Any = __getattr__(str(architecture))
    except AttributeError as error:
        raise ValueError(f"config.json: architectures: {error}") from error
    register(pruned.native_class)
    return config


def __getattr__(name: str) -> type:
    """`PrunedX...` -> the pruned class of `X...`, see `class_named`, for the names in a checkpoint's `auto_map`."""
    native: Any = class_named(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    makers = ((PreTrainedModel, pruned_model_class), (PreTrainedConfig, pruned_config_class))
    for base, make in makers if isinstance(native, type) else ():
        if issubclass(native, base):
            pruned: type = make(native)
            return pruned
    raise AttributeError(f"{__name__} has no class {name!r}: expected {PREFIX} + the name of a transformers class")


def adds_balance_loss(native: Any) -> bool:
    """Whether a native class adds transformers' balance loss to its own when `output_router_logits` is on."""
    found = getattr(sys.modules[native.__module__], LOSS, None)
    return found is not None and _is_of_layers(found) and LOSS in inspect.unwrap(native.forward).__code__.co_names


def balance_loss_by_layer(native: Any) -> None:
    """Let transformers' balance loss of a family take layers with different counts, for every caller in this process.

    A trainer may call the function itself, Mixtral's for all families, or hold a wrapped `forward` of before a pruning;
    so it is the function that learns it. For layers of one count it computes what it did.
    """
    for module in (sys.modules[native.__module__], modeling_mixtral):
        stock = getattr(module, LOSS, None)
        if stock is not None and _is_of_layers(stock) and not hasattr(stock, "by_layer"):
            setattr(module, LOSS, _by_layer(stock))


def _is_of_layers(loss: Callable[..., Any]) -> bool:
    """Whether a function takes the logits of all layers and one count, as most families have it."""
    expected = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    return list(inspect.signature(loss).parameters) == expected


def _by_layer(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def loss(gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None) -> Any:
        counts = {logits.shape[-1] for logits in gate_logits} if isinstance(gate_logits, tuple) else set()
        if counts <= {num_experts}:
            return stock(gate_logits, num_experts, top_k, attention_mask)
        if len(counts) == 1:  # of all layers, but not what the caller took from a config of before a pruning
            count = counts.pop()
            return stock(gate_logits, count, min(top_k, count), attention_mask)
        parts = [loss((logits,), None, top_k, attention_mask) for logits in gate_logits]
        return torch.stack([part.to(parts[0].device) for part in parts]).mean()

    loss.by_layer = True  # type: ignore[attr-defined]
    return loss


def _forward_with_layerwise_loss(native: type[PreTrainedModel]) -> Callable[..., Any]:
    """Native `forward` whose auxiliary loss is the mean over layers where they hold different numbers of experts.

    transformers' function adds the layers up before it multiplies, which needs one count for all. Zero slots have no
    part in it: the loss is of the other slots' logits alone, as if the router chose among these.
    """

    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        text = self.config.get_text_config()
        wanted = text.output_router_logits if output_router_logits is None else output_router_logits
        if not wanted:
            return native.forward(self, *args, output_router_logits=False, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        ask = self.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "output_router_logits": True}), with_kwargs=True
        )
        try:
            output = native.forward(self, *args, output_router_logits=False, return_dict=True, **kwargs)
        finally:
            ask.remove()
        top_k, coefficient = (
            next(
                getattr(one, name) for one in (self, text) if hasattr(one, name)
            )  # on a model inside another: its config
            for name in ("num_experts_per_tok", "router_aux_loss_coef")
        )
        kept = kept_in(self.config)
        live = tuple(
            logits[..., list(kept[layer])] if layer in kept else logits
            for layer, logits in zip(counts_in(self.config), output.router_logits, strict=True)
        )
        loss = getattr(sys.modules[native.__module__], LOSS)
        output.aux_loss = loss(live, None, top_k, kwargs.get("attention_mask"))
        if output.loss is not None:
            output.loss = output.loss + coefficient * output.aux_loss.to(output.loss.device)
        keep_dict = self.config.return_dict if return_dict is None else return_dict
        return output if keep_dict else output.to_tuple()

    return forward


def _get(config: PreTrainedConfig, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = getattr(value, key, None)
    return value


def _build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _fit(name: str, low: int, high: int, at_low: int, at_high: int, dim: int = 0) -> LinearInCount:
    rows, rest = divmod(at_high - at_low, high - low)
    if rest or rows < 1:
        raise ValueError(f"{name}: {at_low} with {low} experts and {at_high} with {high} is not linear in the count")
    return LinearInCount(dim=dim, rows_per_expert=rows, num_trailing=at_low - rows * low)
