"""A model without weights whose parts are filled from the files of its folder, and emptied again.

Everything that depends on how transformers loads a model is here: the class is built as `from_pretrained` builds it,
names and packings go through its own conversion, and what no file holds is computed by its own initialisation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig, get_state_dict_dtype
from transformers.utils.loading_report import LoadStateDictInfo

from secateur.errors import SecateurError
from secateur.files.progress import no_loading_bars
from secateur.model_folder.read.config import floats
from secateur.model_folder.read.load import DTYPES, text_model
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.stream.lazy_tensor import LazyTensor, Span, UnreadTensor
from secateur.model_folder.stream.placed import PlacingConverter, with_placing
from secateur.modeling_secateur import pruned_model_class, read_pruned_config, replace_tensor_
from secateur.surgery.load_faults import MISFIT, in_words

RECORDS = ("output_router_logits", "output_hidden_states", "output_attentions")  # what a forward may keep of all layers
LISTED = 3  # names in a message

Part = str | int  # "outside", "head", or the number of a layer


class PartModel:
    """The native model of a folder on the meta device, in evaluation mode.

    model: the whole one, as it is called. text: the model that holds the decoder layers, `model` itself or inside it.
    layers: the decoder layers. Its tensors are in three kinds of parts: those of a layer, those of the LM head, and
    those outside; parts of other models than the text model (images, sounds) are never filled.
    """

    def __init__(self, folder: ModelFolder, device: str, spans: Mapping[str, Sequence[Span]]) -> None:
        """
        Args:
            spans: what is read of the tensors that it names; all of the others.

        Raises:
            SecateurError: a quantised model, a tensor that is missing, unknown or of a type to be decoded first.
        """
        _refuse_quantised(folder)
        self._folder, self._device, self._spans = folder.files, device, spans
        self.model, self.dtype = _build(folder)
        self.text = text_model(self.model, folder)
        self._text_path = _path_of(self.model, self.text)
        self.layers_path, self.layers = self._find_layers(folder)
        self._empty = dict(_tensors(self.model))
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head_path = _path_of(self.model, head) if head is not None else None
        self._transforms: list[Any] = with_placing(get_model_conversion_mapping(self.model))
        self._placed: set[str] = set()  # names in the files
        self._names = self._sort_names(folder)

    def part_bytes(self) -> dict[Part, int]:
        """Bytes in the files of every part; a tied LM head counts as outside."""
        sizes = {part: sum(self._folder.tensors[name].length for name in names) for part, names in self._names.items()}
        return {**sizes, "outside": sizes["outside"] + sizes["head"], "head": 0} if self._is_tied else sizes

    @contextmanager
    def outside(self) -> Iterator[None]:
        """While it lasts, the tensors outside the layers are there; with those of an LM head that is tied to them."""
        with self._filled(["outside", "head"] if self._is_tied else ["outside"]):
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """While it lasts, the tensors of a decoder layer are there."""
        with self._filled([number]):
            yield self.layers[number]

    @contextmanager
    def head(self) -> Iterator[None]:
        """While it lasts, within `outside`, the tensors of the LM head are there."""
        with self._filled([] if self._is_tied else ["head"]):
            yield

    @property
    def _is_tied(self) -> bool:
        return bool(self.model.all_tied_weights_keys)

    def _find_layers(self, folder: ModelFolder) -> tuple[str, nn.ModuleList]:
        fits = {
            name: module
            for name, module in self.text.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == folder.config.num_layers
            and all(_has_experts(module[layer]) for layer in folder.counts)
        }
        if len(fits) != 1:
            raise SecateurError(f"{type(self.model).__name__}: expected one list of decoder layers, found {list(fits)}")
        ((name, layers),) = fits.items()
        return ".".join(filter(None, (self._text_path, name))), layers

    def _part_of(self, live: str) -> Part | None:
        """Of a module or tensor of the model; None for what is in no part."""
        if _is_in(live, self.layers_path):
            number = live.removeprefix(self.layers_path).split(".")[1:2]
            return int(number[0]) if number else None
        if self._head_path is not None and _is_in(live, self._head_path):
            return "head"
        return "outside" if _is_in(live, self._text_path) else None

    def _sort_names(self, folder: ModelFolder) -> dict[Part, list[str]]:
        """Part -> names in the files, by the names that transformers gives them in it; notes which are placed."""
        renamings = [transform for transform in self._transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in self._transforms if isinstance(transform, WeightConverter)]
        live = self.model.state_dict()
        prefix = self.model.base_model_prefix
        parts: dict[Part, list[str]] = {"outside": [], "head": [], **{number: [] for number in range(len(self.layers))}}
        placing = {key for one in converters if isinstance(one, PlacingConverter) for key in one.source_patterns}
        unknown = []
        for name in folder.files.tensors:
            if name in folder.mtp:
                continue
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, live)
            if renamed not in live and name in live:
                renamed, pattern = name, None
            if pattern in placing:
                self._placed.add(name)
            if renamed not in live:
                unknown.append(renamed)
            elif (part := self._part_of(renamed)) is not None:
                parts[part].append(name)
        unknown = self._not_ignored(unknown)
        if unknown:
            raise SecateurError(
                f"{folder.files.path}: {MISFIT}: {len(unknown)} tensors have no place in "
                f"{type(self.model).__name__}: {', '.join(unknown[:LISTED])}"
            )
        return parts

    def _not_ignored(self, unknown: list[str]) -> list[str]:
        """Without what transformers leaves aside when it loads a model of this class."""
        info = LoadStateDictInfo(
            missing_keys=set(),
            unexpected_keys=set(unknown),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        self.model._adjust_missing_and_unexpected_keys(info)
        return sorted(info.unexpected_keys)

    @contextmanager
    def _filled(self, parts: Sequence[Part]) -> Iterator[None]:
        live = [name for name in self._empty if self._part_of(name) in parts]
        modules = {name: module for name, module in self.model.named_modules() if self._part_of(name) in parts}
        try:
            self._load([name for part in parts for name in self._names[part]])
            self._compute_buffers(live, modules)
            if "outside" in parts and self._is_tied:
                self.model.tie_weights(missing_keys=self._on_meta(live), recompute_mapping=False)
            missing = sorted(self._on_meta(live))
            if missing:
                raise SecateurError(
                    f"{self._folder.path}: {MISFIT}: {len(missing)} tensors are missing, such as {missing[0]}"
                )
            yield
        finally:
            for name in live:
                replace_tensor_(*self._owner(name), self._empty[name])
            for module in modules.values():
                vars(module).pop("_is_hf_initialized", None)

    def _load(self, names: list[str]) -> None:
        state = {name: self._lazy(name) for name in names}
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._transforms,
            device_map={"": self._device},
        )
        with no_loading_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        wrong = [str(one) for one in (*info.conversion_errors.items(), *info.error_msgs)]
        if misfits := in_words(info.mismatched_keys):
            raise SecateurError(f"{self._folder.path}: {misfits}")
        if wrong:
            raise SecateurError(f"{self._folder.path}: {MISFIT}, transformers cannot load {wrong[0]}")
        for _, tensor in _tensors(self.model):
            if tensor.device.type != "meta" and tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor.data = tensor.data.clone()  # a piece of a larger one, which it would keep in memory

    def _lazy(self, name: str) -> LazyTensor:
        kind = UnreadTensor if name in self._placed else LazyTensor
        return kind(self._folder.path, name, self._folder.tensors[name], self._spans.get(name))

    @torch.no_grad()
    def _compute_buffers(self, live: list[str], modules: dict[str, nn.Module]) -> None:
        """Fill what no file holds, such as the frequencies of rotary embeddings, as transformers does after a load."""
        stored = self.model.state_dict().keys()
        for name in live:
            if name not in stored:
                replace_tensor_(*self._owner(name), torch.empty_like(self._empty[name], device=self._device))
        with guard_torch_init_functions():  # which leaves alone what was loaded
            for path, module in reversed(modules.items()):  # children before parents
                self._nearest_model(path)._initialize_weights(module)

    def _nearest_model(self, path: str) -> PreTrainedModel:
        """The innermost model that a module lies in, whose rules for new tensors hold there."""
        while path:
            module = self.model.get_submodule(path)
            if isinstance(module, PreTrainedModel):
                return module
            path = path.rpartition(".")[0]
        return self.model

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        return self.model.get_submodule(path), key

    def _on_meta(self, live: Iterable[str]) -> set[str]:
        return {name for name in live if getattr(*self._owner(name)).device.type == "meta"}


def _refuse_quantised(folder: ModelFolder) -> None:
    if folder.files.is_quantised:
        raise SecateurError(
            f"{folder.files.path}: its weights are quantised ({folder.files.quantisation}), and only plain ones can be "
            "computed with; take the model that it was made from, or write this one with plain weights first"
        )


def _build(folder: ModelFolder) -> tuple[PreTrainedModel, torch.dtype]:
    """(the model on the meta device, its type by the config, or else by the first tensor in the files)."""
    if folder.config.is_pruned:
        config = read_pruned_config(floats(dict(folder.files.config)))
        model_class: Any = pruned_model_class(folder.config.model_class)
    else:
        config, model_class = copy.deepcopy(folder.config.config), folder.config.model_class
    dtype = config.dtype or get_state_dict_dtype(  # type: ignore[no-untyped-call]
        {
            name: torch.empty(0, dtype=DTYPES[tensor.dtype], device="meta")
            for name, tensor in folder.files.tensors.items()
            if tensor.dtype in DTYPES
        }
    )
    for one in (config, *(getattr(config, key) for key in config.sub_configs)):
        if one is not None:
            one.dtype = dtype
    for one in (config, config.get_text_config()):
        for key in RECORDS:
            if getattr(one, key, False):
                setattr(one, key, False)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model: PreTrainedModel = model_class(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model, dtype


def _has_experts(layer: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules())


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_in(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
