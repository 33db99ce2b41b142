"""Every tensor of a model folder and what it is: an expert's, a router's, or neither. All checks of names are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import SecateurError
from secateur.expert_axis import SUSPICIOUS, ExpertTensor, check_axis
from secateur.model_folder.read.collector import collector_at_rest
from secateur.model_folder.read.names import Name, is_mtp, split
from secateur.model_folder.read.tensor_files import StoredTensor, TensorFiles, read_tensor_files

if TYPE_CHECKING:
    from secateur.model_folder.read.config import ModelConfig
    from secateur.model_folder.read.layout import Layout, Match, Role

LISTED = 5  # names in a message
EXPERTS_FROM = BY_CONFIG, BY_FILES = "config", "files"


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """A tensor of the experts of one layer.

    spec: its expert axis, where it holds all experts. expert, before, after: where it is one expert's own, that
    expert's place among those of the layer, and what its name is before and after the number.
    """

    layer: int
    role: Role
    key: str
    spec: ExpertTensor | None = None
    expert: int = 0
    before: str = ""
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder understood.

    located: tensors with experts in them, by name. counts: experts of every MoE layer of the model; mtp_counts: of
    its multi-token-prediction layers, numbered on from the last decoder layer. slots: that the routers of the former
    choose among; more than the experts where some were removed into zero slots. mtp: all tensors of MTP layers.
    """

    files: TensorFiles
    config: ModelConfig
    layout: Layout
    located: Mapping[str, ExpertPart]
    counts: Mapping[int, int]
    mtp_counts: Mapping[int, int]
    mtp: frozenset[str]

    @property
    def all_counts(self) -> dict[int, int]:
        return {**self.counts, **self.mtp_counts}

    @property
    def slots(self) -> dict[int, int]:
        return {**self.counts, **(self.config.slots or {})}


def read_model_folder(path: Path, experts_from: str = BY_CONFIG) -> ModelFolder:
    """Read a model folder and find its experts; see `read_tensor_files` and `understand` for what is an error."""
    with collector_at_rest():
        return understand(read_tensor_files(path), experts_from)


def understand(files: TensorFiles, experts_from: str = BY_CONFIG) -> ModelFolder:
    """Find the experts among the tensors of a folder.

    Args:
        experts_from: what says how many experts a layer has. BY_CONFIG: config.json, and files that hold others are an
            error. BY_FILES: the files; `config` is then what config.json should have said.

    Raises:
        SecateurError: the names fit none or two of the layouts, a name sounds like an expert's or a router's and no
            rule covers it, a tensor is missing, or holds another number of experts than the config says.
    """
    # here: what headers alone refuse needs no model class
    from secateur.model_folder.read.config import read_config
    from secateur.model_folder.read.plausible import check_plausible, no_more_than_files

    if experts_from not in EXPERTS_FROM:
        raise SecateurError(f"--experts-from {experts_from}: expected {' or '.join(EXPERTS_FROM)}")
    try:
        check_plausible(files.config, files.tensors)
        with no_more_than_files(files.tensors):
            config = read_config(files.config)
        return _understand(files, config, experts_from)
    except SecateurError as error:
        raise SecateurError(f"{files.path}: {error}") from error


def _understand(files: TensorFiles, config: ModelConfig, experts_from: str) -> ModelFolder:
    parts = {name: split(name) for name in files.tensors}
    layout, found = _choose(config.layouts, parts)
    hits = _hits(layout, parts, found, files.tensors)
    path = _path_of_layers(parts, hits)
    mtp = frozenset(
        name
        for name in parts
        if is_mtp(name) or ((parsed := parts[name]) and parsed.path == path and parsed.layer >= config.num_layers)
    )
    numbers: dict[int, set[int]] = {}
    by_layer: dict[int, list[str]] = {}
    for name, hit in hits.items():
        parsed = parts[name]
        assert parsed is not None
        layer = _layer(config, parsed)
        by_layer.setdefault(layer, []).append(name)
        if hit.axis is None:
            numbers.setdefault(layer, set()).add(hit.number)
    counts: dict[int, int] = {}
    mtp_counts: dict[int, int] = {}
    for layer, names in sorted(by_layer.items()):
        of_layer = {name: hits[name] for name in names}
        _check_rules(layout, layer, of_layer, in_mtp=names[0] in mtp)
        _check_own(layer, of_layer)
        count = len(numbers[layer]) if layer in numbers else _stacked_count(files, of_layer)
        (mtp_counts if names[0] in mtp else counts)[layer] = count
    if experts_from == BY_FILES and (said := _said(config, layout)) != counts:
        return _understand(*_corrected(files, config, said, counts), BY_CONFIG)
    _check_counts(config, layout, counts)
    located: dict[str, ExpertPart] = {}
    for layer, names in by_layer.items():
        place = {number: expert for expert, number in enumerate(sorted(numbers.get(layer, ())))}
        count = counts[layer] if layer in counts else mtp_counts[layer]
        for name in names:
            size = (config.slots or {}).get(layer, count) if hits[name].role == "router" else count
            located[name] = _locate(name, layer, hits[name], place, files.tensors[name], size)
    return ModelFolder(
        files=files,
        config=config,
        layout=layout,
        located=located,
        counts=counts,
        mtp_counts=mtp_counts,
        mtp=mtp,
    )


