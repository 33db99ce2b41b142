"""Tell transformers' auto classes our models, pruned ones, V-MoE and BAM, without importing transformers ourselves."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes half of the time that `import secateur` does
    from importlib.abc import Loader

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
# modules that import MODELS and that our models import, and what each has once it is not half imported any more
LAST = {
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "transformers.models.llama.configuration_llama": "LlamaConfig",
    "transformers.models.llama.modeling_llama": "LlamaForCausalLM",
}
MODEL_TYPE = "secateur_moe"
# each registers its classes when it is imported
MODEL_MODULES = ("secateur.models.bam.modeling", "secateur.models.vmoe.modeling")


def when_auto_classes_load() -> None:
    """Register now what is loaded of transformers' auto classes, and the rest at the moment it is."""
    waiting = {}
    for name, register in {CONFIGS: _register_configs, **dict.fromkeys((MODELS, *LAST), _register_models)}.items():
        if name in sys.modules:
            register()
        else:
            waiting[name] = register
    if waiting:
        sys.meta_path.insert(0, _WaitForAuto(waiting))


def _register_configs() -> None:
    # transformers is half imported at this moment: its config base class is there, its model classes are not.
    from transformers.configuration_utils import PreTrainedConfig

    from secateur.models.bam.configuration import BamConfig
    from secateur.models.vmoe.configuration import VMoEConfig

    class PrunedMoeConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
        """Entry for `AutoConfig`: gives the pruned config class of the family that config.json names."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            from secateur.modeling_secateur import read_pruned_config

            return read_pruned_config(config_dict, **kwargs)

    for config_class in (PrunedMoeConfig, BamConfig, VMoEConfig):
        sys.modules[CONFIGS].AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models() -> None:
    """Once MODELS is loaded, and none of LAST is half loaded, as it is for a while where a model class comes first."""
    half = any(name in sys.modules and not hasattr(sys.modules[name], last) for name, last in LAST.items())
    for name in MODEL_MODULES if MODELS in sys.modules and not half else ():
        importlib.import_module(name)


class _WaitForAuto:
    """Finds the modules it waits for as everybody else would, with a loader that registers afterwards."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        register = self._waiting.pop(name, None)
        if register is None:
            return None
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, register)  # type: ignore[assignment]  # all that is called of one
        return spec


class _ThenRegister:
    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register()
