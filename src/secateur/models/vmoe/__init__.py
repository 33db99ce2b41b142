"""V-MoE image classifiers (arXiv 2106.05974) and their ensembles (E3, arXiv 2110.03360) as transformers models.

Importing this package loads neither torch nor transformers. The classes are known to `AutoConfig`, `AutoModel` and
`AutoModelForImageClassification` wherever `secateur` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.models.vmoe.configuration import VMoEConfig
    from secateur.models.vmoe.modeling import VMoEForImageClassification, VMoEModel

__all__ = ["VMoEConfig", "VMoEForImageClassification", "VMoEModel"]

# public name -> module that defines it, imported at first use
_HOMES = {
    "VMoEConfig": "configuration",
    "VMoEForImageClassification": "modeling",
    "VMoEModel": "modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur.models.vmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.models.vmoe.{_HOMES[name]}"), name)
