"""Which bytes of which parent is every tensor of the mixture made of? And what does its config.json say?"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.files.safetensors_header import BITS
from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.rewrite.computed import Mean, Noise, Part
from secateur.model_folder.rewrite.pieces import Copy, NewTensor, Piece
from secateur.upcycling.forms import Blueprint, ExpertSource
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.targets import FFN, ROUTES

ROUTERS = "routers.safetensors"  # in the work folder; pieces name it so
SHARED_FACTOR = 2.0  # the gate of a shared expert is sigmoid(0)
# Keys that every config has, whatever the architecture; what the source says of them stays.
NOT_OF_LAYERS = frozenset({
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version", "_name_or_path",
})  # fmt: skip
Division = Mapping[int, Sequence[int]]  # layer -> its neurons: those of the shared expert, then those of each expert


def new_tensors(
    parents: Parents, plan: Blueprint, asked: Asked, division: Division, routers: Mapping[str, StoredTensor]
) -> list[NewTensor]:
    """Every tensor of the mixture, layer by layer in the order of the first parent.

    Args:
        division: neurons of each layer where they are divided by more than their order. routers: those of the file
            ROUTERS.
    """
    made: list[NewTensor] = []
    done: set[int] = set()
    for name in parents.first.files.tensors:
        parts = split(name)
        if parts is None or parts.rest not in FFN.values():
            made.append(_rest(parents, name, asked.attention_from))
        elif parts.layer not in done:
            done.add(parts.layer)
            made += _layer(parents, plan, asked, parts.layer, division.get(parts.layer))
            made += _routers(plan, parts.layer, routers, parents.dtype)
    return made


def router_names(plan: Blueprint, layer: int) -> dict[str, str]:
    """{name: "ffn" of the router, "gate" of the gate of the shared expert, if there is one}."""
    gate = {f"model.layers.{layer}.mlp.shared_expert_gate.weight": "gate"} if plan.target.shared else {}
    return {f"model.layers.{layer}.{plan.target.router}": "ffn", **gate}


def expert_name(plan: Blueprint, layer: int, expert: int, role: str) -> str:
    return f"model.layers.{layer}.{plan.target.expert.format(expert, plan.target.names[role])}"


def shared_name(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.shared_expert.{role}_proj.weight"


def neurons_of(plan: Blueprint, source: ExpertSource, listed: Sequence[int] | None) -> Sequence[int]:
    """Those of an expert; see `Division`."""
    start = plan.shared + source.piece * plan.width
    return range(start, start + plan.width) if listed is None else listed[start : start + plan.width]


def _rest(parents: Parents, name: str, only: int | None) -> NewTensor:
    numbers = range(len(parents.each)) if only is None else [only]
    copies = []
    for number in numbers:
        parent = parents.each[number]
        tensor = parent.files.tensors[name]
        copies.append(Copy(file=parent.file(tensor, number), start=tensor.start, length=tensor.length))
    tensor = parents.first.files.tensors[name]
    piece: Piece = copies[0] if len(copies) == 1 else Mean(sources=tuple(copies), dtype=tensor.dtype)
    return NewTensor(name=name, dtype=tensor.dtype, shape=tensor.shape, pieces=(piece,))


def _layer(
    parents: Parents, plan: Blueprint, asked: Asked, layer: int, listed: Sequence[int] | None
) -> list[NewTensor]:
    made = []
    for number, source in enumerate(plan.experts):
        neurons = neurons_of(plan, source, listed)
        for role in FFN:
            name = expert_name(plan, layer, number, role)
            noise = Noise(share=asked.noise, seed=zlib.crc32(f"{asked.seed} {name}".encode())) if asked.noise else None
            factor = plan.factor if role == "down" else 1.0
            made.append(_part(parents, source.parent, layer, role, name, neurons, factor, noise))
    if plan.target.shared:
        busy: Sequence[int] = range(plan.shared) if listed is None else listed[: plan.shared]
        for role in FFN:
            factor = SHARED_FACTOR if role == "down" else 1.0
            made.append(_part(parents, 0, layer, role, shared_name(layer, role), busy, factor, None))
    return made


def _part(
    parents: Parents,
    number: int,
    layer: int,
    role: str,
    name: str,
    neurons: Sequence[int],
    factor: float,
    noise: Noise | None,
) -> NewTensor:
    """Some neurons of one matrix: rows of gate and up, columns of down. What needs no arithmetic is a copy of bytes."""
    parent = parents.each[number]
    tensor = parent.files.tensors[f"model.layers.{layer}.{FFN[role]}"]
    source = Copy(file=parent.file(tensor, number), start=tensor.start, length=tensor.length)
    rows, width = tensor.shape
    is_down = role == "down"
    shape = (rows, len(neurons)) if is_down else (len(neurons), width)
    piece: Piece
    if not neurons:
        return NewTensor(name=name, dtype=tensor.dtype, shape=shape, pieces=())
    if shape == tensor.shape and isinstance(neurons, range) and factor == 1 and noise is None:
        piece = source
    elif not is_down and isinstance(neurons, range) and noise is None:
        row = width * BITS[tensor.dtype] // 8
        piece = Copy(file=source.file, start=source.start + neurons.start * row, length=len(neurons) * row)
    else:
        piece = Part(
            source=source,
            dtype=tensor.dtype,
            shape=(rows, width),
            rows=None if is_down else neurons,
            columns=neurons if is_down else None,
            factor=factor,
            noise=noise,
        )
    return NewTensor(name=name, dtype=tensor.dtype, shape=shape, pieces=(piece,))


def _routers(plan: Blueprint, layer: int, routers: Mapping[str, StoredTensor], dtype: str) -> list[NewTensor]:
    made = []
    for name in router_names(plan, layer):
        tensor = routers[name]
        piece = Copy(file=ROUTERS, start=tensor.start, length=tensor.length)
        made.append(NewTensor(name=name, dtype=dtype, shape=tensor.shape, pieces=(piece,)))
    return made


def new_config(parents: Parents, plan: Blueprint) -> dict[str, Any]:
    """config.json of the mixture: the first parent's, with every key that both architectures have spelled out.

    Defaults differ between architectures, such as the base of rotary embeddings, so nothing is left to them.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    target, first = plan.target, parents.first
    known = CONFIG_MAPPING[target.model_type]().to_dict()
    written = copy.deepcopy(dict(first.files.config))
    for key, value in json.loads(json.dumps(first.config)).items():
        if key in known and key not in NOT_OF_LAYERS and not (value is None and known[key] is None):
            written[key] = value
    for key in ("auto_map", "mlp_bias", "attention_bias", "pretraining_tp"):
        written.pop(key, None)
    extra = ROUTES[parents.model_type].extra.get(target.model_type, {})
    written |= {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **target.fixed,
        **extra,
        target.count: len(plan.experts),
        target.width: plan.width,
        "num_experts_per_tok": plan.top_k,
        "output_router_logits": False,
    }
    if target.renormalises is not None:
        written[target.renormalises] = plan.renormalises
    if target.shared:
        written["shared_expert_intermediate_size"] = plan.shared
    return written
