"""Where the experts of a live model are: found by building the model class twice, then checked against the model.

Nothing is listed per family except what a build cannot show: how many experts a router needs (top-k, groups), and the
families that cannot be pruned in training, each with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.decide.limits import LayerLimits, limits_of
from secateur.errors import SecateurError
from secateur.expert_axis import ExpertAxis, ExpertTensor
from secateur.modeling_secateur import (
    TOP_K_KEYS,
    ExpertLayout,
    LinearInCount,
    expert_count_key,
    find_expert_layout,
    is_of_experts,
    layer_of,
    most,
    native_config,
    probe_counts,
)

# bytes of an entry -> a type that holds its bits
INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

CHECKPOINTED = "_checkpoint_wrapped_module"  # in torch's wrapper of activation checkpointing: what it wraps

# model type -> why its experts cannot be pruned while it trains
REFUSED = {
    "llama4": "its experts run on every token, so there is no load to prune by",
    "llama4_text": "its experts run on every token, so there is no load to prune by",
    "jetmoe": "its attention holds a second, separate set of experts",
    "longcat_flash": "its zero experts share the router with the real ones and have no load rule yet",
    "zaya": "its router has a skip class beside the experts, which has no load rule yet",
    "deepseek_v4": "some of its layers route by a table of expert ids (tid2eid)",
}


@dataclass(frozen=True, kw_only=True)
class MoEBlock:
    """One MoE layer of a live model.

    layer: decoder layer, from 0. name: module path of `block`. experts, router: children of `block`.
    tensors: every parameter and buffer with an expert axis, by full name, all under `block`.
    params_per_expert: parameters that go with one expert, its router row included.
    num_slots: that the router chooses among. Where experts were removed into zero slots, more than the experts; then
    `tensors` and `params_per_expert` are about the experts alone.
    """

    layer: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    num_experts: int
    tensors: tuple[ExpertTensor, ...]
    params_per_expert: int
    num_slots: int


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """What pruning needs to know of a live model; `blocks` is {decoder layer: MoEBlock}, ascending."""

    model: PreTrainedModel
    model_type: str
    blocks: Mapping[int, MoEBlock]
    layout: ExpertLayout
    count_key: str
    top_k: int
    num_groups: int
    min_experts: int

    @property
    def counts(self) -> dict[int, int]:
        return {layer: block.num_experts for layer, block in self.blocks.items()}

    @property
    def slots(self) -> dict[int, int]:
        return {layer: block.num_slots for layer, block in self.blocks.items()}

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        """{layer: the slots whose experts are there, in their order} of the layers with zero slots."""
        found = {layer: getattr(block.experts, "kept_slots", None) for layer, block in self.blocks.items()}
        return {layer: kept for layer, kept in found.items() if kept is not None}

    @property
    def params_per_expert(self) -> dict[int, int]:
        return {layer: block.params_per_expert for layer, block in self.blocks.items()}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def limits(
        self, *, multiple_of: int = 1, min_experts: int = 1, max_experts: int | None = None
    ) -> dict[int, LayerLimits]:
        """Admissible expert counts a layer: never fewer than the router's top-k and groups need."""
        return limits_of(
            self.counts,
            num_groups=self.num_groups,
            least=self.min_experts,
            multiple_of=multiple_of,
            min_experts=min_experts,
            max_experts=max_experts,
        )


