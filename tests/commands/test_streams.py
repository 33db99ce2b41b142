"""Every text can be printed: signs and names that the terminal does not have, and what looks like markup."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from secateur import cli
from secateur.commands import bars
from secateur.commands.exits import fail
from secateur.commands.streams import all_signs_printable, check_words
from secateur.errors import SecateurError


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_signs_that_the_terminal_does_not_have_are_written_in_ascii(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(out, encoding="ascii"))
    all_signs_printable()
    print("1 ± 2 \udcff é", flush=True, file=getattr(sys, name))
    assert out.getvalue() == b"1 +- 2 \\udcff \\xe9\n"


def test_what_looks_like_markup_is_printed_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("[red]a[/] b\\", 2)
    assert capfd.readouterr().err == "error: [red]a[/] b\\\n"
    shown = Console(file=io.StringIO(), width=80)
    bar = bars._bar(show=True)
    bar.add_task("[red]a[/b]", total=1)
    shown.print(Progress.make_tasks_table(bar, bar.tasks))
    assert "[red]a[/b]" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_an_empty_argument_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["secateur", "inspect", ""])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capfd.readouterr().err.startswith("error: an empty argument after 'inspect'")
    with pytest.raises(SecateurError, match="an empty argument as the command"):
        check_words(["", "inspect"])
