"""Claims of `verify` that hold or fall by one thing, each asked for alone."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError
from secateur.model_folder.checks import computes, contents
from secateur.model_folder.checks.claims import check_tokens
from secateur.model_folder.checks.sample import NEW_TOKENS
from secateur.model_folder.rewrite.side_files import SideFiles


def pruning(path: Path, **files: Any) -> Any:
    """Two folders of which only these parts are looked at."""
    shared = {"path": path, "config": {}, "headers": {}, "tensors": {}, "index": None}
    return SimpleNamespace(
        before=SimpleNamespace(files=SimpleNamespace(**shared)),
        after=SimpleNamespace(files=SimpleNamespace(**shared | files)),
    )


@pytest.mark.parametrize(("content", "failure"), [(b"new", ""), (b"old", "params.json is not what"), (None, "missing")])
def test_a_file_that_the_plan_rewrites_has_the_bytes_of_that(
    tmp_path: Path, content: bytes | None, failure: str
) -> None:
    if content is not None:
        (tmp_path / "params.json").write_bytes(content)
    files = SideFiles(copied=(), rewritten={PurePosixPath("params.json"): b"new"}, left_out={})
    found = contents._side_files(pruning(tmp_path), files)
    assert (found.passed, failure in found.detail) == (not failure, True)


def test_an_index_is_there_where_the_source_has_one_and_nowhere_else(tmp_path: Path) -> None:
    both = pruning(tmp_path)
    assert contents._index(both).passed is True
    unexpected = contents._index(pruning(tmp_path, index={}))
    assert (unexpected.passed, unexpected.detail) == (False, "model.safetensors.index.json is unexpected")
    missing = contents._index(SimpleNamespace(before=pruning(tmp_path, index={}).after, after=both.after))  # type: ignore[arg-type]
    assert (missing.passed, missing.detail) == (False, "model.safetensors.index.json is missing")


@pytest.mark.parametrize(("said", "passed"), [([1] * NEW_TOKENS, True), ([1] * (NEW_TOKENS - 1), False), (None, None)])
def test_a_model_generates_all_tokens_that_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: list[int] | None, passed: bool | None
) -> None:
    monkeypatch.setattr(computes, "generated", lambda model, sample: said)
    assert computes._speaks(None, torch.zeros(1, 2)).passed is passed  # type: ignore[arg-type]


def test_a_sample_of_one_token_shows_nothing_and_is_refused() -> None:
    for number in (0, 2, 32):
        check_tokens(number)
    for number in (1, -1):
        with pytest.raises(SecateurError, match=f"--tokens {number}: expected 0, or 2 and more"):
            check_tokens(number)
