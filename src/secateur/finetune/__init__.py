"""The old import path of `secateur.finetuning`, kept for one release."""
