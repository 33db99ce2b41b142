"""The authors' published V-MoE and E3 checkpoints as `VMoEForImageClassification`.

Parameter names of github.com/google-research/vmoe on the left of the tables, ours on the right. Flax stores matrices
as (in, out), PyTorch as (out, in). Sizes are read off the shapes; what has no parameters (top-k, capacity) must be
given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.models.vmoe.configuration import VMoEConfig
from secateur.models.vmoe.flax_files import read_arrays
from secateur.models.vmoe.modeling import VMoEForImageClassification

Change = Callable[[Tensor], Tensor]


def _same(array: Tensor) -> Tensor:
    return array


def _swapped(array: Tensor) -> Tensor:
    return array.transpose(-1, -2)


def _into_heads(array: Tensor) -> Tensor:
    """(D, heads, width) -> (heads * width, D)."""
    return array.flatten(1).T


def _out_of_heads(array: Tensor) -> Tensor:
    """(heads, width, D) -> (D, heads * width)."""
    return array.flatten(0, 1).T


def _flat(array: Tensor) -> Tensor:
    return array.flatten()


def _patches(array: Tensor) -> Tensor:
    """(height, width, channels, D) -> (D, channels, height, width)."""
    return array.permute(3, 2, 0, 1)


# (D, E), or of an ensemble (D, members, experts of a member): experts of one member lie together, as ours
ROUTER = "Moe/Router/dense/kernel"
OUTSIDE: dict[str, tuple[str, int, Change]] = {
    "embedding/kernel": ("vmoe.embeddings.patch_embeddings.projection.weight", 4, _patches),
    "embedding/bias": ("vmoe.embeddings.patch_embeddings.projection.bias", 1, _same),
    "cls": ("vmoe.embeddings.cls_token", 3, _same),
    "Encoder/posembed_input/pos_embedding": ("vmoe.embeddings.position_embeddings", 3, _same),
    "Encoder/encoder_norm/scale": ("vmoe.layernorm.weight", 1, _same),
    "Encoder/encoder_norm/bias": ("vmoe.layernorm.bias", 1, _same),
    "pre_logits/kernel": ("pre_logits.weight", 2, _swapped),
    "pre_logits/bias": ("pre_logits.bias", 1, _same),
    "head/kernel": ("classifier.weight", 2, _swapped),
    "head/bias": ("classifier.bias", 1, _same),
}
IN_BLOCK: dict[str, tuple[str, int, Change]] = {
    "LayerNorm_0/scale": ("layernorm_before.weight", 1, _same),
    "LayerNorm_0/bias": ("layernorm_before.bias", 1, _same),
    "LayerNorm_1/scale": ("layernorm_after.weight", 1, _same),
    "LayerNorm_1/bias": ("layernorm_after.bias", 1, _same),
    "SelfAttention/query/kernel": ("attention.q_proj.weight", 3, _into_heads),
    "SelfAttention/query/bias": ("attention.q_proj.bias", 2, _flat),
    "SelfAttention/key/kernel": ("attention.k_proj.weight", 3, _into_heads),
    "SelfAttention/key/bias": ("attention.k_proj.bias", 2, _flat),
    "SelfAttention/value/kernel": ("attention.v_proj.weight", 3, _into_heads),
    "SelfAttention/value/bias": ("attention.v_proj.bias", 2, _flat),
    "SelfAttention/out/kernel": ("attention.o_proj.weight", 3, _out_of_heads),
    "SelfAttention/out/bias": ("attention.o_proj.bias", 1, _same),
    "Mlp/Dense_0/kernel": ("mlp.fc1.weight", 2, _swapped),
    "Mlp/Dense_0/bias": ("mlp.fc1.bias", 1, _same),
    "Mlp/Dense_1/kernel": ("mlp.fc2.weight", 2, _swapped),
    "Mlp/Dense_1/bias": ("mlp.fc2.bias", 1, _same),
    "Moe/Mlp/Dense_0/kernel": ("mlp.experts.up_proj", 3, _swapped),
    "Moe/Mlp/Dense_0/bias": ("mlp.experts.up_proj_bias", 2, _same),
    "Moe/Mlp/Dense_1/kernel": ("mlp.experts.down_proj", 3, _swapped),
    "Moe/Mlp/Dense_1/bias": ("mlp.experts.down_proj_bias", 2, _same),
    ROUTER: ("mlp.router.weight", 3, _into_heads),
}
BLOCK = re.compile(r"Encoder/encoderblock_(0|[1-9][0-9]{0,3})/(.+)")


def read_vmoe(
    prefix: Path, *, num_experts_per_tok: int, members: int | None = None, **options: Any
) -> VMoEForImageClassification:
    """A model from the files `prefix`.index and `prefix`.data-*.

    Args:
        num_experts_per_tok: K of the checkpoint; the files do not tell. The published V-MoE have 2, E3 has 1.
        members: of the ensemble, where routers of shape (D, E) do not tell; theirs are the experts in blocks of
            E / members. Routers of shape (D, members, E / members) tell themselves.
        options: further fields of VMoEConfig that no parameter tells, such as capacity_factor.

    Raises:
        SecateurError: the files are damaged, or hold another model than a V-MoE or an E3, or one of other members.
    """
    arrays = read_arrays(prefix, "params")
    try:
        if members is not None:
            arrays = {name: _of_members(name, array, members) for name, array in arrays.items()}
        config = config_of(arrays, num_experts_per_tok=num_experts_per_tok, **options)
        state = state_of(arrays)
    except SecateurError as error:
        raise SecateurError(f"{prefix}.index: {error}") from error
    with torch.device("meta"):
        model = VMoEForImageClassification(config)
    _check_same(prefix, model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _of_members(name: str, array: Tensor, members: int) -> Tensor:
    """A router (D, E) as (D, members, E / members); what is no router, as it is."""
    if not name.endswith(ROUTER):
        return array
    if array.ndim == 3 and array.shape[1] != members:
        raise SecateurError(f"{name}: {array.shape[1]} members, but {members} are asked for")
    if array.ndim == 2 and (members < 1 or array.shape[1] % members):
        raise SecateurError(f"{name}: {array.shape[1]} experts, expected a multiple of the {members} members")
    return array.reshape(len(array), members, -1) if array.ndim == 2 else array


def config_of(arrays: Mapping[str, Tensor], **options: Any) -> VMoEConfig:
    """The config whose model has these arrays, by their flax names.

    Raises:
        SecateurError: an array that every V-MoE has is missing or has another number of axes, or sizes do not fit.
    """
    blocks = sorted({int(found[1]) for name in arrays if (found := BLOCK.fullmatch(name))})
    sparse = [block for block in blocks if f"Encoder/encoderblock_{block}/{ROUTER}" in arrays]
    if not sparse:
        raise SecateurError(f"no block has {ROUTER}; expected a model with MoE layers")
    first = f"Encoder/encoderblock_{sparse[0]}/"
    side, other, channels, width = _shape(arrays, "embedding/kernel", 4)
    _, heads, _ = _shape(arrays, f"Encoder/encoderblock_{blocks[0]}/SelfAttention/query/kernel", 3)
    has_token = "cls" in arrays
    num_patches = _shape(arrays, "Encoder/posembed_input/pos_embedding", 3)[1] - has_token
    grid = math.isqrt(max(num_patches, 0))
    if side != other or grid * grid != num_patches:
        raise SecateurError(f"{num_patches} patches of {side} x {other} pixels, expected a square of squares")
    members = arrays[first + ROUTER].shape[1] if arrays[first + ROUTER].ndim == 3 else 1
    experts, _, inner = _shape(arrays, f"{first}Moe/Mlp/Dense_0/kernel", 3)
    sizes: dict[str, Any] = {"num_labels": _shape(arrays, "head/bias", 1)[0]}
    return VMoEConfig(
        image_size=grid * side,
        patch_size=side,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=heads,
        intermediate_size=inner,
        moe_layers=sparse,
        num_experts=experts,
        ensemble_size=members,
        classifier="token" if has_token else "gap",
        representation_size=_shape(arrays, "pre_logits/bias", 1)[0] if "pre_logits/bias" in arrays else None,
        **sizes,
        **options,
    )


def state_of(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays with our names and axes.

    Raises:
        SecateurError: a name that no V-MoE has, or another number of axes.
    """
    state = {}
    for name, stored in arrays.items():
        block = BLOCK.fullmatch(name)
        rest, before = (block[2], f"vmoe.layers.{block[1]}.") if block else (name, "")
        table = IN_BLOCK if block else OUTSIDE
        found, axes, change = table.get(rest, ("", 0, _same))
        array = stored[:, None] if rest == ROUTER and stored.ndim == 2 else stored
        if not found or array.ndim != axes:
            raise SecateurError(f"{name} of shape {tuple(stored.shape)} is no array of a V-MoE or E3")
        state[before + found] = change(array).contiguous()
    return state


def _shape(arrays: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in arrays or arrays[name].ndim != axes:
        found = tuple(arrays[name].shape) if name in arrays else "no such array"
        raise SecateurError(f"{name}: {found}, expected an array of {axes} axes")
    return tuple(arrays[name].shape)


def _check_same(prefix: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = {name: (tuple(found[name].shape) if name in found else "missing", shape) for name, shape in shapes.items()}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    beyond = sorted(found.keys() - shapes.keys())
    if wrong or beyond:
        listed = [f"{name} is {is_}, expected {shape}" for name, (is_, shape) in list(wrong.items())[:3]]
        raise SecateurError(
            f"{prefix}.index: {'; '.join([*listed, *(f'{name} is not expected' for name in beyond[:3])])}"
        )
