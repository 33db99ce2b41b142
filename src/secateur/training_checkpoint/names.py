"""What the entries of a training checkpoint are called, by engine: which have an expert axis, and where.

To support another engine, give its names in a file (`names_file`) or add a row to NAMINGS.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from secateur.errors import SecateurError
from secateur.expert_axis import SUSPICIOUS, ExpertAxis

Section = Literal["model", "optimizer", "settings"]
Role = Literal["router", "expert", "counter"]


@dataclass(frozen=True, kw_only=True)
class NamedAxis:
    """The expert axis of a tensor, as its name tells it.

    rows_known: False where it does not tell the rows of an expert, and only the other tensors of the layer tell how
    many experts there are; `axis.rows_per_expert` then says nothing.
    """

    axis: ExpertAxis = field(default_factory=lambda: ExpertAxis(dim=0))
    rows_known: bool = True

    def in_tensor(self, size: int, num_experts: int) -> ExpertAxis:
        """The axis in a tensor that has `size` entries on it."""
        if self.rows_known:
            return self.axis
        return replace(self.axis, rows_per_expert=max(1, (size - self.axis.num_trailing) // num_experts))


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The names of one engine.

    blocks: path of a MoE block, with `{layer}` and, in front, `{prefix}`, which is any path, the same for all blocks.
    routers, experts: name inside the block -> its expert axis. A router tensor is one that decides the routing.
    counters: names inside the block, with the experts on axis 0, that count for one window; set to zero in a layer that
    changes. whole: shell patterns of names inside the block without an expert axis. outside: the same for full names
    elsewhere that sound as if they had one.
    optimizer: full name of an entry of the optimizer's state, from the parameter's `{name}` and the state's `{key}`.
    settings: full name of an entry of the optimizer's param groups, the same way.
    """

    name: str
    blocks: tuple[str, ...]
    routers: Mapping[str, NamedAxis]
    experts: Mapping[str, NamedAxis]
    counters: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ("optimizer.state.{name}.{key}", "optim.state.{name}.{key}", "state.{name}.{key}")
    settings: tuple[str, ...] = (
        "optimizer.param_groups.{name}.{key}",
        "optim.param_groups.{name}.{key}",
        "param_groups.{name}.{key}",
    )


def _first_axis(names: str) -> dict[str, NamedAxis]:
    return {name: NamedAxis() for name in names.split()}


TRANSFORMERS = Naming(
    name="transformers",  # live names, as get_model_state_dict gives them
    blocks=(
        "{prefix}layers.{layer}.mlp",
        "{prefix}layers.{layer}.feed_forward",
        "{prefix}layers.{layer}.block_sparse_moe",
        "{prefix}layers.{layer}.mixer",
        "{prefix}blocks.{layer}.ffn",
    ),
    routers=_first_axis(
        "gate.weight gate.bias gate.wg.weight router.weight router.bias router.gate.weight router.layer.weight "
        "gate.e_score_correction_bias e_score_correction_bias expert_bias"
    )
    | {"gate.moe_statics.e_score_correction_bias": NamedAxis(axis=ExpertAxis(dim=1))},
    experts=_first_axis(
        "experts.gate_up_proj experts.up_proj experts.down_proj "
        "experts.gate_up_proj_bias experts.up_proj_bias experts.down_proj_bias"
    )
    | {f"experts.mlp.{name}": NamedAxis(rows_known=False) for name in ("w1", "v1", "w2")},
    whole=(
        "shared_expert.*",
        "shared_experts.*",
        "shared_expert_gate.*",
        "shared_mlp.*",
        "post_mlp_layernorm.*",
        "gate.global_scale",
    ),
    outside=("*.self_attn.*", "*.linear_attn.*", "*.attention.*", "*.shared_mlp.*"),
)

TORCHTITAN = Naming(
    name="torchtitan",  # of the releases 0.1.0 to 0.2.2, and of the sources that docs/engines.md names
    blocks=("{prefix}layers.{layer}.moe",),
    routers=_first_axis("router.gate.weight router.gate.bias expert_bias_E expert_bias"),
    experts=_first_axis(
        " ".join(
            f"{module}.{name}"
            for module in ("routed_experts.inner_experts", "experts")
            for name in [
                "w1_EFD",
                "w2_EDF",
                "w3_EFD",
                "mlp1_weight_EGD",
                "mlp1_bias_EG",
                "mlp2_weight_EDF",
                "mlp2_bias_ED",
                "w1",
                "w2",
                "w3",
                "mlp1_weight",
                "mlp1_bias",
                "mlp2_weight",
                "mlp2_bias",
            ]
        )
    ),
    counters=("tokens_per_expert_E", "tokens_per_expert"),
    whole=("shared_experts.*", "shared_expert.*"),
    outside=("mtp_layers.*", "*.state.mtp_layers.*"),  # layers of their own, whose counts no plan names
)

