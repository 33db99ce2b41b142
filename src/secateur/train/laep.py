"""LAEP in a training loop (arXiv 2601.14327): count loads, wait until they are stable, prune, go on.

In a plain loop:

    pruner = LAEP(model, optimizer, target_params=0.67)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        event = pruner.step()   # a PruneEvent at the step that prunes, else None
        optimizer.zero_grad()
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.decide import decide
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.observe import LoadCounter
from secateur.plan import Plan
from secateur.stats import RouterStats
from secateur.surgery.module import check_model, prune_model_, router_tensors
from secateur.surgery.optimizer import check_optimizer, optimizer_state_bytes, unwrap
from secateur.train.events import Memory, PruneEvent, layer_events
from secateur.train.phases import PhaseConstants, StablePhaseDetector
from secateur.train.processes import refuse_several_processes
from secateur.train.schedule import Pruning, as_prunings, check_count
from secateur.verify import barred_experts, expert_checksums, logits_of

STATE_VERSION = 1


class LAEP:
    """Prunes the experts of a model while it trains.

    Args:
        model: a transformers MoE causal LM, not wrapped. optimizer: the one that trains it.
        prunings: a schedule (an empty one only watches the loads); or give one `Rule` by its fields (alpha, beta,
            target_params, max_rerouted, uniform), with `at_step` or `at_tokens` for a fixed time. Default:
            `target_params=0.67` at the stable phase.
        window_steps: optimizer steps a statistics window.
        phase: constants of the stable-phase detector.
        self_check: at every pruning, compare the pruned model with the barred-experts oracle on one training
            sequence (two forward passes).

    Raises:
        SecateurError: the model, the optimizer, the schedule or the way the job was started is not supported. Nothing
            has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        prunings: Sequence[Pruning] | None = None,
        at_step: int | None = None,
        at_tokens: int | None = None,
        window_steps: int = 20,
        phase: PhaseConstants | None = None,
        self_check: bool = True,
        **rule_and_limits: Any,
    ) -> None:
        refuse_several_processes()
        check_count("window_steps", window_steps)
        self.prunings = as_prunings(prunings, at_step=at_step, at_tokens=at_tokens, **rule_and_limits)
        self.window_steps = window_steps
        self.self_check = self_check
        self.moe: MoEModel = describe_moe(model)
        check_model(self.moe)
        self._optimizer = unwrap(optimizer)
        if self.prunings:
            check_optimizer(self._optimizer)
        for pruning in self.prunings:  # an impossible floor shows before training, not at the pruning step
            self._limits(pruning)
        self._counter = LoadCounter(self.moe)
        self._sample: Tensor | None = None
        self._sample_hook = model.register_forward_pre_hook(self._keep_sample, with_kwargs=True)
        phase = phase or PhaseConstants()
        self._detector = StablePhaseDetector(phase)
        self._windows: deque[RouterStats] = deque(maxlen=phase.windows)
        self.num_steps = 0
        self.num_tokens = 0
        self._steps_in_window = 0
        self.events: list[PruneEvent] = []
        self.plan: Plan = Plan.identity(self.moe.counts)
        _align_(model)
        self.last_window: RouterStats | None = None
        self._stable = False  # as of the last full window

    def step(self) -> PruneEvent | None:
        """Call after every `optimizer.step()`. Prunes when it is time.

        Returns:
            The event of a pruning, else None.

        Raises:
            SecateurError: the loads or the router weights cannot be used (no token counted, NaN), or the goal cannot
                be met. The model is unchanged.
        """
        if self.num_steps == 0:
            self.check_goal()
        self.num_steps += 1
        self._steps_in_window += 1
        self.last_window = None
        if self._steps_in_window == self.window_steps:
            self._end_window()
        reason = self._due()
        if reason is None:
            return None
        return self._prune(self.prunings[len(self.events)], reason)

    def check_goal(self) -> None:
        """Refuse a `target_params` of the next pruning that no loads could meet; the first `step` calls it.

        Raises:
            SecateurError: floors make it impossible; the message has the smallest share that can be reached.
        """
        due = self.prunings[len(self.events) :]
        if due and due[0].rule.target_params is not None:
            even = {layer: [1] * count for layer, count in self.moe.counts.items()}
            self._decide(RouterStats.from_loads(even, num_tokens=1), due[0])

    @property
    def load_max_over_mean(self) -> float | None:
        """Load of the busiest expert over the mean, averaged over layers, in the last full window; None before one."""
        if not self._windows:
            return None
        loads = self._windows[-1].loads().values()
        return sum(max(one) * len(one) / sum(one) for one in loads) / len(loads)

    @property
    def phase(self) -> str:
        """transition, stable, or pruned (all prunings of the schedule are done)."""
        if self.prunings and len(self.events) == len(self.prunings):
            return "pruned"
        return "stable" if self._stable else "transition"

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._counter.detach()
        self._sample_hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart, as JSON-able values."""
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "steps_in_window": self._steps_in_window,
            "settings": self._settings(),
            "open_window": None if self._counter.is_empty else self._counter.read().to_json(),
            "windows": [window.to_json() for window in self._windows],
            "detector": self._detector.state(),
            "stable": self._stable,
            "events": [event.to_json() for event in self.events],
            "plan": self.plan.to_json(),
            "counts": {str(layer): count for layer, count in self.moe.counts.items()},
            "checksums": expert_checksums(self.moe),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model must hold the weights of the same moment.

        Raises:
            SecateurError: the state is of another version or schedule, or of a model with other expert counts or
                weights. Nothing was changed.
        """
        if state.get("version") != STATE_VERSION:
            raise SecateurError(f"LAEP state: version {state.get('version')!r}, expected {STATE_VERSION}")
        counts = {int(layer): count for layer, count in state["counts"].items()}
        if counts != self.moe.counts:
            raise SecateurError(
                f"LAEP state is of a model with experts {counts}, this model has {self.moe.counts}: load the model "
                "from the checkpoint itself (AutoModelForCausalLM.from_pretrained(checkpoint)) before resuming"
            )
        if state["settings"] != self._settings():
            raise SecateurError(
                f"LAEP state is of a run with other settings: {state['settings']}, this run has {self._settings()}"
            )
        checksums = expert_checksums(self.moe)
        wrong = [name for name, value in state["checksums"].items() if checksums.get(name) != value]
        if wrong:
            raise SecateurError(
                f"{len(wrong)} expert tensors, e.g. {wrong[0]}, are not those of the moment this LAEP state was taken. "
                "Trainer does not load experts that a checkpoint stores one by one: load the model from the checkpoint "
                "itself (AutoModelForCausalLM.from_pretrained(checkpoint)) before resuming"
            )
        self._detector.restore(state["detector"])  # the last check
        self.num_steps, self.num_tokens = state["num_steps"], state["num_tokens"]
        self._steps_in_window = state["steps_in_window"]
        self._counter.reset(self.moe)
        if state["open_window"] is not None:
            self._counter.load(RouterStats.from_json(state["open_window"]))
        self._windows.clear()
        self._windows.extend(RouterStats.from_json(window) for window in state["windows"])
        self._stable = state["stable"]
        self.events = [PruneEvent.from_json(event) for event in state["events"]]
        self.plan = Plan.from_json(state["plan"])

    def _settings(self) -> dict[str, Any]:
        """What a state must agree with; the detector checks its own constants."""
        return {"window_steps": self.window_steps, "prunings": [repr(pruning) for pruning in self.prunings]}

    def _end_window(self) -> None:
        window = self._counter.read()
        self._counter.reset(self.moe)
        self._steps_in_window = 0
        self.num_tokens += _tokens(window)
        self._windows.append(window)
        self.last_window = window
        self._stable = self._detector.update(window.loads()).stable

    def _due(self) -> str | None:
        if len(self.events) == len(self.prunings):
            return None
        pruning = self.prunings[len(self.events)]
        if pruning.at_step is not None:
            return "step" if self.num_steps >= pruning.at_step else None
        if self.last_window is None:  # the other two are decided when a window ends
            return None
        if pruning.at_tokens is not None:
            return "tokens" if self.num_tokens >= pruning.at_tokens else None
        return "stable" if self._stable else None

    def _prune(self, pruning: Pruning, reason: str) -> PruneEvent:
        started = time.perf_counter()
        stats = self._statistics()
        self._check_finite()
        moe = self.moe
        plan = self._decide(stats, pruning)
        sample = self._sample if self.self_check else None
        expected = None
        if sample is not None:
            with barred_experts(moe, plan):
                expected = logits_of(moe.model, sample)
            if not bool(torch.isfinite(expected).all()):
                raise SecateurError(
                    f"the logits are NaN or infinite at step {self.num_steps}: the run has diverged, nothing is pruned"
                )
        before, parameters_before = self._memory(), moe.num_parameters
        self.moe = prune_model_(moe, plan, self._optimizer)
        difference = None
        if sample is not None and expected is not None:
            difference = float((logits_of(self.moe.model, sample) - expected).abs().max())
            if not difference <= 1e-3 * float(expected.abs().max()):
                raise RuntimeError(
                    f"the pruned model differs from the barred-experts oracle by {difference}: this is a fault of "
                    "Secateur's, the model in memory must not be used; go back to the last checkpoint"
                )
        if not self._counter.is_empty:  # a fixed step may fall inside a window
            self.num_tokens += _tokens(self._counter.read())
        self._counter.reset(self.moe)
        self._steps_in_window = 0
        self._windows.clear()
        self._detector.reset()
        self._stable = False
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
            alpha=pruning.rule.alpha,
            beta=pruning.rule.beta,
            surgery_seconds=time.perf_counter() - started,
            oracle_max_abs_difference=difference,
        )
        self.events.append(event)
        return event

    def _statistics(self) -> RouterStats:
        """The last windows and the open one, added up."""
        parts = list(self._windows)
        if not self._counter.is_empty:
            parts.append(self._counter.read())
        total = parts[0] if parts else self._counter.read()  # which refuses: nothing was counted at all
        for part in parts[1:]:
            total = total + part
        return total

    def _decide(self, stats: RouterStats, pruning: Pruning) -> Plan:
        return decide(
            stats,
            self._limits(pruning),
            pruning.rule,
            params_per_expert=self.moe.params_per_expert,
            total_params=self.moe.num_parameters,
        )

    def _limits(self, pruning: Pruning) -> Any:
        return self.moe.limits(
            multiple_of=pruning.multiple_of, min_experts=pruning.min_experts, max_experts=pruning.max_experts
        )

    def _check_finite(self) -> None:
        for layer, block in self.moe.blocks.items():
            for spec in router_tensors(block):
                if not bool(torch.isfinite(self.moe.model.get_parameter_or_buffer(spec.name)).all()):
                    raise SecateurError(
                        f"layer {layer}: router tensor {spec.name} has NaN or infinite values at step "
                        f"{self.num_steps}; the run has diverged, so its loads mean nothing and nothing is pruned"
                    )

    def _memory(self) -> Memory:
        return Memory(
            parameters_bytes=sum(p.numel() * p.element_size() for p in self.moe.model.parameters()),
            optimizer_bytes=optimizer_state_bytes(self._optimizer),
        )

    def _keep_sample(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if model.training and isinstance(tokens, Tensor):
            self._sample = tokens[:1].detach()


def _align_(model: nn.Module) -> None:
    """Move tensors that lie anywhere in a mapped file, as `from_pretrained` leaves them, to memory of their own.

    Matrix products round by the alignment of their operands, so a resumed run would differ from an uninterrupted one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _tokens(stats: RouterStats) -> int:
    return next(iter(stats.layers.values())).num_tokens
