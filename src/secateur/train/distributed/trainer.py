"""transformers' Trainer with checkpoints that resume on any number of ranks.

The stock Trainer refuses to resume a model that was sharded at load time. Here the weights of such a model are written
by transformers' distributed save, rank by rank, and the optimizer's state by name, with torch.distributed.checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import EvalLoopOutput

from secateur.errors import SecateurError
from secateur.files.refused import refused_by_the_disk
from secateur.surgery.optimizer import unwrap
from secateur.train.distributed.launch import barrier, is_main, rank, world_size
from secateur.train.distributed.save import failures_as, save_sharded
from secateur.train.distributed.trust import check_no_code
from secateur.train.resumed import STATE, check_like, check_state, fitting, read_plain

OPTIMIZER = "optimizer"  # a folder of torch.distributed.checkpoint
SCHEDULER = "scheduler.pt"


class ResumableTrainer(Trainer):
    """Give it a model that was loaded from the checkpoint that `train(resume_from_checkpoint=...)` names.

    Takes what Trainer takes, as keywords; `args.save_only_model` is respected.
    """

    def __init__(self, **arguments: Any) -> None:
        args = arguments["args"]
        wanted, args.save_only_model = args.save_only_model, True  # Trainer refuses anything else for a sharded model
        if getattr(arguments["model"], "tp_size", None) and args.device.type == "cpu":
            args.parallelism_config = _tensor_parallelism_on_cpu(arguments["model"].config.distributed_config)
        super().__init__(**arguments)
        args.save_only_model, args.parallelism_config = wanted, None

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Nothing to do: replicated weights come from one folder, and their ranks see the same tokens.

        (The stock method hangs hooks on them, which would stay on routers that a pruning replaces.)
        """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with refused_by_the_disk(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)
        barrier()  # the files of every rank are there

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save(output_dir, state_dict)
            return
        save_sharded(self.model, Path(str(output_dir or self.args.output_dir)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = str(Path(output_dir) / OPTIMIZER)
        with failures_as(OSError, folder):
            save_optimizer_distributed(self.model, self._inner_optimizer(), folder)
        schedule: Any = self.lr_scheduler
        if is_main():
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to do: the model has been loaded from there, onto its ranks."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, file = Path(checkpoint) / OPTIMIZER, Path(checkpoint) / SCHEDULER
        check_no_code(folder)
        with failures_as(SecateurError, f"{folder}: does not fit this model and optimizer"), fitting(folder):
            load_optimizer_distributed(self.model, self._inner_optimizer(), str(folder))
        schedule: Any = self.lr_scheduler
        state = check_like(file, read_plain(file), schedule.state_dict())
        with fitting(file):
            schedule.load_state_dict(_for_groups(state, len(schedule.optimizer.param_groups), checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        own = f"rng_state_{rank()}.pth" if world_size() > 1 else "rng_state.pth"
        if checkpoint is None or not (file := Path(checkpoint) / own).exists():
            super()._load_rng_state(checkpoint)
            return
        with safe_globals():  # type: ignore[no-untyped-call]  # NumPy's state of random numbers
            read_plain(file)
        with fitting(file):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with fitting(Path(str(self._resumed)) / STATE):
            super()._load_callback_state()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as the stock method does, once what it will read of a checkpoint has been looked at.

        Raises:
            SecateurError: the checkpoint is damaged, or not of this training; the message names the file.
        """
        self._resumed = resume_from_checkpoint
        if isinstance(resume_from_checkpoint, str):
            check_state(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all sequences, each counted once.

        On several ranks the stock loop fills the last batch up with sequences it has seen, and counts their losses.
        """
        if world_size() == 1:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        model: Any = self.model
        model.eval()
        dataset, size = dataloader.dataset, self.args.per_device_eval_batch_size
        share = world_size() // self.get_tp_size()  # ranks that see different tokens
        first = rank() // self.get_tp_size() * size
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for start in range(0, len(dataset), size * share):
            mine = range(start + first, min(start + first + size, len(dataset)))
            batch = [dataset[index] for index in mine or range(1)]  # every rank must run; some of them for nothing
            inputs = self._prepare_inputs(self.data_collator(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                total += model(**inputs).loss.double() * len(mine)
        dist.all_reduce(total)
        mean = float(total) / self.get_tp_size() / len(dataset)
        metrics = {f"{metric_key_prefix}_loss": mean}
        return EvalLoopOutput(np.empty(0), None, metrics, len(dataset))

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return unwrap(self.optimizer)


def _tensor_parallelism_on_cpu(split: Any) -> Any:
    """accelerate takes it on GPUs only, but has no more to do for it than to give its ranks the same batches."""
    from accelerate import ParallelismConfig  # type: ignore[import-untyped]

    class OnCPU(ParallelismConfig):  # type: ignore[misc]
        def _validate_accelerator(self, accelerator: Any) -> None:
            pass

    return OnCPU(tp_size=split.tp_size, dp_shard_size=split.dp_size)


def _for_groups(state: Mapping[str, Any], num_groups: int, checkpoint: str) -> dict[str, Any]:
    """A schedule's state for another number of param groups: the Trainer makes some for each mesh of ranks.

    Raises:
        SecateurError: the groups have schedules of their own.
    """
    fitted = dict(state)
    for key, values in state.items():
        if isinstance(values, list) and len(values) != num_groups:
            if any(value != values[0] for value in values):
                raise SecateurError(
                    f"{checkpoint}: its schedule has {key} {values}, which do not fit {num_groups} groups"
                )
            fitted[key] = values[:1] * num_groups
    return fitted
