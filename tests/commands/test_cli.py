"""The command line: one program under two names, one option a setting, quick help, clear ends."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import secateur
from secateur import cli
from secateur.commands.pretrain import SHOWING, _field
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions, option
from secateur.reporting import write as reporting
from support.small_runs import STRICT, arguments, corpus_in, in_child, light_report, options, strict

BRIEF = {"steps": 16, "log_steps": 2, "eval_steps": 8, "save_steps": 8}
NOT_SETTINGS = (*SHOWING, "out", "checkpoint_on_sigterm", "resume", "dry_run", "set")
SETTINGS = {field.name: field for field in dataclasses.fields(PretrainOptions)}
COMMAND = get_command(cli.app)
OPTIONS = {parameter.name: parameter for parameter in COMMAND.commands["pretrain"].params}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "secateur", *words], capture_output=True, text=True, check=False)


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["secateur", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def test_every_setting_is_an_option_and_every_option_a_setting() -> None:
    assert set(OPTIONS) - set(NOT_SETTINGS) - {"help"} == set(SETTINGS) - {"overrides"}
    assert set(NOT_SETTINGS) <= set(OPTIONS)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "overrides"])
def test_an_option_has_the_name_and_the_default_of_its_setting(name: str) -> None:
    parameter, field = OPTIONS[name], SETTINGS[name]
    assert option(name) in parameter.opts
    default = tuple(parameter.default or ()) if parameter.multiple else parameter.default
    assert default == field.default
    assert type(default) is type(field.default)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_what_it_is(name: str) -> None:
    assert OPTIONS[name].help


def test_the_default_command_line_is_the_default_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[PretrainOptions] = []
    monkeypatch.setattr(program, "run_pretraining", lambda options, out, **_: found.append(options) or REPORT)
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path / "run")) == 0
    assert found == [PretrainOptions()]


@pytest.mark.slow
def test_every_option_reaches_its_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a value that is not the default, one by one, because some contradict one another."""
    found: list[PretrainOptions] = []
    monkeypatch.setattr(program, "run_pretraining", lambda options, out, **_: found.append(options) or REPORT)
    special: dict[str, Any] = {
        "precision": "bf16",
        "rearrange_method": "greedy",
        "prune": ("stable alpha=0.2", "step=90 beta=0.1"),
        "data": ("a=b", "c"),
        "overrides": {"hidden_size": 48, "hidden_act": "gelu", "rope_parameters": {"rope_theta": 1.5}},
        "validation_share": 0.1,
    }
    for name, field in SETTINGS.items():
        kind = str(field.type)
        value = special.get(name)
        if value is None:
            value = True if "bool" in kind else 0.25 if "float" in kind else 50 if "int" in kind else "text"
        changed = PretrainOptions(**{name: value})
        COMMAND.main(["pretrain", "--out", str(tmp_path), *words_of(changed, name)], "secateur", standalone_mode=False)
        assert found[-1] == changed, name
    assert len(found) == len(SETTINGS)


def words_of(changed: PretrainOptions, name: str) -> list[str]:
    """The words for one setting only."""
    plain = {key: value for key, value in changed.to_json().items() if key == name}
    words: list[str] = []
    for key, value in plain.items():
        if key == "overrides":
            words += [word for field, one in value.items() for word in ("--set", f"{field}={json.dumps(one)}")]
        elif value is True:
            words.append(option(key))
        else:
            words += [
                word for one in (value if isinstance(value, list) else [value]) for word in (option(key), str(one))
            ]
    return words