NAMINGS: Mapping[str, Naming] = {naming.name: naming for naming in (TRANSFORMERS, TORCHTITAN)}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a name says.

    layer, block, part: MoE layer, path of its block, name inside the block; None and empty outside.
    role, named: of a tensor with an expert axis. prefix: see Naming.blocks. parameter, key: of an optimizer entry.
    loose_in: the block it lies in though no rule says what it is; fine where the block is a dense layer's.
    """

    section: Section = "model"
    layer: int | None = None
    block: str = ""
    part: str = ""
    role: Role | None = None
    named: NamedAxis = field(default_factory=NamedAxis)
    prefix: str = ""
    parameter: str = ""
    key: str = ""
    loose_in: str | None = None


def understand(naming: Naming, name: str) -> Entry | None:
    """What an entry's full name says; None where it sounds like an expert's or a router's but no rule covers it."""
    sections: tuple[tuple[Section, tuple[str, ...]], ...] = (
        ("optimizer", naming.optimizer),
        ("settings", naming.settings),
    )
    for section, templates in sections:
        for template in templates:
            if match := pattern_of(template).fullmatch(name):
                of = _of_parameter(naming, match["name"])
                if of is None:
                    return None
                return replace(of, section=section, parameter=match["name"], key=match["key"])
    return _of_parameter(naming, name)


def _of_parameter(naming: Naming, name: str) -> Entry | None:
    for block in naming.blocks:
        match = pattern_of(block + ".{part}").fullmatch(name)
        if match is None:
            continue
        part, block_path = match["part"], name.removesuffix(f".{match['part']}")
        for role, named in _rules(naming, part):
            return Entry(
                layer=int(match["layer"]), part=part, role=role, named=named, prefix=match["prefix"], block=block_path
            )
        if any(fnmatchcase(part, pattern) for pattern in naming.whole):
            return Entry()
        if not SUSPICIOUS.search(part):
            return Entry(loose_in=block_path)
    if any(fnmatchcase(name, pattern) for pattern in naming.outside) or not SUSPICIOUS.search(name):
        return Entry()
    return None


def _rules(naming: Naming, part: str) -> Iterable[tuple[Role, NamedAxis]]:
    if part in naming.routers:
        yield "router", naming.routers[part]
    if part in naming.experts:
        yield "expert", naming.experts[part]
    if part in naming.counters:
        yield "counter", NamedAxis()


PLACEHOLDERS = {
    "prefix": r"(?P<prefix>(?:[^.]+\.)*)",
    "layer": r"(?P<layer>\d+)",
    "part": r"(?P<part>.+)",
    "name": r"(?P<name>.+)",
    "key": r"(?P<key>[^.]+)",
}


@functools.cache
def pattern_of(template: str) -> re.Pattern[str]:
    """A template as a regular expression with a group for each placeholder.

    Raises:
        SecateurError: a placeholder that is not one of PLACEHOLDERS.
    """
    parts = re.split(r"\{(\w+)\}", template)
    unknown = set(parts[1::2]) - PLACEHOLDERS.keys()
    if unknown:
        raise SecateurError(f"names: {template!r} has {sorted(unknown)}, expected of {sorted(PLACEHOLDERS)}")
    found = [PLACEHOLDERS[part] if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    if "{prefix}" not in template:
        found.insert(0, "(?P<prefix>)" if "{layer}" in template else "")
    return re.compile("".join(found))


def find_naming(names: Iterable[str]) -> Naming | None:
    """The one row of NAMINGS that finds experts among the names; None where none does and none should.

    Raises:
        SecateurError: several rows do, or none although some names sound like experts or routers.
    """
    names = list(names)
    found = [naming for naming in NAMINGS.values() if _finds_experts(naming, names)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SecateurError(f"the names fit {[naming.name for naming in found]}; say which with --names")
    suspicious = [name for name in names if SUSPICIOUS.search(name)]
    if suspicious:
        raise SecateurError(
            f"the names fit none of {', '.join(NAMINGS)}; what sounds like experts or routers: {suspicious[:5]}. "
            "Describe them in a file and give it to --names (docs/engines.md)"
        )
    return None


def _finds_experts(naming: Naming, names: list[str]) -> bool:
    entries = (understand(naming, name) for name in names)
    return any(entry is not None and entry.role == "expert" for entry in entries)
