"""The whole configuration of a pre-training run, as one value that is saved with the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from secateur.decide.rule import Rule
from secateur.decide.rules import OPTIONS, RuleFields
from secateur.errors import SecateurError
from secateur.files.records import as_record
from secateur.pretraining.settings import (
    BalanceSettings,
    DataSettings,
    DeviceSettings,
    ModelSettings,
    PruningSettings,
    RecordSettings,
    RunSettings,
    TrainingSettings,
)
from secateur.train.parts import part_of
from secateur.train.phases import PhaseConstants
from secateur.train.rearrange import Rearrangement
from secateur.train.schedule import Pruning, as_prunings

TIMES = ("stable", "step", "tokens")
PRUNE_WHAT_AND_WHEN = ("prune", *OPTIONS, "prune_at_step", "prune_at_tokens")
PRECISIONS = ("fp32", "bf16", "fp16")
# how a run is spread over processes: a resumed run may have other values
DEVICES = ("fsdp", "ep", "tp")
REARRANGE = ("rearrange_ranks", "rearrange_every", "rearrange_method", "rearrange_nodes", "rearrange_tolerance")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RuleFields):
    """Every setting of `secateur pretrain`; the command line has one option for each, with the same default.

    Those of a pruning rule come from `secateur.decide.rules`.

    Raises:
        SecateurError: a value out of its range, or options that contradict one another.
    """

    # model: exactly one of preset, config, model
    preset: str | None = None
    config: str | None = None
    model: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    # data
    data: tuple[str, ...] = ()
    text_key: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    sequence_length: int = 256
    validation_share: float = 0.02
    max_data_bytes: int | None = None
    # training
    steps: int = 600
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    schedule: str = "cosine"
    weight_decay: float = 0.1
    optimizer: str = "adamw_torch"
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 0
    threads: int | None = None
    # devices: fsdp None is all processes that tp leaves
    fsdp: int | None = None
    ep: int = 1
    tp: int = 1
    # balance
    balance: str = "none"
    balance_strength: float | None = None
    # pruning
    no_prune: bool = False
    prune: tuple[str, ...] = ()
    uniform: bool = False
    prune_at_step: int | None = None
    prune_at_tokens: int | None = None
    multiple_of: int = 1
    min_experts: int = 1
    max_experts: int | None = None
    no_rearrange: bool = False
    rearrange_ranks: int | None = None
    rearrange_every: int | None = None
    rearrange_method: str = "swaps"
    rearrange_nodes: int = 1
    rearrange_tolerance: float | None = None
    window_steps: int = 20
    max_regret: float = 0.025
    max_noise: float = 0.005
    min_change: float | None = None
    min_windows: int = 16
    # record
    log_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 200
    report_to: str = "none"
    control: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("preset", "config", "model") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SecateurError(f"give one of --preset, --config and --model, found {', '.join(given)}")
        if not given:
            object.__setattr__(self, "preset", "qwen3_moe")
        if self.model and self.overrides:
            raise SecateurError("--set changes a config before a model is made of it; --model is already made")
        positive = (
            "steps",
            "batch_size",
            "accumulation",
            "log_steps",
            "eval_steps",
            "save_steps",
            "vocab_size",
            "ep",
            "tp",
            "multiple_of",
            "min_experts",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise SecateurError(f"{option(name)} is {getattr(self, name)}, expected at least 1")
        if self.sequence_length < 2:
            raise SecateurError(f"--sequence-length is {self.sequence_length}, expected at least 2")
        for name in ("max_data_bytes", "threads", "fsdp", "max_experts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SecateurError(f"{option(name)} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "validation_share"):
            high = 1.0 if name == "validation_share" else math.inf
            if not 0 < getattr(self, name) < high:
                raise SecateurError(f"{option(name)} is {getattr(self, name)}, expected above 0 and below {high}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SecateurError(f"{option(name)} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"--seed is {self.seed}, expected from 0 to {2**32 - 1}")
        if self.precision not in PRECISIONS:
            raise SecateurError(f"--precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        for name in ("eval_steps", "save_steps"):
            if getattr(self, name) % self.log_steps:
                raise SecateurError(
                    f"{option(name)} is {getattr(self, name)}, expected a multiple of --log-steps "
                    f"({self.log_steps}): a logged loss is a mean since the last log and must not span a restart"
                )
        _ = self.settings  # refuses what cannot be parsed

    @functools.cached_property
    def settings(self) -> RunSettings:
        """These options parsed and in parts, which is what a run is given; made once, when the options are."""
        return RunSettings(
            model=part_of(ModelSettings, self),
            data=part_of(DataSettings, self),
            training=part_of(TrainingSettings, self),
            devices=part_of(DeviceSettings, self),
            balance=BalanceSettings(kind=self.balance, arguments=self.balance_arguments()),
            pruning=PruningSettings(
                prunings=self.prunings(),
                window_steps=self.window_steps,
                phase=self.phase(),
                rearrange=self.rearrangement(),
            ),
            record=RecordSettings(
                options=self.to_json(),
                log_steps=self.log_steps,
                eval_steps=self.eval_steps,
                save_steps=self.save_steps,
                report_to=self.report_to,
            ),
            control=self.without_pruning().settings if self.control else None,
        )

    def prunings(self) -> tuple[Pruning, ...]:
        """The schedule; empty with --no-prune."""
        single: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS}
        if self.no_prune:
            given = [name for name in PRUNE_WHAT_AND_WHEN if getattr(self, name) not in (None, ())]
            if given:
                raise SecateurError(f"--no-prune contradicts {', '.join(map(option, given))}")
            return ()
        shared = {name: getattr(self, name) for name in ("multiple_of", "min_experts", "max_experts")}
        if self.prune:
            if any(value is not None for value in (*single.values(), self.prune_at_step, self.prune_at_tokens)):
                raise SecateurError("--prune is a whole schedule: put thresholds, goals and times into it")
            return as_prunings([parse_pruning(text, uniform=self.uniform, **shared) for text in self.prune])
        return as_prunings(
            None,
            at_step=self.prune_at_step,
            at_tokens=self.prune_at_tokens,
            uniform=self.uniform,
            **single,
            **shared,
        )

    def rearrangement(self) -> Rearrangement | bool | None:
        """How LAEP places experts on ranks; None is its own default."""
        given = {name: getattr(self, name) for name in REARRANGE if getattr(self, name) != _DEFAULTS[name]}
        if self.no_rearrange:
            if given:
                raise SecateurError(f"--no-rearrange contradicts {', '.join(map(option, given))}")
            return False
        if not given:
            return None
        return Rearrangement(**{name.removeprefix("rearrange_"): value for name, value in given.items()})

    def without_pruning(self) -> PretrainOptions:
        """The settings of the control run."""
        nothing: dict[str, Any] = dict.fromkeys(PRUNE_WHAT_AND_WHEN) | {"prune": (), "no_prune": True, "control": False}
        return replace(self, **nothing)

    def balance_arguments(self) -> dict[str, float]:
        """The strength for `attach_balance`, under the name that the kind has for it."""
        if self.balance_strength is None:
            return {}
        return {"update_rate" if self.balance == "bias" else "coefficient": self.balance_strength}

    def phase(self) -> PhaseConstants:
        """What counts as stable. The loads of a model that was trained before need not leave their start."""
        given = (
            {"min_change": self.min_change}
            if self.min_change is not None
            else {"min_change": 0.0}
            if self.model
            else {}
        )
        return PhaseConstants(
            max_regret=self.max_regret, max_noise=self.max_noise, min_windows=self.min_windows, **given
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form; an option of a rule that is infinite, such as alpha, is the string "inf"."""
        values = {**asdict(self), "data": list(self.data), "prune": list(self.prune), "overrides": dict(self.overrides)}
        rule = {name: values.pop(name) for name in OPTIONS}
        return values | {name: "inf" if value == math.inf else value for name, value in rule.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PretrainOptions:
        """The inverse of `to_json`.

        Raises:
            SecateurError: the settings are not those of this release.
        """
        known = {option.name for option in fields(cls)}
        if set(data) != known:
            raise SecateurError(
                f"the saved configuration is not of this release: unknown settings {sorted(set(data) - known)}, "
                f"missing settings {sorted(known - set(data))}"
            )
        infinite = {name: math.inf for name in OPTIONS if data[name] == "inf"}
        return as_record({**data, **infinite}, cls, "the saved configuration")


_DEFAULTS = {option.name: option.default for option in fields(PretrainOptions)}


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--set" if name == "overrides" else f"--{name.replace('_', '-')}"


def parse_pruning(text: str, **shared: Any) -> Pruning:
    """One entry of a schedule, e.g. "stable alpha=0.2 beta=0.1" or "step=400 target_params=0.6".

    Raises:
        SecateurError: the words are not a time followed by name=value pairs.
    """
    expected = (
        f"expected a time (stable, step=N or tokens=N) and a rule ({', '.join(OPTIONS)}), "
        "e.g. 'stable alpha=0.4 beta=0.1'"
    )
    given: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        name, sign, value = word.partition("=")
        if (name not in TIMES and name not in OPTIONS) or bool(sign) == (name == "stable"):
            raise SecateurError(f"--prune {text!r}: unknown word {word!r}; {expected}")
        if name in given:
            raise SecateurError(f"--prune {text!r}: {name} twice; {expected}")
        given[name] = value
    if len(given.keys() & set(TIMES)) != 1 or not given.keys() & OPTIONS.keys():
        raise SecateurError(f"--prune {text!r}: {expected}")
    try:
        when = {f"at_{name}": int(value) for name, value in given.items() if name in ("step", "tokens")}
        rule: dict[str, Any] = {name: OPTIONS[name].parse(value) for name, value in given.items() if name in OPTIONS}
    except ValueError as error:
        raise SecateurError(f"--prune {text!r}: {error}; {expected}") from error
    uniform = shared.pop("uniform", False)
    return Pruning(rule=Rule(uniform=uniform, **rule), **when, **shared)
