"""Ctrl-C and SIGTERM: one line that says how to go on, the status of the signal, and nothing half-done left."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur import cli
from secateur.__main__ import main as process
from secateur.commands.exits import fail
from secateur.commands.interrupts import Interrupted, interruptible, interruption_in, leave_interrupted
from secateur.errors import SecateurError
from secateur.placement import milp
from support.faults import Signal, replace
from support.model_folders import plan_of, saved
from support.models_with_text import model_with_text
from support.small_runs import in_child

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted by SIGTERM"}
SHARD = "secateur.model_folder.rewrite.writer:Writer.__exit__"
STEP = "secateur.model_folder.stream.states:DiskStates.put"
KEPT = "run the same command again to resume"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a plan for it, and text beside it."""
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "model")
    plan_of((0, [6, 1, 3]), (2, [2, 5, 7])).save(root / "plan.json")
    model_with_text(root / "text")
    return root


def command(words: list[str], *hooks: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    for hook in hooks:
        hook()
    sys.argv = ["secateur", *words]
    cli.main()


def interrupted(said: Path, words: list[str], *hooks: Callable[[], None]) -> tuple[int, str]:
    status = in_child(command, words, *hooks, stderr=said)
    return status, said.read_text()


@pytest.mark.process
@pytest.mark.parametrize("number", STATUS)
def test_a_command_that_begins_anew_leaves_nothing(made: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "here").mkdir()
    words = ["apply", str(made / "model"), str(made / "plan.json"), "--out", str(tmp_path / "here" / "out")]
    words += ["--undo", str(tmp_path / "here" / "undo"), "--quiet"]
    found = interrupted(tmp_path / "said", words, Signal(SHARD, 2, number))
    assert found == (STATUS[number], f"error: {SAID[number]}; run the same command again\n")
    assert not list((tmp_path / "here").iterdir())


def observed(made: Path, out: Path) -> list[str]:
    data = [word for name in ("code", "prose") for word in ("--data", str(made / "text" / f"{name}.jsonl"))]
    small = ["--samples", "4", "--sequence-length", "16", "--batch-size", "4", "--activations", "disk", "--quiet"]
    return ["observe", str(made / "text" / "source"), "--out", str(out), *data, *small]


@pytest.mark.process
def test_a_command_that_resumes_says_so_and_does(made: Path, tmp_path: Path) -> None:
    words = observed(made, tmp_path / "stats")
    found = interrupted(tmp_path / "said", words, Signal(STEP, 2, signal.SIGTERM))
    assert found == (143, f"error: interrupted by SIGTERM; {KEPT}\n")
    assert (tmp_path / ".stats.work").is_dir()
    assert interrupted(tmp_path / "said", words) == (0, "")
    assert not (tmp_path / ".stats.work").exists()


@pytest.mark.process
@pytest.mark.slow
def test_a_second_signal_while_cleaning_up_is_no_traceback(made: Path, tmp_path: Path) -> None:
    """What it leaves is removed by the next start."""
    words = ["apply", str(made / "model"), str(made / "plan.json"), "--out", str(tmp_path / "out"), "--quiet"]
    twice = (Signal(SHARD, 2, signal.SIGINT), Signal("shutil:rmtree", 1, signal.SIGINT))
    assert interrupted(tmp_path / "said", words, *twice) == (130, "error: interrupted; run the same command again\n")
    assert list(tmp_path.glob(".out.*.partial"))
    assert interrupted(tmp_path / "said", words) == (0, "")
    assert not list(tmp_path.glob(".out.*"))


def later(number: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_the_solver_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS runs in a thread of its own; in this one Python would see the signal when it has ended."""
    ends = threading.Event()
    monkeypatch.setattr(milp, "milp", lambda *args, **kwargs: ends.wait(30))
    began = time.monotonic()
    later(signal.SIGINT, 0.5)
    with interruptible(), pytest.raises(Interrupted):
        milp.exact([5.0, 4.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.5], 3)
    ends.set()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_raises_while_it_lasts_and_is_as_before_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible():
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), number)
        assert isinstance(caught.value, Interrupted)
        assert caught.value.number == number
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_a_signal_every_error_is_its_doing() -> None:
    """Code in C++ may lose what the signal raised, and fail at something else."""
    with interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        found = interruption_in(SecateurError("it cannot be read"))
        assert isinstance(found, Interrupted)
        assert found.number == signal.SIGTERM
    with interruptible():
        assert interruption_in(SecateurError("it cannot be read")) is None


def ends(*hooks: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    for hook in hooks:
        hook()
    process()


class AtTheEnd:
    """A command that is done, and a signal that comes when the first of both is about to be ignored."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.is_done = number, False

    def __call__(self) -> None:
        replace("signal:signal", self._after_one)
        replace("secateur.cli:main", lambda main: self._done)

    def _done(self) -> None:
        self.is_done = True
        raise SystemExit(0)

    def _after_one(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_handler(number: int, handler: Any) -> Any:
            if handler is signal.SIG_IGN and self.is_done:
                self.is_done = False  # once
                os.kill(os.getpid(), self.number)
            return original(number, handler)

        return set_handler


@pytest.mark.process
@pytest.mark.parametrize("number", STATUS)
def test_a_signal_in_the_moment_of_the_end_is_no_traceback(number: signal.Signals, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert in_child(ends, AtTheEnd(number), stderr=said) == STATUS[number]
    assert said.read_text() == f"error: {SAID[number]}; run the same command again\n"


def test_at_the_end_of_the_process_signals_are_ignored() -> None:
    before = {number: signal.getsignal(number) for number in STATUS}
    try:
        with interruptible(to_the_end=True):
            pass
        for number in STATUS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raised(make: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - of any kind
        make()
    return caught.value


def test_the_interruption_is_found_behind_what_was_made_of_it() -> None:
    first = Interrupted(signal.SIGTERM)

    def as_typer() -> None:
        try:
            raise first
        except KeyboardInterrupt as error:
            raise SystemExit(130) from error

    def while_cleaning_up() -> None:
        try:
            raise first
        finally:
            raise OSError("the folder cannot be removed")

    def after_it_was_caught() -> None:
        try:
            raise first
        except KeyboardInterrupt:
            fail("bad input", 2)

    assert interruption_in(first) is first
    assert interruption_in(raised(as_typer)) is first
    assert interruption_in(raised(while_cleaning_up)) is first
    assert interruption_in(raised(after_it_was_caught)) is None
    assert interruption_in(SystemExit(130)) is None
    assert interruption_in(OSError("no")) is None


@pytest.mark.parametrize(("rank", "said"), [("0", "error: interrupted; run the same command again\n"), ("1", "")])
def test_a_job_says_one_line_and_a_second_signal_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str, said: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert getattr(raised(lambda: leave_interrupted(KeyboardInterrupt())), "code", None) == 130
    assert capfd.readouterr().err == said
    assert [signal.getsignal(number) for number in STATUS] == [signal.SIG_IGN] * 2
