"""Apply a plan to a live model and its optimizer, in place: training goes on with the same objects."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor, gather, is_sharded
from secateur.families import (
    MoEBlock,
    MoEModel,
    describe_moe,
    local_experts,
    module_at,
    native_class,
    plain_class,
    tensor_at,
)
from secateur.modeling_secateur import (
    LOSS,
    adds_balance_loss,
    auto_map_of,
    balance_loss_by_layer,
    class_named,
    layer_of,
    native_config,
    pruned_config_class,
    pruned_model_class,
)
from secateur.plans import Plan
from secateur.surgery.config_json import moe_config
from secateur.surgery.fits import check_plan_fits, check_reroutes
from secateur.surgery.optimizer import Optimizers, Replacement, replace_parameters_


def check_model(moe: MoEModel) -> None:
    """Refuse what surgery in place cannot follow, before any time is spent on training.

    Raises:
        SecateurError: the model is compiled, sharded, quantised, shares expert tensors, or has hooks on them.
    """
    model = moe.model
    check_not_compiled(model)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise SecateurError("the model is quantised; experts are pruned in training only in floating point")
    native = native_class(model)
    if class_named(native.__name__) is not native:
        raise SecateurError(
            f"the model is a {native.__module__}.{native.__qualname__}, which transformers' auto classes do not know: "
            "once pruned it could not be loaded again. Use the class of transformers, or tell an auto class of yours "
            "(AutoConfig.register and AutoModelForCausalLM.register, each with a config class of its own)"
        )
    wants = getattr(model.config.get_text_config(), "output_router_logits", False)
    if wants and hasattr(sys.modules[native.__module__], LOSS) and not adds_balance_loss(native):
        raise SecateurError(
            f"config.output_router_logits is on, and {native.__name__} has a balance loss of its own, which may "
            "take one expert count for all layers; turn it off"
        )
    balance_loss_by_layer(native)
    owners: dict[int, str] = {}
    for name in moe.layout.tensors:
        parameter = tensor_at(model, name)
        if layer_of(name) is None or not isinstance(parameter, nn.Parameter):
            continue
        if id(parameter) in owners:
            raise SecateurError(f"{name} and {owners[id(parameter)]} are one shared parameter")
        owners[id(parameter)] = name
        if type(parameter.data) is not torch.Tensor and not is_sharded(parameter):
            raise SecateurError(f"{name} is a {type(parameter.data).__name__}, expected a plain tensor or a DTensor")
        hooked = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooked and is_sharded(parameter):
            raise SecateurError(f"{name} is sharded and has gradient hooks, which would stay on the old parameter")


def check_not_compiled(model: nn.Module) -> None:
    """Compiled code neither calls the hooks that count nor sees a pruned parameter.

    Raises:
        SecateurError: names the module that is compiled, as a whole or by its forward.
    """
    for name, module in model.named_modules():
        by_forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # also of what it wraps
        if module._compiled_call_impl is not None or by_forward:
            raise SecateurError(f"{name or 'the model'} is compiled (torch.compile); prune an uncompiled model")


def check_plan(moe: MoEModel, plan: Plan) -> None:
    """Compare a plan with the model it is for.

    Raises:
        SecateurError: a layer the model does not have, another number of experts, fewer left than the router needs, or
            removed experts that would leave zero slots.
    """
    check_reroutes(plan)
    if moe.kept:
        raise SecateurError("the model has zero slots, and rows of its routers cannot be cut; leave zero slots again")
    check_plan_fits(plan, moe.counts, min_experts=moe.min_experts, num_groups=moe.num_groups)


def prune_model_(moe: MoEModel, plan: Plan, optimizer: Optimizers | None = None) -> MoEModel:
    """Gather every tensor with an expert axis by the plan, with the optimizer's state, in place.

    Call it after `optimizer.step()`: gradients of the pruned parameters are dropped. The model object, its modules, its
    parameters (each the same object with another value, with its hooks), the learning-rate schedule, GradScaler and
    the parameters' order in the optimizer stay; so lists of parameters that the script keeps stay right. The config
    becomes an object of this model alone. A model whose layers end up with different counts becomes its `Pruned...`
    class, so that `save_pretrained` writes a folder that loads again.

    Args:
        optimizer: the one that trains the model, or all of them.

    Returns:
        The description of the pruned model.

    Raises:
        SecateurError: the plan does not fit the model, or no rule covers an optimizer's state; nothing was changed.
    """
    check_plan(moe, plan)
    plan = plan.filled(moe.counts)
    changed = {layer: layer_plan for layer, layer_plan in plan.layers.items() if not layer_plan.is_identity}
    replacements: list[Replacement] = []
    new_values: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, layer_plan in changed.items():
        for spec in moe.blocks[layer].tensors:
            owner, key = locate(moe.model, spec.name)
            old = getattr(owner, key)
            if is_sharded(old):
                raise SecateurError(f"{spec.name} is sharded over ranks; prune it with LAEP or prune_sharded_model_")
            value = gather(old.detach(), spec, layer_plan)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(value, requires_grad=old.requires_grad)
                replacements.append(Replacement(old=old, new=new, spec=spec, layer_plan=layer_plan, stays=True))
            new_values.append((old, value))
    if optimizer is not None:
        replace_parameters_(optimizer, replacements)
    for old, value in new_values:
        take_value_(old, value)
    torch.clear_autocast_cache()  # which knows weights by their objects
    set_counts_(moe, {layer: layer_plan.experts_after for layer, layer_plan in plan.layers.items()})
    return describe_moe(moe.model, moe.layout)


def take_value_(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter or buffer a value of another shape; its hooks stay, its gradient goes.

    A graph that is still alive (the loss of the last step, say) holds the node that adds up the tensor's gradient,
    which would go on expecting the old shape. torch makes a new node once the type has changed: it does for a moment.
    """
    tensor.grad = None
    other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    if tensor.is_floating_point():
        tensor.data = value.new_empty(0, dtype=other)
    tensor.data = value


