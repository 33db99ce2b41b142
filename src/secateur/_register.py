"""Tell transformers' AutoConfig our model types, pruned models and V-MoE, without importing transformers ourselves."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
MODEL_TYPE = "secateur_moe"


def when_auto_classes_load() -> None:
    """Register now if transformers' auto classes are loaded, else at the moment they are."""
    if AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WaitForAuto())


def _register() -> None:
    # transformers is half imported at this moment: its config base class is there, its model classes are not.
    from transformers.configuration_utils import PreTrainedConfig

    from secateur.vision.configuration import VMoEConfig

    class PrunedMoeConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
        """Entry for `AutoConfig`: gives the pruned config class of the family that config.json names."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            from secateur.modeling_secateur import read_pruned_config

            return read_pruned_config(config_dict, **kwargs)

    for config_class in (PrunedMoeConfig, VMoEConfig):
        sys.modules[AUTO].AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


class _WaitForAuto(MetaPathFinder):
    """Finds the one module it waits for as everybody else would, with a loader that registers afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
