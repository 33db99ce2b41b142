"""What a plan is made from: a statistics file, a training run's loads, or a model folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.decide.model_facts import ModelFacts, Sizes
from secateur.errors import SecateurError
from secateur.model_folder.measure.adapter import holds_adapter
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import BY_CONFIG, ModelFolder, read_model_folder
from secateur.observation.observation import Observation
from secateur.stats import RouterStats


@dataclass(frozen=True, kw_only=True)
class Source:
    """Args:
    facts: of the model to prune. stats: of its layers, where there are any, and the `data` they were taken on.
    found: its folder, where that is at hand; weights are read from it.
    finetuned, pretrained: the folder of the model or of its LoRA adapter, and the model it was fine-tuned from.
    left_out_bytes: of tensors that go whatever the plan says.
    """

    facts: ModelFacts
    stats: RouterStats | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    found: ModelFolder | None = None
    finetuned: Path | None = None
    pretrained: ModelFolder | None = None
    left_out_bytes: int = 0

    @property
    def sizes(self) -> Sizes:
        """What a plan has to make smaller."""
        sizes = self.facts.sizes
        return replace(sizes, total_bytes=sizes.total_bytes - self.left_out_bytes)


def read_source(
    path: Path,
    model: Path | None = None,
    pretrained: Path | None = None,
    *,
    experts_from: str = BY_CONFIG,
    with_mtp: bool = False,
) -> Source:
    """A statistics file, or the folder of a model or of a LoRA adapter.

    Args:
        pretrained: the folder of the model that it was fine-tuned from.
        model: the folder of the model that the statistics are of; needed where the file does not say which, and for
            criteria that read weights.
        experts_from: see `understand`. with_mtp: of a folder, whether layers that predict further tokens are to be
            pruned with the others.

    Raises:
        SecateurError: neither of the two, a damaged one, or statistics that are not of `model`.
    """
    if path.is_dir():
        if model is not None:
            raise SecateurError(f"--model {model}: {path} is a folder and taken as the model itself; give one of them")
        return of_folder(path, pretrained, experts_from=experts_from, with_mtp=with_mtp)
    if pretrained is not None:
        raise SecateurError(f"--pretrained {pretrained}: for the folder of a fine-tuned model, but {path} is none")
    if not path.exists():
        raise SecateurError(f"{path}: not there, expected a statistics file or the folder of a model")
    folder = None if model is None else read_model_folder(model, experts_from)
    return of_observation(Observation.load(path), folder, str(path))


def of_folder(
    path: Path, pretrained: Path | None = None, *, experts_from: str = BY_CONFIG, with_mtp: bool = False
) -> Source:
    """The folder of a model or of a LoRA adapter, and of the model it was fine-tuned from.

    Args:
        experts_from, with_mtp: see `read_source`.

    Raises:
        SecateurError: neither of the two, a damaged one, or an adapter without `pretrained`.
    """
    base = None if pretrained is None else read_model_folder(pretrained, experts_from)
    if not holds_adapter(path):
        folder = read_model_folder(path, experts_from)
        facts = model_facts(folder, with_mtp=with_mtp)
        return Source(facts=facts, found=folder, finetuned=path, pretrained=base)
    if base is None:
        raise SecateurError(f"{path}: a LoRA adapter; name the folder of the model that it is for with --pretrained")
    return Source(facts=model_facts(base), finetuned=path, pretrained=base)


def of_observation(observation: Observation, folder: ModelFolder | None, name: str) -> Source:
    """Statistics and the model they are of; `name` is theirs, for messages.

    Raises:
        SecateurError: nothing says which model that is, or it is not the model of `found`.
    """
    known = None if folder is None else model_facts(folder)
    told = observation.model
    if known is None and told is None:
        raise SecateurError(f"{name}: it does not say which model the statistics are of; name its folder with --model")
    if known is not None and told is not None and known.digest != told.digest:
        raise SecateurError(
            f"{name}: statistics of a {told.model_type} model with {_counts(told)}, but --model is a "
            f"{known.model_type} with {_counts(known)}, or one with other routers"
        )
    model = known or told
    assert model is not None
    # An observation checks its own facts; those of a folder are compared here.
    try:
        observation = Observation(stats=observation.stats, model=model, data=observation.data)
    except SecateurError as error:
        raise SecateurError(f"{name}: {error}") from error
    return Source(facts=model, stats=observation.stats, data=observation.data, found=folder)


def of_loads(loads: Mapping[int, Sequence[float]], model: Path, name: str) -> Source:
    """Tokens of each expert in a training run, and the model it left; `name` is their file, for messages."""
    folder = read_model_folder(model)
    known = model_facts(folder)
    counts = {layer: [int(count) for count in layer_loads] for layer, layer_loads in loads.items()}
    num_tokens = sum(map(sum, counts.values())) // (known.top_k * max(len(counts), 1))
    return of_observation(Observation(stats=RouterStats.from_loads(counts, num_tokens)), folder, name)


def _counts(model: ModelFacts) -> str:
    return f"{sum(model.num_experts.values())} experts in {len(model.num_experts)} layers"
