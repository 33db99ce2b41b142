"""Which neurons of a dense FFN belong to which expert? Every expert gets the same number.

Shapes: F neurons of a layer, D hidden size, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.progress import OnProgress
from secateur.model_folder.rewrite.computed import as_tensor
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.recipe import Division
from secateur.upcycling.targets import FFN

INSTALL = 'pip install "secateur[upcycling]"'


def needs_text(asked: Asked) -> bool:
    """Whether the division is made by what neurons do on text."""
    return asked.division == "coactivation" or asked.shared_neurons > 0


def divide(parents: Parents, plan: Blueprint, asked: Asked, busy: Sequence[Tensor] | None, on: OnProgress) -> Division:
    """The neurons of each layer: those of the shared expert, then those of each expert; ascending in each.

    Args:
        busy: of each layer, see `busy_neurons`; only where `needs_text`.
    """
    if asked.division == "order" and not plan.shared:
        return {}
    division = {}
    for layer in range(parents.layers):
        shared, rest = _shared(None if busy is None else busy[layer], plan.shared, parents.width)
        groups = _groups(parents, plan, asked, layer, rest, None if busy is None else busy[layer])
        division[layer] = [*shared, *(neuron for group in groups for neuron in sorted(group))]
        on(layer + 1, parents.layers)
    return division


def _shared(busy: Tensor | None, count: int, width: int) -> tuple[list[int], list[int]]:
    """(the neurons that are busy most often, the others), ascending."""
    if not count or busy is None:
        return [], list(range(width))
    times = busy.sum(1)
    first = sorted(range(width), key=lambda neuron: (-int(times[neuron]), neuron))[:count]
    chosen = set(first)
    return sorted(chosen), [neuron for neuron in range(width) if neuron not in chosen]


def _groups(
    parents: Parents, plan: Blueprint, asked: Asked, layer: int, rest: list[int], busy: Tensor | None
) -> list[list[int]]:
    count, size = len(plan.experts), plan.width
    if asked.division == "order":
        return [rest[at * size : (at + 1) * size] for at in range(count)]
    if asked.division == "kmeans":
        features = _gate_rows(parents, layer)[rest]
    else:
        assert busy is not None
        features = busy[rest].float()
    features = torch.nn.functional.normalize(features, dim=1)
    return [[rest[at] for at in group] for group in balanced(features, count, asked.seed + layer)]


def balanced(features: Tensor, count: int, seed: int) -> list[list[int]]:
    """Rows in `count` groups of equal size, by k-means with that constraint; groups by their smallest row.

    Args:
        features: (F, anything) float. F is a multiple of `count`.

    Raises:
        SecateurError: the package for it is not installed.
    """
    if count == 1:
        return [list(range(len(features)))]
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise SecateurError(
            f"--division kmeans and coactivation need the package k-means-constrained: {INSTALL}"
        ) from error
    size = len(features) // count
    found = KMeansConstrained(
        n_clusters=count, size_min=size, size_max=size, random_state=seed, n_init=1, max_iter=30
    ).fit_predict(features.numpy())
    groups: list[list[int]] = [[] for _ in range(count)]
    for row, group in enumerate(found):
        groups[int(group)].append(row)
    return sorted(groups)


def _gate_rows(parents: Parents, layer: int) -> Tensor:
    """(F, D) float32."""
    tensor = parents.first.files.tensors[f"model.layers.{layer}.{FFN['gate']}"]
    with (parents.first.path / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        return as_tensor(file.read(tensor.length), tensor.dtype).float().view(tensor.shape)
