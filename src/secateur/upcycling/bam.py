"""Which bytes of which parent is every tensor of a BAM made of (arXiv 2408.08274 section 2)? And its config.json.

Attention and FFN of parent j are expert j; all else is the average, and so are keys and values where experts share
them. The names and shapes are those of `secateur.models.bam.modeling`.

Shapes: N parents, D hidden size, H * d heads of one parent together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import SecateurError
from secateur.files.safetensors_header import BITS
from secateur.model_folder.read.tensor_files import CONFIG, StoredTensor
from secateur.model_folder.rewrite.computed import Beside, Mean
from secateur.model_folder.rewrite.pieces import Copy, NewTensor
from secateur.upcycling.blocks import BLOCKS, SAME_FIELDS, Block
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.parents import Parents

LASTS = ("weight", "bias")
ATTENTION_ROUTER, FFN_ROUTER = "self_attn.router.weight", "mlp.gate.weight"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A module of a BAM layer, of which one or two modules of each parent are parts.

    name: of the weight; bias: of the bias. how: mean: averaged; rows: one after another; stack: along a new first axis;
    columns: side by side. kv: averaged where experts share keys and values.
    """

    name: str
    bias: str
    roles: tuple[str, ...]
    how: Literal["mean", "rows", "stack", "columns"]
    kv: bool = False


def _plain(module: str, role: str, how: Any, kv: bool = False) -> Row:
    return Row(name=f"{module}.weight", bias=f"{module}.bias", roles=(role,), how=how, kv=kv)


def _expert(name: str, *roles: str) -> Row:
    return Row(name=f"mlp.experts.{name}", bias=f"mlp.experts.{name}_bias", roles=roles, how="stack")


ATTENTION_ROWS = (
    _plain("input_layernorm", "norm", "mean"),
    _plain("post_attention_layernorm", "second_norm", "mean"),
    _plain("self_attn.q_proj", "q", "rows"),
    _plain("self_attn.k_proj", "k", "rows", kv=True),
    _plain("self_attn.v_proj", "v", "rows", kv=True),
    Row(name="self_attn.o_proj.weight", bias="self_attn.o_bias", roles=("o",), how="columns"),
    _plain("self_attn.q_norm", "q_norm", "stack"),
    _plain("self_attn.k_norm", "k_norm", "stack", kv=True),
)
GATED_ROWS = (_expert("gate_up_proj", "gate", "up"), _expert("down_proj", "down"))
PLAIN_ROWS = (_expert("up_proj", "up"), _expert("down_proj", "down"))


def rows_of(block: Block) -> tuple[Row, ...]:
    return (*ATTENTION_ROWS, *(GATED_ROWS if "gate" in block.names else PLAIN_ROWS))


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a parent, or the rows of one role in it. name: of the tensor that holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    runs: tuple[Copy, ...]


