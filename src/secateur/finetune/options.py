"""The old import path of `secateur.finetuning.options`, kept for one release."""

from secateur.finetuning.options import FinetuneOptions as FinetuneOptions
