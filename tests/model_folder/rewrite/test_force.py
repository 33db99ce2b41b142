"""--force replaces an earlier result as a whole and in one step, and never anything that is not ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.files import new_folder
from secateur.files.exchange import exchange
from secateur.folder_kinds.apply import apply
from secateur.model_folder.prune import prune
from secateur.plans import Plan
from support.long_tests import long
from support.model_folders import contents, plan_of, saved

FEW = plan_of((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2]))
MORE = plan_of((0, [1, 2, 3, 4]), (1, [1, 2, 3, 4]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("force") / "source"
    saved("mixtral", path)
    return path


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """An earlier result."""
    apply(source, FEW, tmp_path / "out")
    return tmp_path / "out"


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_earlier_result_is_replaced_by_what_a_new_folder_would_get(source: Path, out: Path) -> None:
    with pytest.raises(SecateurError, match="it is there already"):
        apply(source, MORE, out)
    apply(source, MORE, out.parent / "fresh")
    apply(source, MORE, out, force=True, undo=out.parent / "undo")
    assert contents(out) == contents(out.parent / "fresh")
    assert "modeling_secateur.py" in contents(out)
    apply(source, FEW, out, force=True)
    assert "modeling_secateur.py" not in contents(out)
    assert listed(out.parent) == ["fresh", "out", "undo"]
    apply(source, FEW, out.parent / "third", force=True)  # a free name needs no force
    assert contents(out.parent / "third") == contents(out)


def foreign_file(out: Path) -> str:
    (out / "notes").mkdir()
    (out / "notes/mine.txt").write_text("mine")
    return "notes/mine.txt in it is not of the result"


def other_folder(out: Path) -> str:
    (out / "report.json").unlink()
    return "no report.json in it; expected a folder that `apply` or `prune` wrote"


def other_report(out: Path) -> str:
    (out / "report.json").write_text("{}")
    return "report.json: Object missing required field|missing"


def link_in_it(out: Path) -> str:
    (out / "elsewhere").symlink_to(out.parent)
    return "elsewhere in it is not of the result"


def link(out: Path) -> str:
    out.rename(out.parent / "real")
    out.symlink_to(out.parent / "real")
    return "no folder; --force replaces only one that"


def file(out: Path) -> str:
    out.rename(out.parent / "real")
    out.write_text("mine")
    return "no folder; --force replaces only one that"


@pytest.mark.parametrize("damage", [foreign_file, other_folder, other_report, link_in_it, link, file])
def test_what_is_not_an_earlier_result_alone_is_refused_and_stays(
    damage: Callable[[Path], str], source: Path, out: Path
) -> None:
    message = damage(out)
    before = contents(out.parent)
    with pytest.raises(SecateurError, match=message):
        apply(source, MORE, out, force=True)
    assert contents(out.parent) == before


def test_the_source_and_an_undo_folder_are_never_replaced(source: Path, out: Path) -> None:
    with pytest.raises(SecateurError, match="the same or inside each other"):
        apply(out, plan_of((0, [0, 1]), experts=3), out, force=True)
    apply(source, FEW, out.parent / "again", undo=out.parent / "undo")
    with pytest.raises(SecateurError, match=r"--undo .*: it is there already"):
        apply(source, MORE, out, force=True, undo=out.parent / "undo")
    with pytest.raises(SecateurError, match="takes no other option"):
        apply(out.parent / "again", out.parent / "undo", out, force=True)


def broken(*_: Path) -> None:
    raise OSError("no exchange here")


def filled(one: Path, other: Path) -> None:
    """What exchanges the two, and puts a file into the folder at the first call: while the result is written."""
    (other.parent / "out/mine.txt").write_text("mine")
    exchange(one, other)


@pytest.mark.parametrize(
    ("instead", "message"), [(broken, "no exchange here"), (filled, "mine.txt in it is not of the result")]
)
def test_when_it_fails_the_earlier_result_is_as_it_was(
    instead: Callable[..., None], message: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(new_folder, "exchange", instead)
        with pytest.raises((OSError, SecateurError), match=message):
            apply(source, MORE, out, force=True)
    assert {name: data for name, data in contents(out).items() if name != "mine.txt"} == before
    assert listed(out.parent) == ["out"]


def test_two_folders_change_names_in_one_step_or_stay(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one/is").read_text() == "other"
    with pytest.raises(OSError, match="cannot be exchanged in one step here"):
        exchange(tmp_path / "one", tmp_path / "none")
    assert (tmp_path / "one/is").read_text() == "other"


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("keep", "after"),
    [
        pytest.param(4, False, id="the same request, before the exchange"),
        pytest.param(6, True, id="another request, after the exchange"),
        pytest.param(4, True, id="the same request, after the exchange", marks=long),
        pytest.param(6, False, id="another request, before the exchange", marks=long),
    ],
)
def test_prune_killed_at_the_exchange_leaves_one_of_the_two_and_ends_in_the_new_one(
    after: bool, keep: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, undo = tmp_path / "out", tmp_path / "undo"
    prune(source, out, keep=keep, criterion="weight_norm", verify_tokens=0)
    old = contents(out)
    again = {"keep": 4, "criterion": "weight_norm", "verify_tokens": 0, "undo": undo, "force": True}
    prune(source, out, dry_run=True, **again)  # type: ignore[arg-type]
    assert contents(tmp_path) == {f"out/{name}": data for name, data in old.items()}
    calls: list[Path] = []

    def killed(one: Path, other: Path) -> None:
        calls.append(other)
        if len(calls) == 1 or after:  # the first one only tries whether this disk can do it
            exchange(one, other)
        if len(calls) == 2:
            raise Killed

    number = out.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(new_folder, "exchange", killed)
        with pytest.raises(Killed):
            prune(source, out, **again)  # type: ignore[arg-type]
    assert (out.stat().st_ino != number) == after
    done = prune(source, out, **again)  # type: ignore[arg-type]
    assert len(calls) == 2
    assert set(done.experts_after.values()) == {4}
    assert out.stat().st_ino != number
    assert Plan.load(out / "plan.json").layers == done.plan.layers if done.plan else False
    assert listed(tmp_path) == ["out", "undo"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
