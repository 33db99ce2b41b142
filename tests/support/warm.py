"""What every child of a test needs and would load or build anew: modules and tables, nothing that a run changes."""

from __future__ import annotations

import contextlib
import gc
import importlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

MODULES = (
    "secateur.pretraining.pretrain",
    "secateur.finetuning.run",
    "support.job_runs",
    "support.distributed_runs",
    "support.small_finetunes",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    # of their own, which the packages load late; other releases may have none
    "typer._adapters",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.utils.serialization.config",
)

for _name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
get_checkpoint_conversion_mapping("qwen3_moe")  # builds those of all model types: a third of a second
with FakeTensorMode():  # by which DTensor finds shapes; the first one is slow
    torch.empty(2, 3).add_(1) @ torch.empty(3, 2)
gc.collect()
gc.freeze()