def set_counts_(moe: MoEModel, counts: dict[int, int]) -> None:
    """Write expert counts into a config of the model's own, the class and every module attribute that holds one."""
    own_config_(moe.model)
    model, config = moe.model, moe.model.config
    native = native_config(config)
    largest = max(counts.values())
    for (name, key), value in moe.layout.attributes.items():
        layer, module = layer_of(name), module_at(model, name)
        setattr(module, key, value.size(local_experts(module, largest if layer is None else counts[layer])))
    *parents, key = moe.count_key.split(".")
    setattr(functools.reduce(getattr, parents, config), key, largest)
    if len(set(counts.values())) > 1:
        become_pruned_(model, moe_config(counts, config.num_hidden_layers))
        return
    config.__class__, model.__class__ = type(native), _as_sharded_as(model, native_class(model))
    for name in ("moe_config", "base_model_type", "auto_map"):
        config.__dict__.pop(name, None)


def become_pruned_(model: PreTrainedModel, moe_config: dict[str, Any]) -> None:
    """Give a model and a config of its own their `Pruned...` classes, and the config what these read, in place."""
    own_config_(model)
    config, native = model.config, native_config(model.config)
    config.__class__ = pruned_config_class(type(native))  # type: ignore[arg-type]
    model.__class__ = _as_sharded_as(model, pruned_model_class(native_class(model)))
    config.base_model_type, config.moe_config = native.model_type, moe_config
    config.auto_map = auto_map_of(native_class(model))


def own_config_(model: PreTrainedModel) -> None:
    """Give the model and its modules copies of their configs, as other models may have been made from the same."""
    memo: dict[int, Any] = {}
    copy.deepcopy(model.config, memo)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[key] = copy.deepcopy(value, memo)


def _as_sharded_as(model: nn.Module, plain: type) -> Any:
    """`plain` with FSDPModule in front, if the model's own class has it there.

    It keeps the name of `plain`: transformers writes the name into a checkpoint as the class to load.
    """
    if plain_class(model) is type(model):
        return plain
    members = {"__deepcopy__": type(model).__dict__["__deepcopy__"], "__module__": plain.__module__}
    return type(plain.__name__, (type(model).__mro__[1], plain), members)


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the tensor of a full name, and its name there."""
    path, _, key = name.rpartition(".")
    return module_at(model, path), key


def router_tensors(block: MoEBlock) -> tuple[ExpertTensor, ...]:
    """The tensors of a block that decide the routing: all with an expert axis outside its `experts` module."""
    return tuple(spec for spec in block.tensors if not spec.name.startswith(f"{block.name}.experts."))
