"""Which file of a folder is at fault where transformers does not load the model in it? It does not say so itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from secateur.errors import SecateurError, foreign

GENERATION = "generation_config.json"
MISFIT = "config.json does not fit the weights"
LISTED = 3  # tensors in a message


@contextlib.contextmanager
def faults_named(folder: Path, misfits: Callable[[], Iterable[Any]] = tuple) -> Iterator[None]:
    """Make one line of what transformers raises while it loads the model of a folder, with the file at fault.

    Args:
        misfits: gives the tensors whose shapes differ, as `in_words` takes them, once something was raised.

    Raises:
        SecateurError: it raised something. OSError: as it is.
    """
    with foreign(f"{folder}: transformers cannot load this model from its config.json and weights"):
        try:
            yield
        except (SecateurError, OSError):
            raise
        except Exception as error:  # of any kind
            _check_generation_config(folder / GENERATION)
            if found := in_words(misfits()):
                raise SecateurError(f"{folder}: {found}") from error
            raise


def _check_generation_config(path: Path) -> None:
    if path.is_file():
        with foreign(f"{path}: transformers cannot use it"), contextlib.suppress(OSError):
            GenerationConfig.from_pretrained(path.parent)


def in_words(misfits: Iterable[Any]) -> str:
    """Tensors that transformers lists as (name, its size in the files, its size in the model); "" for none."""
    listed = [f"{name} is {tuple(stored)}, expected {tuple(built)}" for name, stored, built in misfits]
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return f"{MISFIT}: {', '.join(sorted(listed)[:LISTED])}{more}" if listed else ""