def describe_moe(model: nn.Module, layout: ExpertLayout | None = None, *, zero_slots: bool = False) -> MoEModel:
    """Find the MoE blocks of a transformers model and every tensor of theirs with an expert axis.

    Args:
        model: the model itself, not a wrapper. layout: of the same model, from an earlier call, to save the two builds.
        zero_slots: whether the caller knows of experts that were removed into zero slots. Most do not: the ids that a
            router gives are then not those of the experts.

    Raises:
        SecateurError: not a transformers model, no routed experts, a family in `REFUSED`, a wrapped model, zero slots,
            or a tensor or number that does not follow the layout which the model class itself builds.
    """
    if not isinstance(model, PreTrainedModel):
        raise SecateurError(
            f"expected a transformers model (PreTrainedModel), found {type(model).__module__}."
            f"{type(model).__qualname__}; give the model itself, not a wrapper (DDP, FSDP, torch.compile)"
        )
    has_some = any("kept_slots" in vars(module) for module in model.modules())
    if has_some and not zero_slots:
        raise SecateurError(
            "the model has zero slots: its routers choose among experts of which some were removed, and what counts "
            "their choices or prunes in training does not know that; `secateur apply` restores the model it was made "
            "from with its undo folder"
        )
    config = native_config(model.config)
    model_type = config.model_type
    if model_type in REFUSED:
        raise SecateurError(f"model type {model_type!r} cannot be pruned while it trains: {REFUSED[model_type]}")
    try:
        count_key = expert_count_key(config)
        native = native_class(model)
        layout = layout or find_expert_layout(native, config, probe_counts(config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SecateurError(f"model type {model_type!r}: cannot find its experts: {error}") from error
    top_k = top_k_in(config)
    if top_k is None:
        raise SecateurError(
            f"model type {model_type!r}: this family is not supported: its config does not say how many experts a "
            f"token goes to (looked for {', '.join(TOP_K_KEYS)})"
        )
    _check_adapters(model, layout)
    num_groups, min_experts = (1, 1) if has_some else router_needs(config, top_k)
    blocks = _blocks(model, layout)
    if not blocks:
        raise SecateurError(f"model type {model_type!r}: no layer has routed experts")
    for layer, block in blocks.items():
        if block.num_experts < min_experts:
            raise SecateurError(
                f"layer {layer}: {block.num_experts} experts, but its router needs at least {min_experts} "
                f"(top-k {top_k}, {num_groups} router groups)"
            )
    _check_attributes(model, layout, blocks)
    return MoEModel(
        model=model,
        model_type=model_type,
        blocks=blocks,
        layout=layout,
        count_key=count_key,
        top_k=top_k,
        num_groups=num_groups,
        min_experts=min_experts,
    )


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, adapters in its modules; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _check_adapters(model: PreTrainedModel, layout: ExpertLayout) -> None:
    """Raise where PEFT has put something of its own in the place of experts or a router."""
    parts = {name.rpartition(".")[0] for name in layout.tensors}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            for part in parts:
                if f"{part}.".startswith(f"{name}."):
                    raise SecateurError(
                        f"{name} has adapters ({type(module).__name__} of PEFT): those of experts and routers cannot "
                        "follow a pruning; expected adapters on other modules, such as attention"
                    )


def router_needs(config: PreTrainedConfig, top_k: int) -> tuple[int, int]:
    """(router groups, least experts a layer) for a config.

    Group-limited routers (DeepSeek-V3, arXiv 2412.19437 section 2.1.2) score a group by its two best experts and take
    top-k from `topk_group` groups, so every group keeps at least two and the chosen groups hold at least top-k.
    DeepSeek-V2 groups only when topk_method says so. Each member of an ensemble (E3, arXiv 2110.03360) has experts of
    its own and takes top-k from them.
    """
    members = getattr(config, "ensemble_size", None) or 1
    if members > 1:
        return members, members * top_k
    num_groups = getattr(config, "n_group", None) or 1
    if config.model_type == "deepseek_v2" and getattr(config, "topk_method", None) != "group_limited_greedy":
        num_groups = 1
    if num_groups == 1:
        return 1, top_k
    chosen_groups = getattr(config, "topk_group", None) or num_groups
    return num_groups, num_groups * max(2, -(-top_k // chosen_groups))


def _blocks(model: PreTrainedModel, layout: ExpertLayout) -> dict[int, MoEBlock]:
    by_layer: dict[int, dict[str, LinearInCount]] = {}
    for name, axis in layout.tensors.items():
        layer = layer_of(name)
        if layer is None:
            raise SecateurError(f"{name} has an expert axis but lies outside the decoder layers")
        by_layer.setdefault(layer, {})[name] = axis
    return {layer: _block(model, layer, by_layer[layer]) for layer in sorted(by_layer)}


def _block(model: PreTrainedModel, layer: int, axes: Mapping[str, LinearInCount]) -> MoEBlock:
    parts = [name.split(".") for name in axes]
    paths = {".".join(p[: p.index("experts")]) for p in parts if "experts" in p}
    if len(paths) != 1:
        raise SecateurError(f"layer {layer}: expected one module named 'experts', found {sorted(paths) or 'none'}")
    path = paths.pop()
    outside = [name for name in axes if not name.startswith(f"{path}.")]
    if outside:
        raise SecateurError(f"layer {layer}: {outside[0]} has an expert axis but lies outside {path}")
    block = module_at(model, path)
    experts = module_at(block, "experts")
    zero_slots = hasattr(experts, "kept_slots")
    tensors, counts, size = [], {}, 0
    for name, axis in axes.items():
        if zero_slots and not is_of_experts(name):
            continue
        owner = module_at(model, name.rpartition(".")[0])
        tensor = getattr(owner, name.rpartition(".")[2])
        counts[name] = _count_in(name, axis, tensor.shape[axis.dim])
        tensors.append(ExpertTensor(name=name, axis=_expert_axis(name, axis)))
        if isinstance(tensor, nn.Parameter):
            size += tensor.numel() // tensor.shape[axis.dim] * axis.rows_per_expert
    if len(set(counts.values())) != 1:
        raise SecateurError(f"layer {layer}: its tensors hold different numbers of experts: {counts}")
    routers = {name.removeprefix(f"{path}.").split(".")[0] for name in axes} - {"experts"}
    routers = {name for name in routers if isinstance(getattr(block, name), nn.Module)}
    if len(routers) != 1:
        raise SecateurError(f"layer {layer}: expected one router beside {path}.experts, found {sorted(routers)}")
    _check_no_expert_ids(path, block)
    return MoEBlock(
        layer=layer,
        name=path,
        block=block,
        experts=experts,
        router=module_at(block, routers.pop()),
        num_experts=next(iter(counts.values())),
        tensors=tuple(tensors),
        params_per_expert=size,
        num_slots=int(experts.num_slots) if zero_slots else next(iter(counts.values())),  # type: ignore[arg-type]
    )


def _count_in(name: str, axis: LinearInCount, size: int) -> int:
    count, rest = divmod(size - axis.num_trailing, axis.rows_per_expert)
    if rest or count < 1:
        raise SecateurError(
            f"{name}: axis {axis.dim} has {size} rows, expected {axis.rows_per_expert} an expert + {axis.num_trailing}"
        )
    return count


def _expert_axis(name: str, axis: LinearInCount) -> ExpertAxis:
    try:
        return ExpertAxis(dim=axis.dim, rows_per_expert=axis.rows_per_expert, num_trailing=axis.num_trailing)
    except SecateurError as error:
        raise SecateurError(f"{name}: {error}") from error


def _check_no_expert_ids(path: str, block: nn.Module) -> None:
    for name, buffer in block.named_buffers():
        if not buffer.is_floating_point() and buffer.numel() > 1:
            raise SecateurError(f"{path}.{name} is a table of whole numbers, perhaps of expert ids; no rule covers it")


def _check_attributes(model: nn.Module, layout: ExpertLayout, blocks: Mapping[int, MoEBlock]) -> None:
    for (name, key), value in layout.attributes.items():
        layer = layer_of(name)
        if layer is None:
            continue
        module = module_at(model, name)
        count = blocks[layer].num_experts if is_of_experts(name) else blocks[layer].num_slots
        expected = value.size(local_experts(module, count))
        if getattr(module, key) != expected:
            raise SecateurError(f"{name}.{key} is {getattr(module, key)!r}, expected {expected} for {count} experts")


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path that the model's class gives it, also below wrappers of activation checkpointing."""
    module = model
    for name in path.split(".") if path else ():
        module = getattr(module, name)  # a wrapper has the children of what it wraps
        while CHECKPOINTED in module._modules:
            module = getattr(module, CHECKPOINTED)
    return module


def tensor_at(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of a full name, as `module_at` finds modules."""
    path, _, key = name.rpartition(".")
    return getattr(module_at(model, path), key)


def local_experts(module: nn.Module, num_experts: int) -> int:
    """How many of a layer's experts this rank's `module` holds: all, or its share under expert parallelism."""
    for parameter in module.parameters(recurse=False) if getattr(module, "_is_expert_parallel", False) else ():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None and "ep" in mesh.mesh_dim_names:
            return num_experts // int(mesh.size(mesh.mesh_dim_names.index("ep")))
    return num_experts


def native_class(model: PreTrainedModel) -> Any:
    """The transformers class a model was built from, below a `Pruned...` class and what FSDP2 made of it."""
    return getattr(type(model), "native_class", plain_class(model))


def plain_class(model: nn.Module) -> Any:
    """The class of a model before `fully_shard` put FSDPModule in front of it."""
    bases = type(model).__mro__
    return bases[2] if bases[1].__name__ == "FSDPModule" else bases[0]


def top_k_in(config: PreTrainedConfig) -> int | None:
    """Experts a token, the most of any layer where the config has a list; None where it does not say."""
    for dotted in TOP_K_KEYS:
        value: Any = config
        for key in dotted.split("."):
            value = getattr(value, key, None)
        if found := most(value):
            return found
    return None


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in evaluation mode without gradient, of a model without a head what it gives; modes are restored.

    inputs: what the model's forward takes first: (B, S) token ids, or the pixels of images.
    """
    name = getattr(model, "main_input_name", "input_ids")
    options = {"use_cache": False} if name == "input_ids" else {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model(**{name: inputs}, **options)
            logits: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    finally:
        for module, training in modes:
            module.training = training
    return logits


def bits_sum(tensor: Tensor) -> int:
    """The sum of the entries' bits, each taken as a whole number of its size; one plain tensor."""
    flat = tensor.detach().flatten()
    return int(flat.view(INTEGER_OF_SIZE[flat.element_size()]).sum(dtype=torch.int64))
