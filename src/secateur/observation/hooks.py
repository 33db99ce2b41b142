"""Hooks that stay with their model: a copy of the model is a plain one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class OfOneModel:
    """A hook of a module or parameter. In a copy (`deepcopy`, pickle, `torch.save`) stands one that does nothing.

    Without it a copy would count for the original, and what the hook knows, the optimizer say, would be copied too.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def _nothing() -> Callable[..., None]:
    """A function of any arguments that whoever loads a copy has, also without this package."""
    return contextlib.nullcontext().__exit__
