"""LAEP for transformers' Trainer: `Trainer(..., callbacks=[LAEPCallback(target_params=0.67)])`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from secateur.decide.rules import RuleOptions, spelled_out, with_options_listed
from secateur.errors import SecateurError
from secateur.families import MoEModel
from secateur.surgery.events import PruneEvent
from secateur.train.laep import LAEP
from secateur.train.phases import PhaseConstants
from secateur.train.rearrange import Rearrangement
from secateur.train.schedule import Pruning, as_prunings


@with_options_listed
class LAEPCallback(TrainerCallback, ExportableState):
    """Prunes the experts of the Trainer's model while it trains; takes the keyword arguments of `LAEP`.

    The state travels in `trainer_state.json`, so `trainer.train(resume_from_checkpoint=folder)` goes on exactly where
    it was, with a model that was loaded from that folder. Any other is refused: a Trainer does not load experts that a
    checkpoint stores one by one (it warns of missing keys), nor a pruned checkpoint into an unpruned model.

    Args:
        on_event: called with the PruneEvent at the moment of a pruning, e.g. to send it to a logger of your own.
        moe: as for `LAEP`, for the first training alone: a later one may begin with a pruned model.
        all others: see `LAEP`.

    Raises:
        SecateurError: at construction for a schedule that cannot be, at the start of training for a model, optimizer or
            set of training arguments that is not supported.
        TypeError: an option that no rule has.

    Attributes:
        pruner: the `LAEP` of the running training, None before it starts. events: the PruneEvents so far.
    """

    @spelled_out
    def __init__(
        self,
        *,
        on_event: Callable[[PruneEvent], None] | None = None,
        copies: Iterable[nn.Module] = (),
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
        }
        self._moe = moe
        self._on_event = on_event
        self._saved: dict[str, Any] | None = None
        self.pruner: LAEP | None = None

    @property
    def events(self) -> list[PruneEvent]:
        return [] if self.pruner is None else self.pruner.events

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainingArguments) -> None:
        """What the start of training checks, for a caller who wants to know sooner.

        Raises:
            SecateurError: see the class.
        """
        refuse_arguments(args)
        pruner = LAEP(model, optimizer, moe=self._moe, **self._laep)
        pruner.detach()
        pruner.check_goal()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_arguments(args)
        if self.pruner is not None:
            self.pruner.detach()
        stored: Any = state.stateful_callbacks
        saved = stored.get(type(self).__name__)
        if state.global_step and not saved:
            raise SecateurError(
                f"resumed at step {state.global_step} from a checkpoint that was written without {type(self).__name__}:"
                " the loads before it are unknown; start a new run from its weights instead"
            )
        moe, self._moe = self._moe, None  # of this training alone: a later one may begin with a pruned model
        self.pruner = LAEP(kwargs["model"], kwargs["optimizer"], moe=moe, **self._laep)
        try:
            if state.global_step:
                self.pruner.load_state_dict(saved["attributes"]["pruner_state"])
            else:
                self.pruner.check_goal()
            if kwargs.get("lr_scheduler") is not None:
                self.pruner.follow(kwargs["lr_scheduler"], state.max_steps)
        except SecateurError:
            self.pruner.detach()
            raise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.pruner is not None
        before = self.pruner.phase
        event = self.pruner.step()
        history: list[Any] = state.log_history
        if event is not None:
            history.append({"step": state.global_step, "prune_event": event.to_json()})
            if self._on_event is not None:
                self._on_event(event)
        if self.pruner.phase != before:
            history.append({"step": state.global_step, "laep/phase": self.pruner.phase_in_words})
        self._collect(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._collect(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            return
        unpruned = self.pruner.finish()
        if unpruned is not None:
            history: list[Any] = state.log_history
            history.append({"step": state.global_step, "laep/unpruned": unpruned.to_json()})

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json` (transformers' ExportableState), on the rank that writes it.

        Raises:
            SecateurError: in a job of several processes, a checkpoint that was not asked for by the Trainer's own
                save strategy: the ranks' counts were not collected.
        """
        if self.pruner is None:
            return {"args": {}, "attributes": {"pruner_state": None}}
        if self.pruner.num_processes == 1:
            self._saved = self.pruner.state_dict()
        if self._saved is None or self._saved["num_steps"] != self.pruner.num_steps:
            raise SecateurError(
                f"a checkpoint at step {self.pruner.num_steps} in a job of {self.pruner.num_processes} processes that "
                "no other rank knows of: let the Trainer's save_strategy ask for it"
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
    "load_best_model_at_end": "the best checkpoint may be from before a pruning, and Trainer loads no experts back",
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
