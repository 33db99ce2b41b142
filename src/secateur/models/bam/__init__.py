"""BAM (Branch-Attend-Mix, arXiv 2408.08274) as transformers models: experts of attention and experts of the FFN.

Importing this package loads neither torch nor transformers. The classes are known to `AutoConfig`, `AutoModel` and
`AutoModelForCausalLM` wherever `secateur` is imported. What the fields of the config and the tensors of a checkpoint
mean stands in `configuration.py` and `modeling.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.models.bam.configuration import BamConfig
    from secateur.models.bam.modeling import BamForCausalLM, BamModel

__all__ = ["BamConfig", "BamForCausalLM", "BamModel"]

# public name -> module that defines it, imported at first use
_HOMES = {
    "BamConfig": "configuration",
    "BamForCausalLM": "modeling",
    "BamModel": "modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur.models.bam' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.models.bam.{_HOMES[name]}"), name)
