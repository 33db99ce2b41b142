"""The garbage collector while a model folder is read."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.model_folder.read import model_folder
from secateur.model_folder.read.collector import collector_at_rest


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    was = gc.isenabled()
    yield
    (gc.enable if was else gc.disable)()


def test_the_collector_rests_inside_and_works_again_after_an_error() -> None:
    gc.enable()
    inside = []
    with pytest.raises(ZeroDivisionError), collector_at_rest():
        inside.append(gc.isenabled() or 1 // 0)
    assert (inside, gc.isenabled()) == ([], True)


def test_a_collector_that_somebody_switched_off_stays_off() -> None:
    gc.disable()
    with collector_at_rest(), collector_at_rest():
        pass
    assert not gc.isenabled()


def test_a_folder_is_read_with_the_collector_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(model_folder, "understand", lambda files, *more: seen.append((files, gc.isenabled())))
    monkeypatch.setattr(model_folder, "read_tensor_files", lambda path: (path, gc.isenabled()))
    gc.enable()
    model_folder.read_model_folder(tmp_path)
    assert seen == [((tmp_path, False), False)]
    assert gc.isenabled()


def test_a_folder_that_its_headers_refuse_is_refused_before_its_model_class_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "understand", lambda files: pytest.fail("the class was looked for"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(SecateurError, match="expected model"):
        model_folder.read_model_folder(tmp_path)
