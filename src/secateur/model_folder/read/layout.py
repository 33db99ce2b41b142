"""Where the experts of a family lie on the disk: found by building the model class twice, as in modeling_secateur.

Both builds go through transformers' own conversion to the names of its files; what differs between the two has an
expert axis or an expert's number. So a new family needs no row here. What a build cannot show is in two small tables:
what quantised tensors are called (COMPANIONS) and which families cannot be pruned, with the reason (`model.REFUSED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertAxis
from secateur.model_folder.read.names import numbered, split

Role = Literal["expert", "router"]

# What quantised forms add to, or put in the place of, a tensor with all experts on axis 0: MXFP4, FP8.
# Where every expert has tensors of its own, all that bears its number is its own, so nothing needs to be listed.
COMPANIONS = ("_blocks", "_scales", "_scale_inv", "_scale")


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A tensor that holds all experts of a layer: what it is of them, and where they lie in it."""

    role: Role
    axis: ExpertAxis


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a layout says of a name: `key` is its rule; either `axis`, or `number` and `after` of one expert's own."""

    key: str
    role: Role = "expert"
    axis: ExpertAxis | None = None
    number: int = 0
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one form of the files; all of them without the path of the layers and the layer's number.

    title: for messages. containers: what the lists of layers are called. stacked: by name. own: path before an expert's
    number -> modules of an expert. layers: MoE layer -> the keys of its `stacked` and `own`. plain: names without an
    expert axis, also those outside the layers.
    """

    title: str
    containers: frozenset[str]
    stacked: Mapping[str, Stacked]
    own: Mapping[str, frozenset[str]]
    layers: Mapping[int, frozenset[str]]
    plain: frozenset[str]

    def find(self, rest: str) -> Match | None:
        """What a name within a layer is, if it has an expert axis or bears an expert's number."""
        if found := self.stacked.get(rest):
            return Match(key=rest, role=found.role, axis=found.axis)
        for before in self.own:
            if own := numbered(rest, before):
                return Match(key=before, number=own[0], after=own[1])
        for suffix in COMPANIONS:
            beside = self.stacked.get(rest.removesuffix(suffix)) if rest.endswith(suffix) else None
            if beside and (beside.role, beside.axis.dim, beside.axis.rows_per_expert) == ("expert", 0, 1):
                return Match(key=rest.removesuffix(suffix), axis=beside.axis)
        return None

    def is_plain(self, rest: str) -> bool:
        """Whether it is, or stands beside, a tensor that the build has without an expert axis."""
        if rest in self.plain:
            return True
        module = rest.rpartition(".")[0]
        inside = (*self.stacked, *self.own)
        beside = f"{module}.weight" in self.plain or module in self.plain
        return beside and not any(f"{key}.".startswith(f"{module}.") for key in inside)


def find_layouts(
    model_class: Any, low: PreTrainedConfig, high: PreTrainedConfig, counts: tuple[int, int]
) -> tuple[Layout, ...]:
    """The layouts in which files of a model may be: as transformers writes it, and with the names of the live model.

    Args:
        model_class: the native class. low, high: its config with the first and the second of `counts` experts.

    Raises:
        SecateurError: something does not follow the expert count linearly, or lies outside the layers.
    """
    builds = [_build(model_class, config) for config in (low, high)]
    states = [build.state_dict() for build in builds]
    outside = {name: value for name, value in states[0].items() if "experts" not in name.split(".")}
    as_saved = [_saved_names(build, state) for build, state in zip(builds, states, strict=True)]
    routers = {"as transformers saves it": _saved_names(builds[0], outside), "live names": outside}
    found: list[Layout] = []
    for (title, router), (small, large) in zip(routers.items(), (as_saved, states), strict=True):
        layout = _compare(title, small, large, set(router), counts)
        if not found or (layout.stacked, layout.own) != (found[0].stacked, found[0].own):
            found.append(layout)
    return tuple(found)


def _build(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    return model


def _saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return saved


def _compare(
    title: str, small: Mapping[str, Tensor], large: Mapping[str, Tensor], routers: set[str], counts: tuple[int, int]
) -> Layout:
    own = _own_modules(small, large)
    stacked: dict[str, Stacked] = {}
    layers: dict[int, set[str]] = {}
    containers, plain = set(), set()
    for name, tensor in large.items():
        parts = split(name)
        key = "" if parts is None else _before_number(own, parts.rest) or parts.rest
        same = name in small and small[name].shape == tensor.shape
        if same and key not in own:
            plain.add(name if parts is None else parts.rest)
            continue
        if parts is None:
            raise SecateurError(f"{name} follows the expert count but lies outside the decoder layers")
        if key not in own:
            role: Role = "router" if name in routers else "expert"
            one = Stacked(role=role, axis=_fit(name, small[name].shape, tensor.shape, counts))
            if stacked.setdefault(key, one) != one:
                raise SecateurError(f"{name}: its expert axis is not the same in all layers")
        containers.add(parts.container)
        layers.setdefault(parts.layer, set()).add(key)
    gone = small.keys() - large.keys()
    if gone or not layers:
        raise SecateurError(f"the build shows no experts that follow the count; {sorted(gone)[:3]} differ")
    return Layout(
        title=title,
        containers=frozenset(containers),
        stacked=stacked,
        own=own,
        layers={layer: frozenset(keys) for layer, keys in sorted(layers.items())},
        plain=frozenset(plain),
    )


def _own_modules(small: Mapping[str, Tensor], large: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
    """Path before an expert's number -> modules of an expert, from the tensors that only the larger build has."""
    own: dict[str, set[str]] = {}
    for name in large.keys() - small.keys():
        parts = split(name)
        found = None if parts is None else _number_in(name, parts.rest, small)
        if found is None:
            raise SecateurError(f"{name} appears with more experts but bears no expert's number")
        before, after = found
        own.setdefault(before, set()).add(after.rpartition(".")[0] or after)
    return {before: frozenset(modules) for before, modules in own.items()}


def _number_in(name: str, rest: str, small: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """What stands before and after an expert's number: the one that can be 0 in the smaller build."""
    parts = rest.split(".")
    start = name.removesuffix(rest)
    for at in range(1, len(parts) - 1):
        if parts[at].isdecimal() and start + ".".join([*parts[:at], "0", *parts[at + 1 :]]) in small:
            return ".".join(parts[:at]), ".".join(parts[at + 1 :])
    return None


def _before_number(own: Iterable[str], rest: str) -> str | None:
    return next((before for before in own if numbered(rest, before)), None)


def _fit(name: str, low: torch.Size, high: torch.Size, counts: tuple[int, int]) -> ExpertAxis:
    dims = [dim for dim, (a, b) in enumerate(zip(low, high, strict=True)) if a != b]
    if len(dims) != 1:
        raise SecateurError(f"{name}: the axes {dims} follow the expert count, expected one")
    dim, more = dims[0], counts[1] - counts[0]
    rows, rest = divmod(high[dim] - low[dim], more)
    if rest or rows < 1 or low[dim] < rows * counts[0]:
        raise SecateurError(f"{name}: {low[dim]} with {counts[0]} experts and {high[dim]} with {counts[1]}")
    return ExpertAxis(dim=dim, rows_per_expert=rows, num_trailing=low[dim] - rows * counts[0])
