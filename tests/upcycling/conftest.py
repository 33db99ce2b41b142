"""Tiny dense parents, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.dense_models import parents_in


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Llama seed and two children of it, 32 wide, 48 neurons, 2 layers, untied."""
    return parents_in(tmp_path_factory.mktemp("llamas"))
