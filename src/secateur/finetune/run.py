"""The old import path of `secateur.finetuning.run`, kept for one release."""

from secateur.finetuning.run import finetune as finetune
