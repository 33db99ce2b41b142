"""LAEP in a training loop (arXiv 2601.14327): count loads, wait until they are stable, prune, go on.

In a plain loop:

    pruner = LAEP(model, optimizer, target_params=0.67)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        event = pruner.step()   # a PruneEvent at the step that prunes, else None
        optimizer.zero_grad()
    pruner.finish()   # says what would have been dropped, if the loads never were stable

`pruner.follow(scheduler, num_steps)` before the loop tells it the learning rates ahead. The same works under torchrun,
on every rank, with a model that transformers sharded (`distributed_config`: FSDP2, EP, TP), that `fully_shard` sharded,
or that DistributedDataParallel wraps (give LAEP the model inside).
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn

from secateur.decide.rule import decide
from secateur.decide.rules import RuleOptions, spelled_out, with_options_listed
from secateur.errors import SecateurError
from secateur.expert_axis import is_sharded
from secateur.families import MoEModel, describe_moe, tensor_at, without_adapters
from secateur.files.records import as_record
from secateur.observation.loads import CountMask
from secateur.plans import Plan
from secateur.stats import RouterStats
from secateur.surgery.copies import Copy, copies_of
from secateur.surgery.events import REARRANGE, Memory, PruneEvent, layer_events
from secateur.surgery.fits import check_copies
from secateur.surgery.module import check_model, check_not_compiled, check_plan, router_tensors
from secateur.surgery.optimizer import Optimizers, check_optimizer, each_of, optimizer_state_bytes
from secateur.surgery.self_check import CLOSE, expected_of, layer_excess, logit_difference
from secateur.surgery.trained_by import TrainedBy
from secateur.train.distributed.fsdp import reshard_
from secateur.train.distributed.job import Job
from secateur.train.distributed.launch import is_main
from secateur.train.laep_state import STATE_VERSION, LAEPState, check_state
from secateur.train.numbers import PREFIX, load_numbers
from secateur.train.phases import NUMBERS as REPORTED
from secateur.train.phases import PHASES, PhaseConstants, PhaseReport, in_words
from secateur.train.rates import read_schedule
from secateur.train.rearrange import Rearrangement, nothing_dropped, rearranged, settled
from secateur.train.schedule import Pruning, as_prunings, check_count, check_goal
from secateur.train.unpruned import Unpruned
from secateur.train.watch import LoadWatch

MAX_WAITS = 1000  # micro-batches of one step; more are a mistake
DOUBTFUL = 0.01  # of the tokens: less may be words that happen to be the pad id

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LAEP]] = weakref.WeakKeyDictionary()


def watcher_of(model: nn.Module) -> LAEP | None:
    """The `LAEP` that has hooks on a model."""
    found = _watched.get(model)
    return None if found is None else found()


@with_options_listed
class LAEP:
    """Prunes the experts of a model while it trains.

    Args:
        model: a transformers MoE model, not wrapped (a PeftModel is seen through).
        optimizer: the one that trains it, or all of them.
        copies: what follows every pruning by its plan: models of the same kind, such as an EMA or a reference model,
            and tensors that a script keeps of the parameters, in a dict by their names or in a list in their order.
        prunings: a schedule (an empty one only watches the loads); or give one `Pruning` by its fields and those of its
            rule: `at_step` or `at_tokens` for a fixed time, `multiple_of`, `min_experts`, `max_experts`; `uniform` and
            the options of one `Rule`, such as alpha and beta. Default: DEFAULT_RULE of `secateur.decide.rules`, a share
            of the parameters, at the stable phase.
        window_steps: optimizer steps a statistics window.
        phase: what counts as stable. Nothing does while the learning rate rises: it is read ahead from a scheduler that
            `follow` was given, else watched in the optimizer.
        warmup_steps: nothing is stable before so many steps, for a warm-up that neither of them shows.
        on_message: called with a line for people, such as what would have been dropped when `detach` ends a run whose
            loads never were stable. Default: a warning of the logger "secateur".
        self_check: at every pruning, compare the pruned model with the barred-experts oracle on one training
            sequence of every rank (two forward passes).
        count_mask: tells which tokens of a forward count as load, where masks and labels do not: called with its
            arguments by name (input_ids, attention_mask, labels ...), it returns (B, S), 0 for those that do not.
        rearrange: how the kept experts are placed on the expert-parallel ranks. Default: level them over the ranks of
            the job, if it has expert parallelism; False keeps their order.
        moe: `describe_moe(model)`, of a caller who has it already.

    Raises:
        SecateurError: the model, the optimizer, the schedule or the way the job was started is not supported. Nothing
            has been changed then.
        TypeError: an option that no rule has.
    """

    @spelled_out
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        copies: Iterable[Copy] = (),
        prunings: Iterable[Pruning] | None = None,
        at_step: int | None = None,
        at_tokens: int | None = None,
        multiple_of: int = 1,
        min_experts: int = 1,
        max_experts: int | None = None,
        uniform: bool = False,
        window_steps: int = 20,
        phase: PhaseConstants | None = None,
        warmup_steps: int = 0,
        self_check: bool = True,
        rearrange: Rearrangement | bool | None = None,
        on_message: Callable[[str], None] | None = None,
        count_mask: CountMask | None = None,
        moe: MoEModel | None = None,
        **rule: Unpack[RuleOptions],
    ) -> None:
        check_count("window_steps", window_steps)
        if warmup_steps:
            check_count("warmup_steps", warmup_steps)
        self.prunings = as_prunings(
            prunings,
            at_step=at_step,
            at_tokens=at_tokens,
            multiple_of=multiple_of,
            min_experts=min_experts,
            max_experts=max_experts,
            uniform=uniform,
            **rule,
        )
        self.window_steps = window_steps
        self.self_check = self_check
        callers, model = [model], without_adapters(model)
        if moe is not None and moe.model is not model:
            raise SecateurError("moe: found the description of another model, expected that of `model`")
        self.moe: MoEModel = moe or describe_moe(model)
        if watcher_of(model) is not None:
            raise SecateurError(
                "the model is watched by another LAEP already: expected one a model; end that one by its finish() or "
                "detach() (of a callback: callback.pruner.detach())"
            )
        if self.prunings or rearrange:
            check_model(self.moe)
        else:
            check_not_compiled(model)
        self._job = Job(self.moe)
        self._trained_by = TrainedBy(self.moe, each_of(optimizer))
        try:
            self._rearrange = settled(rearrange, self._job.ranks.ep_size, self.moe.counts)
            self._copies, self._kept = copies_of(self.moe, copies)
            if self._kept and self._job.ranks.sharded:
                raise SecateurError(
                    "copies: found tensors beside a sharded model; give a model that is sharded alike, or use "
                    "event.replaced"
                )
            if self.prunings or self._rearrange:
                for one in self._trained_by.optimizers:
                    check_optimizer(one)
                self._trained_by.watch()
            for pruning in self.prunings:  # an impossible floor shows before training, not at the pruning step
                self._limits(pruning)
        except SecateurError:
            self._job.detach()
            self._trained_by.detach()
            raise
        self._steps_before = 0  # of the run, when `load_state_dict` went on with it
        self._num_waits = 0  # calls of `step` in a row before the optimizer's own
        self._doubted = False
        self._constants = phase or PhaseConstants()
        self._watch = LoadWatch(
            self.moe,
            self._job,
            self._trained_by,
            window_steps=window_steps,
            constants=self._constants,
            warmup_steps=warmup_steps,
            callers=callers,
            count_mask=count_mask,
        )
        self.say = on_message or logging.getLogger("secateur").warning
        self.trainer: weakref.ref[Any] | None = None  # of a callback: where it is in the list
        self.num_steps = 0
        self.events: list[PruneEvent] = []
        self.plan: Plan = Plan.identity(self.moe.counts)
        _align_(model)
        _watched[model] = weakref.ref(self)

    def step(self) -> PruneEvent | None:
        """Call after every `optimizer.step()`. Prunes when it is time.

        A call while gradients are still being gathered, after a micro-batch, is not a step: nothing happens.

        Returns:
            The event of a pruning, else None.

        Raises:
            SecateurError: the loads or the router weights cannot be used (no token counted, NaN), the goal cannot
                be met, or no optimizer that was given steps. The model is unchanged.
        """
        self._job.calls("LAEP.step()")
        if self._trained_by.waits():
            self._num_waits += 1
            if self._num_waits == MAX_WAITS:
                raise SecateurError(f"{MAX_WAITS} calls of LAEP.step() in a row, and gradients, but {self._no_step}")
            return None
        self._num_waits = 0
        if self.num_steps == 0:
            check_not_compiled(self.moe.model)
            self.check_goal()
            self._check_rates()
        self.num_steps += 1
        self._watch.step(self.num_steps)
        self._doubt()
        reason = self._due()
        if reason == REARRANGE:
            return self._change(None, reason)
        return None if reason is None else self._change(self.prunings[self._num_prunings], reason)

    @property
    def _no_step(self) -> str:
        return "no optimizer that LAEP was given has stepped: give it the one whose step() is called"

    def _doubt(self) -> None:
        """Say once that what is counted may be padding."""
        if self._watch.doubtful > DOUBTFUL and not self._doubted and is_main():
            self._doubted = True
            self.say(
                f"{self._watch.doubtful:.1%} of the tokens that count as load may be padding: they have no target, or "
                "are pad ids at the ends of rows, and nothing tells for sure. If they are padding, give the model an "
                "attention mask, set config.pad_token_id and give it labels, or give LAEP count_mask"
            )

    def uncounted(self) -> AbstractContextManager[None]:
        """`with pruner.uncounted():` around forwards in training mode, with gradients, that train nothing."""
        return self._watch.paused()

    def _check_rates(self) -> None:
        """Say where a warm-up could not be seen."""
        waits = any(pruning.waits_for_stable for pruning in self.prunings)
        if waits and is_main() and self.learning_rate is None and not self._watch.warmup_steps:
            self.say(
                "the optimizer sets its own learning rate ('lr' is None): LAEP cannot see a warm-up; tell of one by "
                "warmup_steps"
            )

    def check_goal(self) -> None:
        """Refuse a `target_params` of the next pruning that no loads could meet; the first `step` calls it.

        Raises:
            SecateurError: floors make it impossible; the message has the smallest share that can be reached.
        """
        for pruning in self.prunings[self._num_prunings :][:1]:
            check_goal(
                [pruning],
                self._limits(pruning),
                counts=self.moe.counts,
                params_per_expert=self.moe.params_per_expert,
                total_params=self.moe.num_parameters,
            )

    @property
    def num_processes(self) -> int:
        """Of the job."""
        return self._job.ranks.size

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far, in full windows and up to the last pruning."""
        return self._watch.num_tokens

    @property
    def last_window(self) -> RouterStats | None:
        """The loads of the window that the last `step` ended; None when it ended none."""
        return self._watch.last_window

    @property
    def load_max_over_mean(self) -> float | None:
        """See `LoadWatch`."""
        return self._watch.load_max_over_mean

    @property
    def learning_rate(self) -> float | None:
        """The highest of the optimizer's parameter groups; None where it sets its own."""
        return self._watch.learning_rate

    @property
    def rises(self) -> bool:
        """Whether the learning rate rose in the last full window, or is known to rise later."""
        return self._watch.rises

    @property
    def ahead(self) -> float | None:
        """Doublings of the tokens that are to come, as of the last full window; None before one."""
        return self._watch.ahead

    @property
    def report(self) -> PhaseReport:
        """The phase as of the last full window, with its numbers."""
        return self._watch.report

    @property
    def phase(self) -> str:
        """A `Phase` (see `secateur.train.phases`), or pruned (all prunings of the schedule are done)."""
        return "pruned" if self._is_done else self.report.phase

    @property
    def phase_in_words(self) -> str:
        """The phase and the number that decides it, such as "moving, regret 1.2%"."""
        return "pruned" if self._is_done else in_words(self.report)

    def numbers(self, *, by_layer: bool = False) -> dict[str, float]:
        """For loggers: the phase, the model's size, and the loads of the last full window, as flat "laep/..." numbers.

        `laep/waits_for` is the place of the phase in `secateur.train.phases.PHASES`, one more once all is pruned.
        """
        report = self._watch.report
        numbers: dict[str, float] = {
            f"{PREFIX}experts": sum(self.moe.counts.values()),
            f"{PREFIX}parameters": self.moe.num_parameters,
            f"{PREFIX}tokens": self.num_tokens,
            f"{PREFIX}waits_for": len(PHASES) if self._is_done else PHASES.index(report.phase),
        }
        known = {name: getattr(report, name) for name in REPORTED}
        numbers |= {f"{PREFIX}{name}": value for name, value in known.items() if value is not None}
        if self.events:
            numbers[f"{PREFIX}rerouted_share"] = self.events[-1].rerouted_share
        if by_layer:
            numbers |= {f"{PREFIX}experts/layer_{layer}": count for layer, count in self.moe.counts.items()}
        loads = self._watch.last_full_loads()
        return numbers if loads is None else numbers | load_numbers(loads, by_layer=by_layer)

    def follow(self, scheduler: Any, num_steps: int) -> None:
        """Know a whole run ahead: nothing is stable before the highest learning rate, and how long a choice must last.

        Without it, rates are watched, and the run is taken to go on for about five times as long as it has.

        Args:
            scheduler: the one that is stepped with the optimizer. num_steps: of the run, from its begin.
        """
        self._watch.end = num_steps
        if not any(pruning.waits_for_stable for pruning in self.prunings):
            return
        self._watch.schedule = schedule = read_schedule(scheduler, num_steps, done=self.num_steps)
        if not is_main():
            return
        if schedule is None:
            self.say(
                f"{type(scheduler).__name__} cannot be read ahead (a LambdaLR can): LAEP watches the learning rate "
                "step by step; warmup_steps tells it of a warm-up with pauses"
            )
        elif schedule.rises_again is not None:
            self.say(
                f"the learning rate rises again at step {schedule.rises_again}, after its highest at step "
                f"{schedule.peak}: loads that are stable before may move again"
            )
        elif schedule.peak >= num_steps > 1:
            self.say(
                f"the learning rate rises up to step {schedule.peak} of {num_steps}: loads cannot be stable before; "
                "at_step prunes at a fixed step"
            )

    def unpruned(self) -> Unpruned | None:
        """What the next pruning of the schedule would drop now, and what it waits for; None where none is to come."""
        if self._is_done or not self.prunings:
            return None
        pruning = self.prunings[self._num_prunings]
        waits = in_words(self.report, self._constants) if pruning.waits_for_stable else pruning.when
        stats = self._watch.settled()
        if stats is None:
            return Unpruned(step=self.num_steps, waits_for=waits)
        plan = self._decide(stats, pruning)
        layers = layer_events(plan, stats)
        gone = sum(stats.loads()[layer][old] for layer, one in layers.items() for old in one.dropped)
        share = gone / sum(sum(loads) for loads in stats.loads().values())
        dropped = {layer: one.dropped for layer, one in layers.items()}
        return Unpruned(step=self.num_steps, waits_for=waits, dropped=dropped, rerouted_share=share)

    def finish(self) -> Unpruned | None:
        """The run is over: says by `on_message` what a pruning that never came would have dropped, and detaches.

        Returns:
            What it said, else None.
        """
        unpruned = self.unpruned() if self.num_steps else None
        if self._num_waits and not self.num_steps and is_main():
            self.say(f"{self._num_waits} calls of LAEP.step(), but {self._no_step}; nothing was pruned")
        if unpruned is not None and is_main():
            self.say(unpruned.describe())
        self.detach()
        return unpruned

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._watch.detach()
        if watcher_of(self.moe.model) is self:
            del _watched[self.moe.model]
        self._trained_by.detach()
        self._job.detach()

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Everything needed to go on after a restart, as JSON-able values; all ranks must call, and get the same.

        Args:
            alone: only this rank calls. What is counted in the open window is left out then, as others have most of
                it: a run that goes on from there counts that window anew. Sums of sharded weights are left out too.
        """
        self._job.calls("LAEP.state_dict()")
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "settings": self._settings(),
            "watch": self._watch.state_dict(alone=alone),
            "events": [event.to_json() for event in self.events],
            "plan": self.plan.to_json(),
            "counts": {str(layer): count for layer, count in self.moe.counts.items()},
            "checksums": {} if alone and self._job.ranks.sharded else self._job.checksums(self.moe),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model must hold the weights of the same moment.

        Raises:
            SecateurError: the state is damaged, of another version or schedule, or of a model with other expert counts
                or weights. Nothing was changed.
        """
        saved = as_record(state, LAEPState, "LAEP state")
        events = [PruneEvent.from_json(event) for event in saved.events]
        plan = Plan.from_json(saved.plan)
        check_copies(plan)
        check_state(saved, self.moe.counts, self._settings(), self._job.checksums(self.moe))
        self._watch.load_state_dict(saved.watch)  # the last check
        self.num_steps, self.events, self.plan = saved.num_steps, events, plan
        self._steps_before = saved.num_steps

    def on_any_rank(self, flag: bool) -> bool:
        """Whether it is set on any rank of the job; all ranks must call."""
        return self._job.on_any_rank(flag)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """The model has been given the weights and the shape that it had when `state` was taken.

        Raises:
            SecateurError: as `load_state_dict`.
        """
        self.moe = describe_moe(self.moe.model, self.moe.layout)
        self._watch.after_pruning(self.moe)
        self.load_state_dict(state)

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """All that train the model, without wrappers."""
        return self._trained_by.optimizers

    def _settings(self) -> dict[str, Any]:
        """What a state must agree with; the detector checks its own constants."""
        return {"window_steps": self.window_steps, "prunings": [repr(pruning) for pruning in self.prunings]}

    @property
    def _is_done(self) -> bool:
        return bool(self.prunings) and self._num_prunings == len(self.prunings)

    @property
    def _num_prunings(self) -> int:
        return sum(event.reason != REARRANGE for event in self.events)

    def _due(self) -> str | None:
        if self._num_prunings < len(self.prunings):
            pruning = self.prunings[self._num_prunings]
            if pruning.at_step is not None:
                if self.num_steps >= pruning.at_step:
                    return "step"
            elif self.last_window is not None:  # the other two are decided when a window ends
                if pruning.at_tokens is not None:
                    if self.num_tokens >= pruning.at_tokens:
                        return "tokens"
                elif self.report.stable:
                    return "stable"
        every = self._rearrange and self._rearrange.every
        if every and self.last_window is not None:
            last = self.events[-1].step if self.events else 0
            return REARRANGE if self.num_steps - last >= every else None
        return None

    def _change(self, pruning: Pruning | None, reason: str) -> PruneEvent | None:
        """Prune, or without a pruning only rearrange; None when the experts lie best as they are."""
        started = time.perf_counter()
        stats = self._watch.statistics()
        self._trained_by.check_stepped(self.moe, self.num_steps - self._steps_before)
        self._check_finite()
        plan = self._decide(stats, pruning) if pruning else nothing_dropped(self.moe.counts, stats)
        placement = None
        if self._rearrange:
            ranks = self._rearrange.ranks
            assert ranks is not None
            plan, placement = rearranged(plan, stats.loads(), self._rearrange, ranks, self.moe.num_groups)
        plan = self._job.agreed(plan)
        if pruning is None and plan.is_identity:
            return None
        before, parameters_before = self._memory(), self.moe.num_parameters
        old = self._parameters()
        difference = self._apply(plan)
        if pruning is None:
            self._watch.after_rearrangement(
                self.moe, {layer: layer_plan.order for layer, layer_plan in plan.layers.items()}
            )
        else:
            self._watch.after_pruning(self.moe)
        self.plan = self.plan.compose(plan)
        event = PruneEvent(
            step=self.num_steps,
            tokens=self.num_tokens,
            reason=reason,
            plan=plan,
            loads=stats.loads(),
            layers=layer_events(plan, stats),
            parameters_before=parameters_before,
            parameters_after=self.moe.num_parameters,
            memory_before=before,
            memory_after=self._memory(),
            alpha=pruning.rule.alpha if pruning else None,
            beta=pruning.rule.beta if pruning else None,
            surgery_seconds=time.perf_counter() - started,
            oracle_max_abs_difference=difference,
            placement=placement,
        )
        self.events.append(event)
        new = self._parameters()
        replaced = {old[name]: new[name] for name in old if new[name] is not old[name]}
        return replace(event, replaced=replaced) if replaced else event

    def _apply(self, plan: Plan) -> float | None:
        """Surgery with its self-check; the largest difference of a logit from the oracle on any rank."""
        sample = self._watch.sample if self.self_check else None
        expected = None if sample is None else expected_of(self.moe, plan, sample)
        if expected is not None and not math.isfinite(self._job.largest(float(expected.logits.abs().max()))):
            raise SecateurError(
                f"the logits are NaN or infinite at step {self.num_steps}: the run has diverged, nothing is pruned"
            )
        for copy in self._copies:
            check_plan(copy, plan)
        self.moe = self._job.prune_(self.moe, plan, self._trained_by.optimizers)
        self._copies = [self._job.prune_copy_(copy, plan) for copy in self._copies]
        for kept in self._kept:
            kept.prune_(plan)
        if expected is None:
            return None
        difference, share = logit_difference(self.moe, expected)
        excess, line = 0.0, ""
        if not self._job.largest(share) <= CLOSE:
            excess, line = layer_excess(self.moe, expected, self._job.ranks.size)
        reshard_(self.moe.model)  # what a forward without backward leaves gathered would count as parameters
        if not self._job.largest(excess) <= 1:
            raise RuntimeError(
                f"the pruned model differs from the barred-experts oracle by {difference} ({line}): this is a fault of "
                "Secateur's, the model in memory must not be used; go back to the last checkpoint"
            )
        return self._job.largest(difference)

    def _decide(self, stats: RouterStats, pruning: Pruning) -> Plan:
        return decide(
            stats,
            self._limits(pruning),
            pruning.rule,
            params_per_expert=self.moe.params_per_expert,
            total_params=self.moe.num_parameters,
        )

    def _limits(self, pruning: Pruning) -> Any:
        ranks = (self._rearrange and self._rearrange.ranks) or 1
        return self.moe.limits(
            multiple_of=math.lcm(pruning.multiple_of, self._job.ranks.ep_size, ranks),
            min_experts=pruning.min_experts,
            max_experts=pruning.max_experts,
        )

    def _check_finite(self) -> None:
        for layer, block in self.moe.blocks.items():
            for spec in router_tensors(block):
                tensor: Any = tensor_at(self.moe.model, spec.name)
                local = tensor.to_local() if is_sharded(tensor) else tensor
                largest = float(local.detach().abs().max()) if local.numel() else 0.0
                if not math.isfinite(self._job.largest(largest)):
                    raise SecateurError(
                        f"layer {layer}: router tensor {spec.name} has NaN or infinite values at step "
                        f"{self.num_steps}; the run has diverged, so its loads mean nothing and nothing is pruned"
                    )

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard_(self.moe.model)
        return dict(self.moe.model.named_parameters())

    def _memory(self) -> Memory:
        return Memory(
            parameters_bytes=sum(p.numel() * p.element_size() for p in self.moe.model.parameters()),
            optimizer_bytes=optimizer_state_bytes(self._trained_by.optimizers),
        )


def _align_(model: nn.Module) -> None:
    """Move tensors that lie anywhere in a mapped file, as `from_pretrained` leaves them, to memory of their own.

    Matrix products round by the alignment of their operands, so a resumed run would differ from an uninterrupted one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_sharded(tensor) and tensor.data_ptr() % 64:  # FSDP gathers shards into memory of its own
            tensor.data = tensor.data.clone()
