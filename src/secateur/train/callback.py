"""LAEP for transformers' Trainer: `Trainer(..., callbacks=[LAEPCallback(target_params=0.67)])`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from secateur.decide.rules import RuleOptions, spelled_out, with_options_listed
from secateur.errors import SecateurError
from secateur.families import MoEModel, without_adapters
from secateur.observation.loads import CountMask
from secateur.plans import Plan
from secateur.surgery.copies import Copy
from secateur.surgery.events import PruneEvent
from secateur.train.distributed.launch import is_main
from secateur.train.laep import LAEP
from secateur.train.loggers import end_left_over, log, trainer_with
from secateur.train.phases import PhaseConstants
from secateur.train.put_back import has_whole_weights, load_best_, resume_into_shape
from secateur.train.rearrange import Rearrangement
from secateur.train.schedule import Pruning, as_prunings

PLAN_FILE = "laep_plan.json"


@with_options_listed
class LAEPCallback(TrainerCallback, ExportableState):
    """Prunes the experts of the Trainer's model while it trains; takes the keyword arguments of `LAEP`.

    The state travels in `trainer_state.json`, so `trainer.train(resume_from_checkpoint=folder)` goes on exactly where
    it was, across a pruning too: a Trainer that is made with this callback gives its model the weights and the shape of
    the checkpoint. (Its own way does not load experts that a checkpoint stores one by one, nor other counts; sharded
    models and those with adapters must be loaded from the folder, and others are refused.) A second
    `train()` of the same model goes on from the first. With `load_best_model_at_end` the model gets the weights and the
    shape of the best checkpoint, also of one from before a pruning.

    Args:
        on_event: called with the PruneEvent at the moment of a pruning, e.g. to send it to a logger of your own. The
            Trainer's loggers get `LAEP.numbers` whenever the Trainer logs, and at a pruning.
        by_layer: whether these numbers have each layer too.
        moe: as for `LAEP`, for the first training alone: a later one may begin with a pruned model.
        all others: see `LAEP`.

    Raises:
        SecateurError: at construction for a schedule that cannot be, at the start of training for a model, optimizer or
            set of training arguments that is not supported.
        TypeError: an option that no rule has.

    Attributes:
        pruner: the `LAEP` of the running training, None before it starts. events: the PruneEvents so far. plan: all of
            them as one, which is also written to `laep_plan.json` in the output folder; None before the first.
    """

    @spelled_out
    def __init__(
        self,
        *,
        on_event: Callable[[PruneEvent], None] | None = None,
        by_layer: bool = False,
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
        schedule = as_prunings(
            prunings,
            at_step=at_step,
            at_tokens=at_tokens,
            multiple_of=multiple_of,
            min_experts=min_experts,
            max_experts=max_experts,
            uniform=uniform,
            **rule,
        )
        self._laep: dict[str, Any] = {
            "copies": copies,
            "prunings": schedule,
            "window_steps": window_steps,
            "phase": phase,
            "warmup_steps": warmup_steps,
            "self_check": self_check,
            "rearrange": rearrange,
            "on_message": on_message,
            "count_mask": count_mask,
        }
        self._by_layer = by_layer
        self._moe = moe
        self._on_event = on_event
        self._saved: dict[str, Any] | None = None
        self._loads_best = False
        self._runs = False
        self.pruner: LAEP | None = None

    @property
    def events(self) -> list[PruneEvent]:
        return [] if self.pruner is None else self.pruner.events

    @property
    def plan(self) -> Plan | None:
        return self.pruner.plan if self.pruner is not None and self.events else None

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainingArguments) -> None:
        """What the start of training checks, for a caller who wants to know sooner.

        Raises:
            SecateurError: see the class.
        """
        refuse_arguments(args)
        pruner = LAEP(model, optimizer, moe=self._moe, **self._laep)
        pruner.detach()
        pruner.check_goal()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (trainer := trainer_with(self)) is not None:
            resume_into_shape(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_arguments(args)
        if args.load_best_model_at_end and not has_whole_weights(kwargs["model"]):
            raise SecateurError(
                "TrainingArguments.load_best_model_at_end cannot be used with expert pruning of a model that is "
                "sharded or has adapters: the experts of before a pruning cannot be put back"
            )
        before = None  # a training of the same model, with which this one goes on
        if self.pruner is not None:
            self.pruner.detach()
            if (
                self.pruner.moe.model is without_adapters(kwargs["model"])
                and self.pruner.num_steps
                and not state.global_step
            ):
                before = self.pruner.state_dict()
        stored: Any = state.stateful_callbacks
        saved = stored.get(type(self).__name__)
        if state.global_step and not saved:
            raise SecateurError(
                f"resumed at step {state.global_step} from a checkpoint that was written without {type(self).__name__}:"
                " the loads before it are unknown; start a new run from its weights instead"
            )
        moe, self._moe = self._moe, None  # of this training alone: a later one may begin with a pruned model
        self._trainer = trainer_with(self)
        end_left_over(kwargs["model"], self._trainer)
        self.pruner = LAEP(kwargs["model"], kwargs["optimizer"], moe=moe, **self._laep)
        self.pruner.trainer = None if self._trainer is None else weakref.ref(self._trainer)
        try:
            if state.global_step:
                self.pruner.load_state_dict(saved["attributes"]["pruner_state"])
            elif before is not None:
                self.pruner.load_state_dict(before)
            else:
                self.pruner.check_goal()
            if kwargs.get("lr_scheduler") is not None:
                to_come = state.max_steps - state.global_step
                self.pruner.follow(kwargs["lr_scheduler"], self.pruner.num_steps + to_come)
        except SecateurError:
            self.pruner.detach()
            raise
        self._runs = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.pruner is not None
        if self.pruner.num_processes > 1:  # a request of one rank alone, at a signal say, is one of all
            control.should_save = self.pruner.on_any_rank(control.should_save)
            control.should_training_stop = self.pruner.on_any_rank(control.should_training_stop)
        before = self.pruner.phase
        event = self.pruner.step()
        history: list[Any] = state.log_history
        if event is not None:
            history.append({"step": state.global_step, "prune_event": event.to_json()})
            if is_main():
                self.pruner.plan.save(Path(str(args.output_dir)) / PLAN_FILE)
            if self._on_event is not None:
                self._on_event(event)
        if self.pruner.phase != before:
            history.append({"step": state.global_step, "laep/phase": self.pruner.phase_in_words})
        if event is not None or control.should_log:
            log(self.pruner.numbers(by_layer=self._by_layer), self._trainer, args, state, control)
        self._collect(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._collect(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The last log, before the Trainer would load the best model: `on_train_end` does it, with the experts."""
        if args.load_best_model_at_end and "train_runtime" in (logs or {}):
            args.load_best_model_at_end, self._loads_best = False, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            return
        self._runs = False
        unpruned = self.pruner.finish()
        if unpruned is not None:
            history: list[Any] = state.log_history
            history.append({"step": state.global_step, "laep/unpruned": unpruned.to_json()})
        if self._loads_best:
            args.load_best_model_at_end, self._loads_best = True, False
            if state.best_model_checkpoint is not None:
                self.pruner.say(load_best_(self.pruner, Path(state.best_model_checkpoint), type(self).__name__))

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json` (transformers' ExportableState), on the rank that writes it.

        In a job of several processes, a callback further down the list may have asked for this checkpoint when the
        ranks' counts were no longer collected: see `LAEP.state_dict(alone=True)`. A line says so.
        """
        if self.pruner is None or not self._runs:  # a Trainer also asks when it begins anew
            return {"args": {}, "attributes": {"pruner_state": None}}
        if self.pruner.num_processes == 1:
            self._saved = self.pruner.state_dict()
        if self._saved is None or self._saved["num_steps"] != self.pruner.num_steps:
            self._saved = self.pruner.state_dict(alone=True)
            self.pruner.say(
                f"the checkpoint at step {self.pruner.num_steps} was asked for by a callback after "
                f"{type(self).__name__}: it is whole, but the open window of loads is not in it; put "
                f"{type(self).__name__} last in the list"
            )
        return {"args": {}, "attributes": {"pruner_state": self._saved}}

    def _collect(self, control: TrainerControl) -> None:
        """Take the state now if a checkpoint follows: all ranks are here, and only one is asked for it later."""
        assert self.pruner is not None
        if control.should_save and self.pruner.num_processes > 1:
            self._saved = self.pruner.state_dict()


# training argument -> why it is refused when it is on
REFUSED_ARGUMENTS = {
    "torch_compile": "compiled code holds the old parameters",
    "deepspeed": "its parameters are views of flat buffers",
    "auto_find_batch_size": "a restart with another batch size would begin with an already pruned model",
    "restore_callback_states_from_checkpoint": "LAEPCallback restores itself, and would be made anew without arguments",
    "use_liger_kernel": "its fused experts are not the modules that are counted and cut",
}


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise for training arguments that pruning in the running job cannot follow.

    Raises:
        SecateurError: names the argument and the reason.
    """
    for name, why in REFUSED_ARGUMENTS.items():
        if getattr(args, name, None):
            raise SecateurError(f"TrainingArguments.{name} cannot be used with expert pruning: {why}")
    if args.n_gpu > 1:
        raise SecateurError(
            f"Trainer would run the model on {args.n_gpu} GPUs of one process (DataParallel): start one process a GPU "
            "by torchrun, or choose one by CUDA_VISIBLE_DEVICES"
        )