def _choose(layouts: Iterable[Layout], parts: Mapping[str, Name | None]) -> tuple[Layout, dict[str, Match]]:
    """The one layout in which the names have experts, and what it finds among them."""
    fits = {}
    for layout in layouts:
        found = _find(layout, parts)
        experts = frozenset(name for name, hit in found.items() if hit.role == "expert")
        if experts:
            fits[layout.title] = (layout, found, experts)
    if not fits:
        sounding = [name for name in parts if SUSPICIOUS.search(name)]
        raise SecateurError(
            f"no tensor has a name that experts of this family have; what sounds like experts or routers: "
            f"{sounding[:LISTED] or 'none'}"
        )
    if len({experts for _, _, experts in fits.values()}) > 1:
        listed = ", ".join(f"{min(experts)} ({title})" for title, (_, _, experts) in fits.items())
        raise SecateurError(f"two layouts at once: {listed}; expected one")
    return min(
        ((layout, found) for layout, found, _ in fits.values()),
        key=lambda fit: len(_left_over(fit[0], parts, fit[1])),
    )


def _find(layout: Layout, parts: Mapping[str, Name | None]) -> dict[str, Match]:
    """Name -> what it is by its rest, of those that have experts; a rest is looked up once for all layers."""
    known = {rest: layout.find(rest) for rest in {part.rest for part in parts.values() if part is not None}}
    return {name: hit for name, part in parts.items() if part is not None and (hit := known[part.rest]) is not None}


def _left_over(layout: Layout, parts: Mapping[str, Name | None], found: Mapping[str, Match]) -> list[str]:
    """Names that sound like an expert's or a router's and that the layout does not know."""
    return [
        name
        for name, part in parts.items()
        if (part is None or name not in found or not _may_hold_layers(layout, part))
        and SUSPICIOUS.search(name)
        and not layout.is_plain(name if part is None else part.rest)
    ]


def _hits(
    layout: Layout, parts: Mapping[str, Name | None], found: Mapping[str, Match], tensors: Mapping[str, StoredTensor]
) -> dict[str, Match]:
    left = _left_over(layout, parts, found)
    if left:
        raise SecateurError(
            f"{', '.join(left[:LISTED])}: {len(left)} names sound like those of experts or routers, and no rule covers "
            f"them (names {layout.title}; the first is in {tensors[left[0]].file})"
        )
    return {
        name: hit for name, hit in found.items() if (part := parts[name]) is not None and _may_hold_layers(layout, part)
    }


def _may_hold_layers(layout: Layout, parsed: Name) -> bool:
    return parsed.container in layout.containers or is_mtp(parsed.path)


def _layer(model: ModelConfig, parsed: Name) -> int:
    return parsed.layer + model.num_layers * is_mtp(parsed.path)


def _path_of_layers(parts: Mapping[str, Name | None], hits: Iterable[str]) -> str:
    """Where the decoder layers with experts are; there is one such place in a model."""
    paths: dict[str, str] = {}
    for name in hits:
        parsed = parts[name]
        if parsed is not None and not is_mtp(parsed.path):
            paths.setdefault(parsed.path, name)
    if len(paths) != 1:
        raise SecateurError(f"MoE layers under several paths: {', '.join(paths.values()) or 'none'}; expected one")
    return next(iter(paths))


