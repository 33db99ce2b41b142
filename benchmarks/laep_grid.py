"""Which training runs the evidence for LAEP is made of: tables, and no code that runs anything.

A setting is trained once for each seed. All settings of one seed see the same tokens in the same order and start from
the same weights, as far as their models are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

# The defaults of `pretrain`. The stored runs had the detector of a release before, with looser constants.
DETECTOR: tuple[str, ...] = ()
AUXILIARY = ("1e-4", "1e-3", "1e-2")
BETAS = ("0.05", "0.1", "0.2")
ALPHAS = ("0.2", "0.4", "0.6")
TARGETS = ("0.85", "0.75", "0.67", "0.5")
DETECTED = "when: at the detector's step"
SMALL = "as small as target 0.75, uniform, from the start"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run is: fields of the model, options of `pretrain`, and what differs between groups."""

    model: dict[str, int]
    options: tuple[str, ...]
    steps: int
    long_steps: int  # so long that four times the detector's step is still inside
    other_steps: tuple[int, ...]
    fixed_step: int  # where no detector decides
    widths: tuple[int, ...]
    experts: tuple[int, ...]
    between: int  # steps between the parts of a pruning in parts
    experts_left: int  # of each layer, where 0.75 of the parameters are left


SCALES = {
    "small": Scale(
        model={"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16},
        options=("--sequence-length", "128", "--vocab-size", "2048", "--max-data-bytes", "8000000", "--threads", "1"),
        steps=1200,
        long_steps=1600,
        other_steps=(1450, 1750),
        fixed_step=400,
        widths=(48, 64, 96),
        experts=(16, 64, 128),
        between=40,
        experts_left=11,
    ),
    # for a GPU
    "large": Scale(
        model={"hidden_size": 512, "moe_intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 8},
        options=("--sequence-length", "512", "--vocab-size", "8192", "--batch-size", "32", "--precision", "bf16"),
        steps=3000,
        long_steps=4000,
        other_steps=(3600, 4400),
        fixed_step=800,
        widths=(256, 512, 768),
        experts=(16, 64, 128),
        between=100,
        experts_left=11,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: its group, its name, and what `pretrain` is given beside data, seed and the scale's options.

    after: a setting of the same seed that this one follows. In `options`, `{N}` is then N times the step of its first
        pruning, `{N+M}` with M steps more, and `{part K of N}` the share of the parameters that part K leaves of what
        it finds, so that all N remove as many experts as it did, as evenly as whole experts allow.
    random: which experts go is drawn, in the numbers the rule says.
    """

    group: str
    name: str
    base: str
    options: tuple[str, ...] = ("--no-prune",)
    preset: str = "qwen3_moe"
    model: tuple[tuple[str, int], ...] = ()
    steps: int = 0
    after: str | None = None
    random: bool = False

    def folder(self, seed: int) -> str:
        """The name of a run's folder."""
        return f"{re.sub(r'[^a-z0-9.]+', '-', self.name.lower())}-seed{seed}"

    def told(self) -> dict[str, Any]:
        """What its runs are known by, as it comes back from a JSON file."""
        names = ("preset", "model", "options", "steps", "after", "random")
        found: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}))
        return found


def grid(scale: Scale) -> list[Setting]:
    """All settings, those first that others are compared with."""
    found = [*_table_1(), *_table_2(), *_when(scale), *_automatic(scale), *_scaling(scale)]
    return [replace(one, steps=one.steps or scale.steps, model=_model(one, scale)) for one in found]


def _model(one: Setting, scale: Scale) -> tuple[tuple[str, int], ...]:
    fields = {"hidden_size": scale.model["hidden_size"], **FIELDS[one.preset](scale.model), **dict(one.model)}
    fields |= {name: value for name, value in scale.model.items() if name == "num_hidden_layers"}
    return tuple(sorted(fields.items()))


# preset -> what the scale's model is in the words of its family
FIELDS = {
    "qwen3_moe": lambda model: {
        "moe_intermediate_size": model["moe_intermediate_size"],
        "head_dim": model["head_dim"],
    },
    "mixtral": lambda model: {"intermediate_size": model["moe_intermediate_size"], "sliding_window": 32},
    "deepseek_v3": lambda model: {
        "moe_intermediate_size": model["moe_intermediate_size"],
        "intermediate_size": 2 * model["moe_intermediate_size"],
        "q_lora_rank": model["hidden_size"] // 2,
        "kv_lora_rank": model["hidden_size"] // 2,
        "v_head_dim": model["head_dim"],
    },
}
ATTENTION = {"qwen3_moe": "grouped-query", "deepseek_v3": "latent", "mixtral": "sliding window"}


def _table_1() -> Iterator[Setting]:
    base = "base, grouped-query"
    yield Setting(group="table 1", name=base, base=base)
    # what a change without a meaning does: the runs part after some steps, and the difference is chance
    options = ("--no-prune", "--learning-rate", "0.00201")
    yield Setting(group="table 1", name="base, learning rate 0.5 % higher", base=base, options=options)
    for kind in ("deepseek_v3", "mixtral"):
        for strength in AUXILIARY:
            options = ("--no-prune", "--balance", kind, "--balance-strength", strength)
            yield Setting(group="table 1", name=f"{kind} loss {strength}", base=base, options=options)
    for beta in BETAS:
        yield Setting(group="table 1", name=f"LAEP beta {beta}", base=base, options=("--beta", beta, *DETECTOR))
    # only routers with a selection bias can be balanced by it: latent attention's family, against its own base
    options = ("--no-prune", "--balance", "bias")
    yield Setting(group="table 1", name="bias, latent", base="base, latent", options=options, preset="deepseek_v3")


def _table_2() -> Iterator[Setting]:
    for preset, attention in ATTENTION.items():
        base = f"base, {attention}"
        if preset != "qwen3_moe":
            yield Setting(group="table 2", name=base, base=base, preset=preset)
        rules = {f"alpha {alpha}": ("--alpha", alpha) for alpha in ALPHAS}
        rules["alpha 0.2 then 0.4"] = ("--prune", "stable alpha=0.2", "--prune", "stable alpha=0.4")
        for name, rule in rules.items():
            options = (*rule, *DETECTOR)
            yield Setting(group="table 2", name=f"LAEP {name}, {attention}", base=base, options=options, preset=preset)


def _when(scale: Scale) -> Iterator[Setting]:
    base, steps = "when: base", scale.long_steps
    yield Setting(group="when", name=base, base=base, steps=steps)
    for number in scale.other_steps:  # with a schedule of their own, to compare at equal time
        yield Setting(group="when", name=f"{base}, {number} steps", base=base, steps=number)
    yield Setting(group="when", name=DETECTED, base=base, options=("--target-params", "0.75", *DETECTOR), steps=steps)
    for factor, words in ((0.5, "half"), (2, "twice"), (4, "four times")):
        options = ("--target-params", "0.75", "--prune-at-step", f"{{{factor}}}")
        yield Setting(
            group="when", name=f"when: at {words} that step", base=base, options=options, steps=steps, after=DETECTED
        )
    for parts in (2, 4, 8):
        options = ()
        for part in range(parts):
            options += ("--prune", f"step={{1+{part * scale.between}}} target_params={{part {part} of {parts}}}")
        name = f"when: in {parts} parts, {scale.between} steps apart"
        yield Setting(group="when", name=name, base=base, options=options, steps=steps, after=DETECTED)


def _automatic(scale: Scale) -> Iterator[Setting]:
    base = "base, grouped-query"
    for target in TARGETS:
        options = ("--target-params", target, *DETECTOR)
        words = f"target {target}"
        yield Setting(group="automatic", name=f"{words}, global", base=base, options=options)
        yield Setting(group="automatic", name=f"{words}, uniform", base=base, options=(*options, "--uniform"))
        yield Setting(group="automatic", name=f"{words}, random experts", base=base, options=options, random=True)
    yield Setting(group="automatic", name=SMALL, base=base, model=(("num_experts", scale.experts_left),))


def _scaling(scale: Scale) -> Iterator[Setting]:
    for width in scale.widths:
        for experts in scale.experts:
            fields = {"hidden_size": width, "moe_intermediate_size": width, "head_dim": width // 4}
            model = tuple({**fields, "num_experts": experts}.items())
            base = f"width {width}, {experts} experts"
            yield Setting(group="scaling", name=base, base=base, model=model)
            options = ("--target-params", "0.75", "--prune-at-step", str(scale.fixed_step))
            yield Setting(group="scaling", name=f"{base}, LAEP", base=base, model=model, options=options)