REPORT = {"events": [], "unpruned": None, "validation_loss": 1.0, "tokens_per_second": {"before": 1.0, "after": None}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=3", ("a", 3)),
        ("a=1e-6", ("a", 1e-6)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=silu", ("a", "silu")),
        ('a="3"', ("a", "3")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_a_field_is_json_where_it_can_be(text: str, expected: tuple[str, Any]) -> None:
    assert _field(text) == expected


def test_help_has_an_example_and_the_default_of_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(monkeypatch, "pretrain", "--help") == 0
    text = capsys.readouterr().out
    assert "Example: secateur pretrain --out run" in text
    for name in SETTINGS:
        assert option(name) in text


def test_a_process_that_ends_does_not_look_for_garbage_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(cli.atexit, "register", at_exit.append)
    assert main(monkeypatch, "--version") == 0
    assert at_exit == [gc.freeze]


@pytest.mark.process
def test_help_is_answered_without_loading_anything_heavy() -> None:
    code = """
import sys
from secateur.cli import main
sys.argv = ["secateur", "pretrain", "--help"]
try:
    main()
except SystemExit:
    print([name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.process
@pytest.mark.slow
def test_both_names_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("secateur")
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    for words in (["--version"], ["pretrain", "--help"], ["prune"]):
        one = subprocess.run([str(script), *words], capture_output=True, text=True, check=False)
        other = run(*words)
        assert (one.returncode, one.stdout) == (other.returncode, other.stdout)
        assert one.stderr == other.stderr


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == secateur.__version__


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "--out", "run", "--dry-run", *arguments(options(corpus, control=True))]
    assert main(monkeypatch, *words) == 0
    text = capsys.readouterr().out
    for part in ("qwen3_moe", "8 experts", "40 steps", "128 tokens", "MiB", "step 23", "control run", "0.67"):
        assert part in text
    assert main(monkeypatch, *words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["training"]["tokens"] == 40 * 128
    assert list(tmp_path.iterdir()) == []


def test_json_puts_the_report_alone_on_standard_output_and_report_writes_it_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting, "png", lambda figure: b"drawn")  # it takes longer than all the rest
    words = arguments(options(corpus, steps=10, eval_steps=10, prune_at_step=5))
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path / "run"), "--json", *words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == strict(tmp_path / "run" / "report.json")
    assert "pretrain 10/10" in err
    before = (tmp_path / "run" / "report.json").read_bytes()
    assert main(monkeypatch, "report", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.json").read_bytes() == before


def test_the_result_says_what_was_pruned_and_where_it_is(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "write_report", light_report)
    words = arguments(options(corpus, steps=10, eval_steps=10, prune_at_step=5))
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path / "run"), "--quiet", *words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (event,) = strict(tmp_path / "run" / "events.json")
    assert f"16 -> {event['experts_after']} experts" in out
    assert f"{event['parameters_before']:,} -> {event['parameters_after']:,} parameters" in out
    assert str(tmp_path / "run" / "model") in out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pretrain"],
        ["pretrain", "--out"],
        ["pretrain", "--out", "x", "--stepz", "3"],
        ["pretrain", "--out", "x", "--steps", "many"],
        ["prune"],
        ["report", "/missing"],
        ["pretrain", "--out", "x", "--resume", "--dry-run"],
        ["pretrain", "--out", "x", "--set", "hidden_size"],
        ["pretrain", "--out", "x", "--set", "=3"],
    ],
)
def test_words_that_make_no_command_end_with_status_2(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, *words) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_write_is_one_line_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr(program, "run_pretraining", refuse)
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path)) == 1
    assert capsys.readouterr().err == (
        "error: run/metrics.jsonl: No space left on device; nothing half-written has the name of a result; make room "
        "and run the same command again\n"
    )


def test_an_error_of_several_lines_is_put_into_one_and_its_brackets_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise secateur.SecateurError("first [red]line[/red]\n    second " + "long " * 60)

    monkeypatch.setattr(program, "run_pretraining", refuse)
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == "error: first [red]line[/red] second " + ("long " * 60).strip() + "\n"


def run_command(out: Path, words: list[str]) -> None:
    program.write_report = light_report
    sys.argv = ["secateur", "pretrain", "--out", str(out), *words]
    cli.main()


def interrupted(out: Path, words: list[str]) -> None:
    from secateur.pretraining.run_log import RunLog

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    steps = RunLog.on_step_end

    def ctrl_c(self: RunLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        steps(self, args, state, control, **kwargs)

    RunLog.on_step_end = ctrl_c  # type: ignore[method-assign]
    run_command(out, words)


@pytest.mark.process
@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_with_status_130(corpus: Path, tmp_path: Path) -> None:
    said = tmp_path / "stderr"
    words = arguments(options(corpus, **BRIEF, prune_at_step=9))
    assert in_child(interrupted, tmp_path / "run", [*words, "--quiet"], stderr=said) == 130
    assert said.read_text() == "error: interrupted; go on with --resume\n"
    assert in_child(run_command, tmp_path / "run", ["--resume", "--quiet"], stderr=said) == 0


@pytest.mark.parametrize(
    ("size", "named"), [("2", ["cannot meet the other processes", "torchrun"]), ("two", ["WORLD_SIZE is 'two'"])]
)
def test_a_job_that_cannot_be_is_refused_by_name(
    size: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(monkeypatch, "pretrain", "--out", str(tmp_path / "run")) == 2
    text = capsys.readouterr().err
    assert all(part in text for part in named)
    assert len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_processes_of_the_job_and_the_memory_of_each(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "--out", "run", "--dry-run", *arguments(options(corpus, target_params=0.75))]
    assert main(monkeypatch, *words) == 0
    assert "processes" not in capsys.readouterr().out
    for split, expected in (
        (["--ep", "4"], {"processes": 4, "fsdp": 4, "ep": 4, "tp": 1}),
        (["--fsdp", "2", "--tp", "2", "--set", "num_key_value_heads=2"], {"processes": 4, "fsdp": 2, "ep": 1, "tp": 2}),
    ):
        assert main(monkeypatch, *words, *split) == 0
        assert "4 processes: fsdp" in capsys.readouterr().out
        assert main(monkeypatch, *words, *split, "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["devices"] == expected
        for name, size in plan["memory_bytes"].items():
            assert plan["memory_bytes_per_process"][name] == pytest.approx(size / 4, abs=1)
    assert list(tmp_path.iterdir()) == []


def run_on_terminal(out: Path, words: list[str]) -> None:
    os.environ.pop("COLUMNS", None)  # pytest may set it
    os.environ["TERM"] = "xterm"
    run_command(out, words)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_gets_a_bar_with_all_numbers_in_its_width(corpus: Path, tmp_path: Path, columns: int) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while chunk := os.read(master, 65536):
                seen.extend(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    words = [*arguments(options(corpus, **BRIEF, **STRICT, window_steps=2))]
    assert in_child(run_on_terminal, tmp_path / "run", words, stderr=Path(os.ttyname(slave))) == 0
    os.close(slave)
    reader.join(10)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    found = [line for line in re.split(r"[\r\n]+", text) if "16/16" in line]
    assert found
    for part in (
        r"loss \d\.\d{3}",
        r"[\d,]+ tok/s",
        r"(moving, regret|unknown, noise|unlearned, change) [\d.]+%",
        r"load max/mean \d\.\d",
        r"\d:\d\d:\d\d\s*$",
    ):
        assert re.search(part, found[-1]), part
    assert len(found[-1]) <= columns
    assert ("━" in found[-1]) == (columns == 140)