def stored(parents: Parents, number: int, layer: int, role: str, last: str) -> Stored | None:
    """What a parent has of a role in a layer; None where it has none."""
    block, parent = BLOCKS[parents.model_type], parents.each[number]
    fused = block.fused is not None and role in "qkv"
    module = block.fused if fused else block.names.get(role)
    name = f"{block.layers}.{layer}.{module}.{last}"
    tensor = parent.files.tensors.get(name)
    if module is None or tensor is None:
        return None
    file = parent.file(tensor, number)
    if not fused:
        whole = Copy(file=file, start=tensor.start, length=tensor.length)
        return Stored(name=name, shape=tensor.shape, dtype=tensor.dtype, runs=(whole,))
    heads = parents["num_attention_heads"]
    if tensor.shape[0] % (3 * heads):
        raise SecateurError(f"{parent.path}: {name} has {tensor.shape[0]} rows, expected q, k and v of {heads} heads")
    length = tensor.length // (3 * heads)  # of one role in one head
    starts = [tensor.start + (3 * head + "qkv".index(role)) * length for head in range(heads)]
    return Stored(
        name=name,
        shape=(tensor.shape[0] // 3, *tensor.shape[1:]),
        dtype=tensor.dtype,
        runs=tuple(Copy(file=file, start=start, length=length) for start in starts),
    )


def bam_tensors(
    parents: Parents, plan: Blueprint, routers: Mapping[str, StoredTensor], routers_file: str
) -> list[NewTensor]:
    """Every tensor of the BAM, layer by layer; routers from their file."""
    made = list(_outside(parents))
    for layer in range(parents.layers):
        for row in rows_of(BLOCKS[parents.model_type]):
            for last in LASTS:
                each = [_found(parents, number, layer, row, last) for number in range(len(parents.each))]
                if each[0]:
                    name = f"model.layers.{layer}.{row.name if last == 'weight' else row.bias}"
                    made.append(_made(name, row, last, each, shared=row.kv and plan.shares_kv))
        for name in router_names(plan, layer):
            tensor = routers[name]
            copy = Copy(file=routers_file, start=tensor.start, length=tensor.length)
            made.append(NewTensor(name=name, dtype=tensor.dtype, shape=tensor.shape, pieces=(copy,)))
    return made


def router_names(plan: Blueprint, layer: int) -> dict[str, str]:
    """{name: "attention" or "ffn"}."""
    return {f"model.layers.{layer}.{ATTENTION_ROUTER}": "attention", f"model.layers.{layer}.{FFN_ROUTER}": "ffn"}


def used_names(parents: Parents) -> set[str]:
    """The tensors of a parent that a BAM has a place for."""
    block = BLOCKS[parents.model_type]
    used = {f"{module}.{last}" for module in block.outside.values() for last in LASTS}
    for layer in range(parents.layers):
        for row in rows_of(block):
            for last in LASTS:
                used |= {one.name for one in _found(parents, 0, layer, row, last)}
    return used


def check_bam_takes(parents: Parents) -> None:
    """Refuse what a BAM has no place for.

    Raises:
        SecateurError: names the tensor or the key.
    """
    first, used = parents.first, used_names(parents)
    for name in first.files.tensors:
        if name not in used:
            raise SecateurError(f"{first.path}: a BAM has no place for {name}")
    for key in BLOCKS[parents.model_type].zero:
        if first.config.get(key):
            raise SecateurError(
                f"{first.path / CONFIG}: {key} is {first.config[key]!r:.40}, which a BAM has no place for"
            )


def bam_config(parents: Parents, plan: Blueprint) -> dict[str, Any]:
    """config.json of the BAM: every field spelled out, so that no default of another version speaks.

    Raises:
        SecateurError: a value that no BAM can have.
    """
    from secateur.models.bam.configuration import BamConfig

    config = parents.first.config
    fields: dict[str, Any] = {key: config[key] for key in SAME_FIELDS if config.get(key) is not None}
    asked: dict[str, Any] = {
        "num_experts": len(parents.each),
        "num_attention_experts": len(parents.each),
        "num_experts_per_tok": plan.top_k,
        "renormalise_top1": plan.renormalises,
        "kv_experts": not plan.shares_kv,
        "attention_top_k": plan.attention_top_k,
        "router_init_std": plan.router_std,
    }
    block = BLOCKS[parents.model_type].config(config)
    made = BamConfig(**{**fields, **block, **asked}, architectures=[plan.target.architecture])
    written: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version"):
        written.pop(key, None)
    dtype = parents.first.files.config.get("dtype", parents.first.files.config.get("torch_dtype"))
    return written | ({} if dtype is None else {"dtype": dtype})


def _outside(parents: Parents) -> Iterator[NewTensor]:
    for module, theirs in BLOCKS[parents.model_type].outside.items():
        for last in LASTS:
            each = [parent.files.tensors.get(f"{theirs}.{last}") for parent in parents.each]
            copies = [
                Copy(file=parent.file(tensor, number), start=tensor.start, length=tensor.length)
                for number, (parent, tensor) in enumerate(zip(parents.each, each, strict=True))
                if tensor is not None
            ]
            if each[0] is not None:
                mean = Mean(sources=tuple(copies), dtype=each[0].dtype)
                yield NewTensor(name=f"{module}.{last}", dtype=each[0].dtype, shape=each[0].shape, pieces=(mean,))


def _found(parents: Parents, number: int, layer: int, row: Row, last: str) -> list[Stored]:
    parts = [stored(parents, number, layer, role, last) for role in row.roles]
    return [part for part in parts if part is not None]


def _made(name: str, row: Row, last: str, each: list[list[Stored]], *, shared: bool) -> NewTensor:
    """A tensor of the BAM from the parts that each parent has of it."""
    first = each[0]
    dtype, rest = first[0].dtype, first[0].shape[1:]
    length = sum(part.shape[0] for part in first)  # rows of one parent
    stacked = row.how == "stack" or (row.how == "columns" and last == "bias")
    if row.how == "mean" or shared:
        runs = zip(*([run for part in parts for run in part.runs] for parts in each), strict=True)
        shape = (1, length, *rest) if stacked else (length, *rest)
        pieces = tuple(Mean(sources=one, dtype=dtype) for one in runs)
        return NewTensor(name=name, dtype=dtype, shape=shape, pieces=pieces)
    if row.how == "columns" and last == "weight":
        sources = tuple(parts[0].runs[0] for parts in each)
        beside = Beside(sources=sources, rows=length, row_bytes=rest[0] * BITS[dtype] // 8)
        return NewTensor(name=name, dtype=dtype, shape=(length, rest[0] * len(each)), pieces=(beside,))
    copies = tuple(run for parts in each for part in parts for run in part.runs)
    shape = (len(each), length, *rest) if stacked else (length * len(each), *rest)
    return NewTensor(name=name, dtype=dtype, shape=shape, pieces=copies)
