"""From a source and what was asked for to a plan, for all that the table of criteria and LAEP's rule offer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.criteria import CRITERIA
from secateur.criteria.score import find_criterion
from secateur.decide.by_score import plan_by_criterion
from secateur.decide.keep import Keep
from secateur.decide.rule import Rule, decide
from secateur.decide.rules import OPTIONS, RuleOptions, flags_in_words, given
from secateur.errors import SecateurError
from secateur.files.given import check_least
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.measure.router_change import router_changes
from secateur.model_folder.measure.weights import weight_stats
from secateur.model_folder.read.facts import facts_for_zero_slots
from secateur.model_folder.rewrite.zero_slots import check_no_zero_slots
from secateur.model_folder.source import Source
from secateur.plans import JSON, REMOVED, REROUTE, ZERO_SLOT, Plan
from secateur.stats import DEFAULT_SUMS

LAEP = "laep"  # a rule, not a score: it also decides how many experts go
ANY_SCORES = "random"  # stands in for a criterion whose scores are not known yet


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for.

    Args:
        criterion: a name in CRITERIA with `keep`, or LAEP with `rule`. allocation, seed, protect: see
            `plan_by_criterion`; LAEP knows "uniform" (one count for all layers) and "laep".
        multiple_of: every layer's new count is a multiple of it. min_experts: and not below this.
        removed: see `Plan`.

    Raises:
        SecateurError: a number of experts where the rule decides it, or the other way round; an unknown meaning.
    """

    criterion: str
    keep: Keep | None = None
    rule: Rule | None = None
    allocation: str = "uniform"
    multiple_of: int = 1
    min_experts: int = 1
    seed: int = 0
    protect: bool | None = None
    removed: str | None = None

    def __post_init__(self) -> None:
        if self.removed not in (None, *REMOVED):
            raise SecateurError(f"--removed {self.removed}: expected {' or '.join(REMOVED)}")
        if self.criterion == LAEP:
            if self.rule is None or self.keep is not None:
                raise SecateurError(
                    f"criterion 'laep' decides how many experts go: expected {flags_in_words()}, and no --keep"
                )
            if self.allocation not in ("uniform", LAEP) or self.protect:
                raise SecateurError(
                    "criterion 'laep': expected --allocation uniform or laep, and no --protect, which it does not know"
                )
            return
        if self.criterion not in CRITERIA:
            raise SecateurError(f"criterion is {self.criterion!r}, expected one of {', '.join((*CRITERIA, LAEP))}")
        if self.rule is not None:
            raise SecateurError(
                f"{', '.join(option.flag for option in OPTIONS.values())} are for criterion 'laep', found "
                f"{self.criterion!r}"
            )
        if self.keep is None:
            raise SecateurError(f"criterion {self.criterion!r}: --keep says how many experts stay; it is missing")

    @property
    def needs_data(self) -> bool:
        """Whether the criterion, the allocation or the protection asks for statistics of the model on data."""
        by_criterion = self.criterion == LAEP or find_criterion(self.criterion).needs_data
        return by_criterion or self.allocation == LAEP or bool(self.protect)

    @property
    def sums(self) -> tuple[str, ...]:
        """The sums that the criterion reads."""
        return () if self.criterion == LAEP else find_criterion(self.criterion).sums


def choice_of(
    criterion: str,
    *,
    keep: str | float | None,
    rule: RuleOptions,
    allocation: str,
    ep: int,
    min_experts: int,
    seed: int,
    protect: bool | None,
    removed: str | None,
) -> Choice:
    """What the options of `plan` and `prune` say.

    Raises:
        SecateurError: a value out of its range, or options that contradict each other.
    """
    check_least(1, ep=ep, min_experts=min_experts)
    check_least(0, seed=seed)
    return Choice(
        criterion=criterion,
        keep=None if keep is None else Keep.parse(str(keep)),
        rule=Rule(**rule) if given(rule) else None,
        allocation=allocation,
        multiple_of=ep,
        min_experts=min_experts,
        seed=seed,
        protect=protect,
        removed=removed,
    )


