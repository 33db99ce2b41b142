"""What a model is trained and measured on, ready for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from secateur.data.images import Images


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """
    Args:
        unit: "tokens" or "images", which speed is counted in; per_item: how many an item of a dataset is.
        train: items to train on. evaluation: by name, items to measure the loss on.
        collate: makes a batch of items; None where transformers does.
        set_epoch: to be called with the number of every epoch that begins.
        together: items whose results depend on each other; measured in batches of a multiple of that.
        images: what is trained on, where that is images. about: as JSON, with a digest of all of it.
    """

    unit: str
    per_item: int
    train: Dataset[Any]
    evaluation: Mapping[str, Dataset[Any]]
    about: Mapping[str, Any]
    collate: Callable[[list[Any]], dict[str, Any]] | None = None
    set_epoch: Callable[[int], None] = lambda epoch: None
    together: int = 1
    images: Images | None = None

    @property
    def num_items(self) -> int:
        return size(self.train)

    def eval_batch(self, batch_size: int) -> int:
        """At least `batch_size`, in whole groups of items that belong together."""
        return -(-batch_size // self.together) * self.together


def size(dataset: Dataset[Any]) -> int:
    found: Any = dataset
    return len(found)
