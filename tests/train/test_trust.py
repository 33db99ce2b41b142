"""The optimizer's folder of a checkpoint cannot run code: torch reads its pickles after they were found harmless."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load, save

from secateur.errors import SecateurError
from secateur.train.distributed.trust import check_no_code

STATE = {"optimizer": {"state.weight.exp_avg": torch.arange(6.0), "param_groups.weight.lr": 0.5, "betas": (0.9, 0.95)}}
MARK = Path("ran")


class Hostile:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (MARK,)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(STATE, checkpoint_id=tmp_path / "optimizer", no_dist=True)
    return tmp_path / "optimizer"


def test_what_torch_writes_is_let_through(folder: Path) -> None:
    check_no_code(folder)


def test_a_hostile_description_is_refused_unread(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(SecateurError, match=r"\.metadata: its pickle names 'pathlib.*Path\.touch'|not loaded"):
        check_no_code(folder)
    assert not MARK.exists()
    with pytest.raises(BaseException):  # noqa: B017, PT011 - what torch does with it: it runs it
        load({"optimizer": {}}, checkpoint_id=folder, no_dist=True)
    assert MARK.exists()


def test_a_hostile_entry_is_refused_unread(tmp_path: Path, folder: Path) -> None:
    state = {"optimizer": STATE["optimizer"] | {"betas": Hostile()}}
    save(state, checkpoint_id=tmp_path / "hostile", no_dist=True)
    with pytest.raises(SecateurError, match=r"optimizer\.betas is not plain data and was not loaded"):
        check_no_code(tmp_path / "hostile")
    assert not MARK.exists()
    load({"optimizer": {"betas": None}}, checkpoint_id=tmp_path / "hostile", no_dist=True)
    assert MARK.exists()


def test_a_folder_that_lost_a_file_is_named(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(SecateurError, match=r"distcp.*missing"):
        check_no_code(folder)