def decide_plan(source: Source, choice: Choice, *, on_bytes: OnProgress = silent) -> Plan:
    """The plan that `choice` makes of `source`.

    Args:
        on_bytes: called with (bytes read, bytes to read) while weights are read.

    Returns:
        See `plan_by_criterion` and `secateur.decide.rule.decide`; its details also hold "model" (model type and digest,
        by which `apply` knows the model again), "data" (what the statistics were taken on, where they are) and
        "rerouted_share" (of the routed tokens, those whose expert goes; null without statistics).

    Raises:
        SecateurError: what is needed is not there, or the model cannot keep so few experts.
    """
    source = _for_removal(source, choice)
    if source.stats is None and choice.needs_data:
        raise SecateurError(
            f"{who_needs_data(choice)} needs statistics of the model on data; make them with `secateur observe"
            f"{''.join(f' --sums {name}' for name in choice.sums if name not in DEFAULT_SUMS)}`"
        )
    _check_allocation(source, choice)
    _check_pretrained(source, choice)
    facts = source.facts
    limits = facts.limits(multiple_of=choice.multiple_of, min_experts=choice.min_experts)
    if choice.rule is not None:
        assert source.stats is not None
        rule = dataclasses.replace(choice.rule, uniform=choice.allocation == "uniform")
        sizes = facts.bytes_per_expert
        total = source.sizes.total_bytes
        plan = decide(source.stats, limits, rule, params_per_expert=sizes, total_params=total)
    else:
        assert choice.keep is not None
        plan = plan_by_criterion(
            choice.criterion,
            choice.keep,
            limits,
            stats=source.stats,
            weights=_weights(source, choice, on_bytes),
            sizes=source.sizes,
            allocation=choice.allocation,
            seed=choice.seed,
            protect=choice.protect,
        )
    _check_one_count(source, plan)
    _check_multiple(choice, plan)
    return dataclasses.replace(plan, details=plan.details | _origin(source, plan), removed=choice.removed)


def check_choice(source: Source, choice: Choice) -> Plan | None:
    """Refuse before a long pass over data what would be refused after it.

    Returns:
        A plan with the counts that the choice leads to where data do not decide those, and with the wrong experts;
        None where data decide the counts as well.

    Raises:
        SecateurError: no model of this kind can keep so few or so many experts.
    """
    source = _for_removal(source, choice)
    _check_allocation(source, choice)
    _check_pretrained(source, choice)
    limits = source.facts.limits(multiple_of=choice.multiple_of, min_experts=choice.min_experts)
    if choice.keep is None:
        return None
    uniform = choice.allocation == "uniform"
    plan = plan_by_criterion(
        ANY_SCORES, choice.keep, limits, sizes=source.sizes, allocation="uniform" if uniform else "global"
    )
    plan = dataclasses.replace(plan, removed=choice.removed)
    if uniform:
        _check_one_count(source, plan)
        _check_multiple(choice, plan)
    return plan if uniform else None


def outcome(source: Source, plan: Plan) -> dict[str, Any]:
    """What a plan does to the model, in numbers: JSON. Of zero slots without the folder of the model at hand, the bytes
    that go include the rows of routers, which stay.
    """
    facts, layers = source.facts, plan.layers
    if plan.leaves_zero_slots:
        facts = facts_for_zero_slots(facts, source.found)
    gone = {layer: layer_plan.gone for layer, layer_plan in layers.items()}
    saved = sum(len(ids) * facts.bytes_per_expert[layer] for layer, ids in gone.items())
    never: Mapping[int, list[int]] = {}
    if source.stats is not None:
        loads = source.stats.loads()
        never = {
            layer: [expert for expert, load in enumerate(layer_loads) if not load]
            for layer, layer_loads in loads.items()
        }
    return {
        "criterion": plan.criterion,
        "removed": plan.removed or REROUTE,
        "model_type": facts.model_type,
        "layers": {
            str(layer): {"experts_before": layer_plan.experts_before, "experts_after": layer_plan.experts_after}
            for layer, layer_plan in layers.items()
        },
        "experts_before": sum(layer_plan.experts_before for layer_plan in layers.values()),
        "experts_after": sum(layer_plan.experts_after for layer_plan in layers.values()),
        "bytes_before": facts.total_bytes,
        "bytes_after": facts.total_bytes - source.left_out_bytes - saved,
        "rerouted_share": plan.details.get("rerouted_share"),
        "super_experts": plan.details.get("super_experts"),
        "never_routed": sum(map(len, never.values())) if source.stats is not None else None,
        "never_routed_dropped": sum(len(set(never[layer]) & set(gone[layer])) for layer in never)
        if source.stats is not None
        else None,
    }