def _check_rules(layout: Layout, layer: int, found: Mapping[str, Match], in_mtp: bool) -> None:
    keys = frozenset(hit.key for hit in found.values())
    if in_mtp:
        if keys not in layout.layers.values():
            raise SecateurError(f"layer {layer} (multi-token prediction) has {sorted(keys)}, unlike the other layers")
        return
    expected = layout.layers.get(layer, frozenset())
    if keys != expected:
        missing, beyond = sorted(expected - keys), sorted(keys - expected)
        raise SecateurError(f"layer {layer}: missing are tensors of {missing}, unexpected are those of {beyond}")


def _check_own(layer: int, found: Mapping[str, Match]) -> None:
    """Every expert of a layer has the same tensors."""
    of: dict[tuple[str, int], set[str]] = {}
    for hit in found.values():
        if hit.axis is None:
            of.setdefault((hit.key, hit.number), set()).add(hit.after)
    by_key: dict[str, set[str]] = {}
    for (key, _), names in of.items():
        by_key.setdefault(key, set()).update(names)
    for (key, number), names in of.items():
        lacking = by_key[key] - names
        if lacking:
            raise SecateurError(f"layer {layer}: {key}.{number} has no {sorted(lacking)[0]}, which other experts have")


def _stacked_count(folder: TensorFiles, found: Mapping[str, Match]) -> int:
    """By the first tensor of experts; all others are then compared with it."""
    name, hit = next((name, hit) for name, hit in found.items() if hit.axis is not None and hit.role == "expert")
    assert hit.axis is not None
    shape = folder.tensors[name].shape
    size = shape[hit.axis.dim] if hit.axis.dim < len(shape) else 0
    return (size - hit.axis.num_trailing) // hit.axis.rows_per_expert


def _locate(
    name: str, layer: int, hit: Match, place: Mapping[int, int], tensor: StoredTensor, count: int
) -> ExpertPart:
    if hit.axis is not None:
        spec = ExpertTensor(name=name, axis=hit.axis)
        check_axis(tensor.shape, spec, count)
        return ExpertPart(layer=layer, role=hit.role, key=hit.key, spec=spec)
    return ExpertPart(
        layer=layer,
        role=hit.role,
        key=hit.key,
        expert=place[hit.number],
        before=name.removesuffix(f"{hit.number}.{hit.after}"),
        after=hit.after,
    )


def _said(model: ModelConfig, layout: Layout) -> dict[int, int]:
    """{MoE layer: its experts by config.json}."""
    slots = dict.fromkeys(layout.layers, model.count) if model.slots is None else model.slots
    return {layer: len(model.kept.get(layer, range(count))) for layer, count in slots.items()}


def _check_counts(model: ModelConfig, layout: Layout, counts: Mapping[int, int]) -> None:
    expected = _said(model, layout)
    pruned = expected.keys() == counts.keys() and all(count <= expected[layer] for layer, count in counts.items())
    hint = "; what pruned them did not update config.json: --experts-from files takes the files' word" if pruned else ""
    for layer in sorted(expected.keys() | counts.keys()):
        if expected.get(layer) != counts.get(layer):
            raise SecateurError(
                f"layer {layer}: {counts.get(layer, 'no')} experts in the files, {expected.get(layer, 'none')} by "
                f"config.json{hint}"
            )


def _corrected(
    files: TensorFiles, model: ModelConfig, said: Mapping[int, int], counts: Mapping[int, int]
) -> tuple[TensorFiles, ModelConfig]:
    """The same files with the config.json that fits them.

    Raises:
        SecateurError: other layers have experts than config.json says, or no config can say these counts.
    """
    from secateur.model_folder.read.config import of_own_class, read_config
    from secateur.surgery.config_json import with_counts

    if said.keys() != counts.keys() or model.kept:
        raise SecateurError(f"layers {sorted(counts)} have experts in the files, {sorted(said)} by config.json")
    config = files.config
    if len(set(counts.values())) > 1:
        if model.is_nested:
            raise SecateurError(
                f"the layers have {sorted(set(counts.values()))} experts, but those of a {model.model_type!r} are in "
                "the text model inside it, which can only have one count for all layers"
            )
        config = of_own_class(config, model)
    config = with_counts(config, said, counts, model.num_layers)
    return dataclasses.replace(files, config=config), dataclasses.replace(read_config(config), is_as_written=False)