def who_needs_data(choice: Choice) -> str:
    """What asks for statistics, for messages."""
    if choice.criterion == LAEP or find_criterion(choice.criterion).needs_data:
        return f"criterion {choice.criterion!r}"
    return "--allocation laep" if choice.allocation == LAEP else "--protect"


def _for_removal(source: Source, choice: Choice) -> Source:
    """The source with what limits a plan in the meaning that was asked for."""
    found = source.found
    if choice.removed != ZERO_SLOT:
        if found is not None:
            check_no_zero_slots(found, f"rows of these cannot be cut; say --removed {ZERO_SLOT}")
        return source
    asks_for_bytes = choice.rule.target_params if choice.rule is not None else choice.keep and choice.keep.num_bytes
    if found is None and asks_for_bytes is not None:
        raise SecateurError(
            f"--removed {ZERO_SLOT}: rows of routers stay, and the statistics do not say how many bytes they are; name "
            "the folder of the model with --model"
        )
    return dataclasses.replace(source, facts=facts_for_zero_slots(source.facts, found))


def _weights(source: Source, choice: Choice, on_bytes: OnProgress) -> Any:
    needs = find_criterion(choice.criterion).needs
    if isinstance(needs, tuple) or needs == "nothing":
        return None
    for found in (source.found, source.pretrained):
        if found is not None and needs.startswith("router"):
            check_no_zero_slots(found, f"criterion {choice.criterion!r} does not tell their rows apart; take another")
    if needs == "router change":
        return _router_changes(source, choice)
    if source.found is None:
        raise SecateurError(f"criterion {choice.criterion!r} reads {needs}: name the folder of the model with --model")
    weights = weight_stats(source.found, needs, layers=source.facts.num_experts, on_bytes=on_bytes)
    source.found.files.check_unchanged(read=source.found.files.model_files)
    return weights


def _check_pretrained(source: Source, choice: Choice) -> None:
    if source.pretrained is not None and (choice.rule or find_criterion(choice.criterion).needs != "router change"):
        raise SecateurError(f"--pretrained: criterion {choice.criterion!r} does not compare two models; leave it out")


def _router_changes(source: Source, choice: Choice) -> Any:
    if source.pretrained is None or source.finetuned is None:
        raise SecateurError(
            f"criterion {choice.criterion!r} compares a fine-tuned model with the one it was made from: give the "
            "folder of the former, and name the latter with --pretrained"
        )
    changes = router_changes(source.found or source.finetuned, source.pretrained)
    for found in (source.found, source.pretrained):
        if found is not None:
            found.files.check_unchanged(read=found.files.model_files)
    return changes


def _origin(source: Source, plan: Plan) -> dict[str, JSON]:
    more: dict[str, JSON] = {"model": {"model_type": source.facts.model_type, "digest": source.facts.digest}}
    if source.stats is None:
        return more | {"rerouted_share": None}
    loads = source.stats.loads()
    rerouted = sum(loads[layer][expert] for layer, layer_plan in plan.layers.items() for expert in layer_plan.gone)
    return more | {"data": dict(source.data), "rerouted_share": rerouted / sum(map(sum, loads.values()))}


def _check_allocation(source: Source, choice: Choice) -> None:
    if choice.allocation != "uniform" and source.facts.has_one_count:
        raise SecateurError(
            f"--allocation {choice.allocation}: the experts are in the text model inside a "
            f"{source.facts.model_type!r}, which can only have one count for all layers; expected uniform"
        )


def _check_multiple(choice: Choice, plan: Plan) -> None:
    for layer, layer_plan in plan.layers.items():
        if layer_plan.experts_after % choice.multiple_of:
            raise SecateurError(
                f"layer {layer} would keep {layer_plan.experts_after} of {layer_plan.experts_before} experts, "
                f"expected a multiple of {choice.multiple_of} (--ep)"
            )


def _check_one_count(source: Source, plan: Plan) -> None:
    counts = {layer: layer_plan.experts_after for layer, layer_plan in plan.layers.items()}
    if source.facts.has_one_count and len(set(counts.values())) > 1:
        raise SecateurError(
            f"keep: layers would have {counts} experts, but those of a {source.facts.model_type!r} are in the text "
            "model inside it, which can only have one count for all layers"
        )
