"""The public functions: each is its command, with the same options and the same results, and prints nothing."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from transformers.utils import logging
from typer.main import get_command

import secateur
from secateur import cli
from secateur.decide.by_score import ALLOCATIONS
from secateur.decide.rules import OPTIONS
from secateur.errors import SecateurError
from secateur.files.given import StrPath, StrPaths
from secateur.finetuning.options import OPTIMIZERS, SCHEDULES, FinetuneOptions
from secateur.model_folder.measure.data_choice import ACTIVATIONS
from secateur.model_folder.mtp import PRUNE
from secateur.model_folder.read.model_folder import EXPERTS_FROM
from secateur.model_folder.rewrite.apply import MTP_CHOICES, apply_to_model
from secateur.placement import METHODS, milp
from secateur.plans import REMOVED, Plan
from secateur.pretraining import run as pretraining
from secateur.pretraining.options import PRECISIONS, PretrainOptions
from secateur.reporting import write as reporting
from secateur.results import Result
from secateur.train.balance_losses import BALANCE
from support.claims import fallen, not_checked
from support.dcp_checkpoints import save_shards
from support.dense_models import parents_in
from support.flax_files import params, random_arrays
from support.flax_files import write as write_flax
from support.model_folders import contents, plan_of
from support.models_with_text import TEXT, model_with_text
from support.run_folders import run_json, tiny_run
from support.small_corpus import write_corpus
from support.small_finetunes import QUICK
from support.small_runs import SMALL, TIMINGS, TINY, light_report
from support.tiny_models import tiny_model

# function -> its command
COMMANDS = {
    name: {"evaluate": "eval", "convert_vmoe": "convert-vmoe"}.get(name, name)
    for name in secateur.__all__
    if inspect.isfunction(getattr(secateur, name)) and not name.endswith("_")
}
SHOWING = {"as_json", "quiet", "help", "context"}  # options of a command that say how a result is shown
PARAMETERS = {
    name: {parameter.name: parameter for parameter in get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]
    for name, command in COMMANDS.items()
}
BY_A_CLOCK = {
    *TIMINGS,
    "images_per_second",
    "memory_bytes",
    "process_memory_bytes",
    "peak_memory_bytes_estimated",
}


@dataclass(frozen=True)
class Case:
    """A call of a function; the words of its command are made of the same arguments."""

    function: str
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()  # files or folders that it leaves

    def words(self) -> list[str]:
        words = [COMMANDS[self.function], *(word for one in self.arguments for word in as_words(one))]
        for name, value in self.options.items():
            if isinstance(value, dict):  # of --set
                value = [f"{key}={json.dumps(one)}" for key, one in value.items()]
            words += [f"--{name.replace('_', '-')}"] if value is True else []
            words += (
                []
                if value is True
                else [part for one in as_words(value) for part in (f"--{name.replace('_', '-')}", one)]
            )
        return [*words, "--json"]

    def call(self, **more: Any) -> Result:
        result = getattr(secateur, self.function)(*self.arguments, **self.options, **more)
        assert isinstance(result, Result)
        return result


def as_words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


DATA = {"data": [f"{name}={name}.jsonl" for name in TEXT], "sequence_length": 16, "batch_size": 4}
OBSERVED = {**DATA, "samples": 6, "device": "cpu", "out": "stats.safetensors"}
RUN = {**SMALL, "set": TINY["qwen3_moe"], "data": ["corpus/prose", "corpus/code"], "out": "fresh"}
BRIEF = {"steps": 8, "warmup_steps": 2, "log_steps": 2, "eval_steps": 4, "save_steps": 4}
CASES = {
    "inspect": Case("inspect", ("source",)),
    "observe": Case("observe", ("source",), OBSERVED, ("stats.safetensors",)),
    "observe more": Case("observe", ("source",), {**OBSERVED, "sums": ["output_sum"]}, ("stats.safetensors",)),
    "observe, dry run": Case("observe", ("source",), {**OBSERVED, "dry_run": True}),
    "apply": Case("apply", ("source", "plan.json"), {"out": "out", "undo": "undo", "ep": 3}, ("out", "undo")),
    "apply, dry run": Case("apply", ("source", "plan.json"), {"out": "out", "removed": "zero-slot", "dry_run": True}),
    "apply to a training checkpoint": Case("apply", ("shards", "plan.json"), {"out": "out"}, ("out",)),
    "apply an undo folder": Case("apply", ("pruned", "dropped"), {"out": "out"}, ("out",)),
    "verify": Case("verify", ("source", "pruned"), {"tokens": 4, "seed": 3}),
    "verify what is wrong": Case("verify", ("source", "wrong"), {"tokens": 0}),
    "evaluate": Case("evaluate", (["source", "pruned"],), {**DATA, "samples": 6, "device": "cpu"}),
    "finetune": Case(
        "finetune", ("source",), {**QUICK, **DATA, "out": "out", "steps": 2, "freeze": ["gate"]}, ("out",)
    ),
    "place": Case(
        "place",
        ("loads.json",),
        {"ranks": 3, "method": "exact", "out": "p", "plan": "q", "sglang": "r", "num_layers": 2},
        ("p", "q", "r"),
    ),
    "plan": Case("plan", ("stats",), {"keep": 0.75, "out": "q", "protect": True}, ("q",)),
    "plan by a rule": Case("plan", ("stats",), {"alpha": 0.9, "allocation": "laep", "dry_run": True}),
    "plan of a model": Case("plan", ("source",), {"keep": 5, "criterion": "weight_norm", "out": "q"}, ("q",)),
    "prune": Case(
        "prune",
        ("source",),
        {**OBSERVED, "keep": "6", "out": "out", "undo": "undo", "verify_tokens": 4},
        ("out", "undo"),
    ),
    "prune, dry run": Case("prune", ("source",), {**OBSERVED, "max_rerouted": 0.1, "out": "out", "dry_run": True}),
    "prune without data": Case(
        "prune", ("source",), {"keep": 5, "criterion": "aimer", "out": "out", "ep": 5}, ("out",)
    ),
    "pretrain": Case(
        "pretrain",
        (),
        {**RUN, **BRIEF, "prune_at_step": 5, "target_params": 0.8},
        ("fresh",),
    ),
    "pretrain, dry run": Case("pretrain", (), {**RUN, "prune": ["step=9 alpha=0.5"], "dry_run": True}),
    "report": Case("report", ("run",), {}, ("run",)),
    "phases": Case("phases", ("run",), {"max_regret": 0.1, "max_noise": 0.9, "warmup_steps": 9}),
    "upcycle": Case("upcycle", (["parents/p0", "parents/p1"],), {"out": "out", "top_k": 1, "text": "text"}, ("out",)),
    "upcycle, dry run": Case(
        "upcycle", (["parents/p0"],), {"out": "out", "form": "copy", "experts": 2, "dry_run": True}
    ),
    "verify what was grown": Case("verify", (["parents/p0", "parents/p1"], "grown")),
    "convert_vmoe": Case("convert_vmoe", ("published",), {"out": "out", "top_k": 2}, ("out",)),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the functions are run on."""
    root = tmp_path_factory.mktemp("made")
    model_with_text(root)
    plan = plan_of(*((layer, [0, 3, 5]) for layer in range(3)))
    plan.save(root / "plan.json")
    apply_to_model(root / "source", plan, root / "pruned", undo=root / "dropped")
    shutil.copytree(root / "pruned", root / "wrong")
    path = next((root / "wrong").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    save_shards(tiny_model("qwen3_moe"), root / "shards")
    secateur.observe(root / "source", root / "stats", data=root / "code.jsonl", samples=6, sequence_length=16)
    write_corpus(root / "corpus")
    tiny_run(root / "run", [[5, 3, 9, 1]])
    (root / "loads.json").write_text(json.dumps({1: [9, 9, 8, 7, 6, 5, 5, 4, 4, 3, 2, 2]}))
    write_flax(root / "published", params(random_arrays()))
    parents = parents_in(root / "parents", count=2)
    secateur.upcycle(parents, root / "grown")
    (root / "text").write_text("\n".join(TEXT["prose"]))
    return root


def of_the_process(threads: int = 0) -> dict[str, Any]:
    """What a function must leave as it was; threads that transformers no longer waits for are given time to end."""
    until = time.monotonic() + 10
    while threading.active_count() > threads > 0 and time.monotonic() < until:
        time.sleep(0.01)
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "output": (sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino),
        "threads": threading.active_count(),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "transformers": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "interrupt": signal.getsignal(signal.SIGINT),
        "garbage": gc.isenabled(),
    }


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(one) for key, one in value.items() if key not in BY_A_CLOCK}
    return [without_clock(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CASES)
def test_a_command_prints_and_writes_what_its_function_gives_and_writes(
    name: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    case = CASES[name]
    if "threads" in case.options:  # another number than that of the run, which must be there again after it
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(case.options["threads"] + 1)
    monkeypatch.setattr(pretraining, "write_report", light_report)  # figures take longer than all the rest
    monkeypatch.setattr(reporting, "png", lambda figure: b"drawn")
    for who in ("command", "function"):
        shutil.copytree(made, tmp_path / who, copy_function=os.link)
    before = of_the_process()
    monkeypatch.chdir(tmp_path / "command")
    monkeypatch.setattr("sys.argv", ["secateur", *case.words()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capfd.readouterr().out
    assert end.value.code in (None, 0, 1), name
    monkeypatch.chdir(tmp_path / "function")
    heard: list[tuple[str, int, int]] = []
    result = case.call(on_progress=lambda *told: heard.append(told))
    assert of_the_process(before["threads"]) == before
    assert Path.cwd() == tmp_path / "function"
    assert capfd.readouterr() == ("", "")
    assert without_clock(result.to_json()) == without_clock(json.loads(printed))
    assert written(tmp_path / "function", made) == written(tmp_path / "command", made)
    assert {path.split("/")[0] for path in written(tmp_path / "function", made)} == set(case.written)
    for what, done, total in heard:
        assert what
        assert 0 <= done <= (total or done), what
    check_html(result._repr_html_())


def written(folder: Path, made: Path) -> dict[str, Any]:
    """What is new or changed; of what says how long something took, only that it is there."""
    before = contents(made)
    found: dict[str, Any] = {path: data for path, data in contents(folder).items() if before.get(path) != data}
    for path in found:
        if path.endswith("finetune.json") or re.match(
            r"fresh/.*(metrics.jsonl|summary.json|events.json|report.json)", path
        ):
            found[path] = None
        elif "shard-" in path:  # safetensors writes the metadata of a header in any order
            found[path] = sorted(found[path])
    return found


def test_every_function_is_compared_with_its_command() -> None:
    assert {case.function for case in CASES.values()} == set(COMMANDS)
    assert set(COMMANDS.values()) == set(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_has_the_options_of_its_command(name: str) -> None:
    """Names, defaults and types; only how a result is shown is the command's own, and only progress the function's."""
    parameters = dict(inspect.signature(getattr(secateur, name)).parameters)
    hints = hints_of(getattr(secateur, name))
    progress = parameters.pop("on_progress")
    assert (progress.default, progress.kind) == (None, inspect.Parameter.KEYWORD_ONLY)
    options = {key: option for key, option in PARAMETERS[name].items() if key not in SHOWING}
    assert set(parameters) == set(options)
    command = next(one for one in cli.COMMANDS if one.__name__.replace("_", "-") == COMMANDS[name])
    of_command = hints_of(command)
    for key, option in options.items():
        default = inspect.signature(command).parameters[key].default
        assert parameters[key].default == default, key
        assert fits(hints[key], of_command[key]), f"{key}: {hints[key]}, of the command {of_command[key]}"
        if option.param_type_name == "option":
            assert f"--{key.replace('_', '-')}" in option.opts
    for parameter in parameters.values():
        assert parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def hints_of(function: Callable[..., object]) -> dict[str, Any]:
    """The types of all parameters; those of a rule's options stand in the signature alone."""
    shown = {key: one.annotation for key, one in inspect.signature(function).parameters.items()}
    shown = {key: get_args(hint)[0] if get_origin(hint) is Annotated else hint for key, hint in shown.items()}
    return shown | typing.get_type_hints(function)


class AskedError(Exception):
    pass


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_hands_every_option_to_its_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a value that is not the default, all at once, for the function is not run."""
    asked: dict[str, Any] = {}

    def ask(*arguments: Any, **options: Any) -> None:
        given = inspect.signature(function).bind(*arguments, **options).arguments
        asked.update({key: one for key, one in given.items() if key != "on_progress"})
        raise AskedError

    function = getattr(secateur, name)
    words, expected = [COMMANDS[name]], {}
    for key, option in PARAMETERS[name].items():
        if key in SHOWING:
            continue
        hint = without_none(hints_of(function)[key]) or hints_of(function)[key]
        flag, value = f"--{key.replace('_', '-')}", another(key, hint, option)
        expected[key] = value
        texts = [f"{one}={value[one]}" for one in value] if isinstance(value, dict) else as_words(value)
        for text in texts:
            words += [text] if option.param_type_name == "argument" else [flag] if value is True else [flag, text]
    monkeypatch.setattr(sys.modules[function.__module__], name, ask)
    with pytest.raises(AskedError):
        get_command(cli.app).main(words, prog_name="secateur", standalone_mode=False)
    assert {key: plain(one) for key, one in asked.items()} == expected


def another(key: str, hint: Any, option: Any) -> Any:
    """A value of an option that is not its default."""
    if get_origin(hint) is Literal:
        return next(value for value in reversed(get_args(hint)) if value != option.default)
    if key == "set":
        return {"hidden_size": 48}
    if option.multiple or option.nargs == -1:
        return [f"{key} 1", f"{key} 2"]
    return {bool: True, int: 7, float: 0.5}.get(hint, f"a {key}")


def plain(value: Any) -> Any:
    """As it was typed."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


# type of an option -> types of a keyword that take it
TYPES: dict[Any, tuple[Any, ...]] = {
    Path: (StrPath, Plan | StrPath | Result, StrPath | Mapping[int, Sequence[float]]),
    list[Path]: (StrPaths,),
    list[str]: (StrPaths, str | Sequence[str], Mapping[str, Any]),
    str: (str | float, StrPath),  # of --keep, and of paths that are saved with a run
}


def fits(of_function: Any, of_command: Any) -> bool:
    left, right = without_none(of_function), without_none(of_command)
    if (left is None) != (right is None):
        return False
    ours, theirs = (of_function if left is None else left), (of_command if right is None else right)
    if get_origin(ours) is Literal:
        return theirs is str or set(get_args(ours)) == {one.value for one in theirs}
    return ours == theirs or any(normal(ours) == normal(one) for one in TYPES.get(theirs, ()))


def without_none(hint: Any) -> Any:
    """The type without None; None where it has none."""
    parts = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union else ()
    rest = tuple(part for part in parts if part is not type(None))
    return typing.Union[rest] if len(rest) < len(parts) else None  # noqa: UP007


def normal(hint: Any) -> frozenset[Any]:
    return frozenset(map(str, get_args(hint))) if get_args(hint) else frozenset([str(hint)])


@pytest.mark.parametrize(
    ("function", "option", "values"),
    [
        ("place", "method", METHODS),
        ("apply", "removed", REMOVED),
        ("apply", "mtp", MTP_CHOICES),
        ("plan", "removed", REMOVED),
        ("plan", "allocation", ALLOCATIONS),
        ("prune", "removed", REMOVED),
        ("prune", "mtp", (*MTP_CHOICES, PRUNE)),
        *((function, "experts_from", EXPERTS_FROM) for function in ("inspect", "observe", "plan", "prune", "apply")),
        ("prune", "allocation", ALLOCATIONS),
        ("prune", "activations", ACTIVATIONS),
        ("observe", "activations", ACTIVATIONS),
        ("finetune", "optimizer", OPTIMIZERS),
        ("finetune", "schedule", SCHEDULES),
        ("pretrain", "precision", PRECISIONS),
        ("pretrain", "balance", BALANCE),
        ("pretrain", "rearrange_method", METHODS),
    ],
)
def test_the_values_that_a_signature_lists_are_those_that_are_known(function: str, option: str, values: Any) -> None:
    hint = typing.get_type_hints(getattr(secateur, function))[option]
    listed = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
    assert listed == list(values)


CALLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "samples": (lambda made: secateur.observe(made / "source", made / "s", samples=0), "--samples 0: expected at"),
    "activations": (
        lambda made: secateur.observe(made / "source", made / "s", activations="ram"),  # type: ignore[arg-type]
        "--activations ram: expected one of auto, memory, disk",
    ),
    "seed": (lambda made: secateur.evaluate(made / "source", data="x", seed=-1), "--seed -1: expected at least 0"),
    "no model": (lambda made: secateur.evaluate([], data="x"), "no model is named"),
    "ep": (lambda made: secateur.apply(made / "source", made / "plan.json", made / "o", ep=0), "--ep 0: expected at"),
    "removed": (
        lambda made: secateur.apply(made / "source", made / "plan.json", made / "o", removed="gone"),  # type: ignore[arg-type]
        "--removed gone: expected reroute or zero-slot",
    ),
    "ranks": (lambda made: secateur.place({0: [1, 2]}, 0), "num_ranks is 0, expected at least 1"),
    "loads": (lambda made: secateur.place({0: [1, float("nan")]}, 2), "loads: "),
    "layer": (lambda made: secateur.place({-1: [1, 2]}, 2), "loads: "),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_command_line_refuses_by_itself_a_function_refuses_too(name: str, made: Path) -> None:
    call, message = CALLS[name]
    before = contents(made)
    with pytest.raises(SecateurError, match=re.escape(message)):
        call(made)
    assert contents(made) == before


@pytest.mark.parametrize("name", ["plan", "prune", "pretrain"])
def test_an_option_that_no_rule_has_is_a_type_error(name: str, tmp_path: Path) -> None:
    arguments = [tmp_path / "source"] if name == "plan" else [tmp_path / "source", tmp_path / "out"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        getattr(secateur, name)(*arguments[-1:] if name == "pretrain" else arguments, gamma=0.5, dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_every_setting_of_a_fine_tuning_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[FinetuneOptions] = []

    def ask(model: Path, out: Path, options: FinetuneOptions, **more: Any) -> None:
        asked.append(options)
        raise AskedError

    monkeypatch.setattr(sys.modules["secateur.finetuning.finetune"], "run_finetuning", ask)
    settings: dict[str, Any] = {
        "data": ("a", "b"),
        "eval_data": ("c",),
        "freeze": ("gate",),
        "eval_steps": 3,
        "epochs": 2.0,
    }
    settings |= {"sequence_length": 9, "router_aux_loss": 0.1, "optimizer": "sgd", "schedule": "linear", "warmup": 4.0}
    settings |= {"text_key": "t", "split": "s", "report_to": "r", "bf16": True, "new_head": True, "augment": True}
    settings |= {"batch_size": 2, "gradient_accumulation": 3, "learning_rate": 0.1, "weight_decay": 0.2, "seed": 5}
    settings |= {"max_grad_norm": 0.3, "log_steps": 4, "save_steps": 6}
    with pytest.raises(AskedError):
        secateur.finetune("model", tmp_path / "out", **settings)
    assert asked == [FinetuneOptions(**settings)]
    assert set(settings) | {"steps"} == {one.name for one in dataclasses.fields(FinetuneOptions)}


def test_a_run_is_resumed_with_its_own_settings_and_others_are_refused(tmp_path: Path) -> None:
    about = run_json(1000, {0: 8}) | {"config": PretrainOptions(steps=50).to_json()}
    (tmp_path / "run.json").write_text(json.dumps(about))
    before = contents(tmp_path)
    with pytest.raises(SecateurError, match=r"--resume: --steps is 40, but the run in .* was started with 50"):
        secateur.pretrain(tmp_path, resume=True, steps=40)
    with pytest.raises(SecateurError, match=r"--resume: --alpha is 0\.3, but the run in .* was started with None"):
        secateur.pretrain(tmp_path, resume=True, alpha=0.3, ep=2)
    words = ["pretrain", "--out", str(tmp_path), "--resume", "--steps", "600"]  # the default, but not what the run has
    for again in (
        lambda: secateur.pretrain(tmp_path, resume=True, steps=600),
        lambda: get_command(cli.app).main(words, prog_name="secateur", standalone_mode=False),
    ):
        with pytest.raises(SecateurError, match=r"--steps is 600, but the run in .* was started with 50"):
            again()
    with pytest.raises(SecateurError, match="--ep 7: expected a multiple of 7 processes"):
        secateur.pretrain(tmp_path, resume=True, preset=None, data=None, alpha=None, ep=7)
    with pytest.raises(SecateurError, match="--dry-run is for a new run"):
        secateur.pretrain(tmp_path, resume=True, dry_run=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: secateur.observe("m", "o", samples="8"), "--samples: found '8', expected a whole number or None"),
        (lambda: secateur.observe("m", "o", samples=2.5), "--samples: found 2.5, expected a whole number"),
        (lambda: secateur.observe("m", "o", pack=1), "--pack: found 1, expected True or False or None"),
        (
            lambda: secateur.finetune("m", "o", data="d", learning_rate="1e-4"),
            "--learning-rate: found '1e-4', expected a",
        ),
        (lambda: secateur.pretrain("o", steps="5"), "--steps: found '5', expected a whole number"),
        (lambda: secateur.pretrain("o", steps=True), "--steps: found True, expected a whole number"),
        (lambda: secateur.plan("s", criterion=["reap"]), "--criterion: found \\['reap'\\], expected a text or None"),
        (lambda: secateur.plan("s", keep={0: 4}), "--keep: found {0: 4}, expected a text or a number or None"),
        (lambda: secateur.prune("m", "o", min_experts=None), "--min-experts: found None, expected a whole number"),
        (lambda: secateur.apply("m", "p", "o", ep="2"), "--ep: found '2', expected a whole number"),
        (lambda: secateur.verify("m", "p", tokens=3.0), "--tokens: found 3.0, expected a whole number"),
        (lambda: secateur.evaluate("m", data="d", seed=0.0), "--seed: found 0.0, expected a whole number"),
        (lambda: secateur.place({0: [1, 2]}, "2"), "--ranks: found '2', expected a whole number"),
        (lambda: secateur.convert_vmoe("p", "o", top_k="2"), "--top-k: found '2', expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_option(call: Callable[[], Result], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        call()


def test_a_result_may_be_given_where_its_file_or_its_plan_is_meant(made: Path, tmp_path: Path) -> None:
    decided = secateur.plan(made / "source", criterion="aimer", keep=5)
    applied = secateur.apply(made / "source", decided, tmp_path / "out")
    assert applied.plan == decided.plan
    assert secateur.inspect(applied).experts == applied.experts_after
    assert secateur.verify(made / "source", applied, tokens=0).passed
    with pytest.raises(TypeError, match="this plan was not written to a file"):
        secateur.inspect(decided)
    with pytest.raises(SecateurError, match="plan: found Inspection without a plan"):
        secateur.apply(made / "source", secateur.inspect(applied), tmp_path / "again")
    assert "order" not in repr(decided) + repr(applied)
    with pytest.raises(AttributeError, match="the command eval is the function evaluate"):
        _ = secateur.eval


def test_one_path_counts_as_one_and_a_plan_may_be_a_value(made: Path, tmp_path: Path) -> None:
    plan = Plan.load(made / "plan.json")
    by_value = secateur.apply(str(made / "source"), plan, str(tmp_path / "out"), dry_run=True)
    assert (
        by_value.to_json()
        == secateur.apply(made / "source", made / "plan.json", tmp_path / "out", dry_run=True).to_json()
    )
    assert (by_value.plan, by_value.experts_after) == (plan, {0: 3, 1: 3, 2: 3})
    small: dict[str, Any] = {"samples": 2, "sequence_length": 16, "device": "cpu"}
    one = secateur.evaluate(made / "source", data=str(made / "code.jsonl"), **small)
    assert one.to_json() == secateur.evaluate([made / "source"], data=[made / "code.jsonl"], **small).to_json()
    assert one.losses == (one.to_json()["models"][0]["loss"],)


def test_what_is_given_back_can_be_used_at_once(made: Path, tmp_path: Path) -> None:
    found = secateur.inspect(made / "source")
    assert (found.experts, found.top_k, found.num_groups) == ({0: 8, 1: 8, 2: 8}, 2, 1)
    stats = tmp_path / "stats.safetensors"
    seen = secateur.observe(made / "source", stats, data=made / "code.jsonl", samples=4, sequence_length=16)
    assert seen.observation is not None
    placed = secateur.place(seen.observation.stats.loads(), 2)
    assert placed.layers[0].order == placed.plan.layers[0].order
    assert placed.to_json() == secateur.place(stats, 2).to_json()
    secateur.apply(made / "source", placed.plan, tmp_path / "out")
    checked = secateur.verify(made / "source", tmp_path / "out", tokens=0)
    assert (checked.passed, not_checked(checked.checks)) == (True, {"logits", "speaks"})
    wrong = secateur.verify(made / "source", made / "wrong", tokens=0)
    assert (wrong.passed, "tensors" in fallen(wrong.checks)) == (False, True)


def test_a_dry_run_of_observe_has_no_statistics(made: Path, tmp_path: Path) -> None:
    found = secateur.observe(
        made / "source", tmp_path / "s", data=made / "code.jsonl", samples=4, sequence_length=16, dry_run=True
    )
    assert (found.observation, found.moe_layers, list(tmp_path.iterdir())) == (None, (0, 1, 2), [])


def test_a_solver_in_two_threads_leaves_standard_output_where_it_was() -> None:
    """The second would else keep as the original what the first has put there."""
    before, inside, left = os.fstat(1), threading.Event(), threading.Event()

    def enter() -> None:
        with milp.solver_apart():
            inside.set()
            left.wait()

    other = threading.Thread(target=enter)
    with milp.solver_apart():
        assert os.path.samestat(os.fstat(1), os.fstat(2))
        other.start()
        came_in_meanwhile = inside.wait(0.2)
    left.set()
    other.join()
    assert (came_in_meanwhile, inside.is_set()) == (False, True)
    assert os.path.samestat(os.fstat(1), before)


# --- results ------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def check_html(page: str) -> str:
    parser = Tags()
    parser.feed(page)
    assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    return parser.text


def test_nothing_in_a_result_becomes_markup_in_a_notebook(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script> & more"
    found = secateur.place({0: [1, 2]}, 2)
    content = {**found.to_json(), "layers": {evil: found.to_json()["layers"]["0"]}}
    text = check_html(type(found)(layers=found.layers, plan=found.plan, content=content)._repr_html_())
    assert evil in text
    model = secateur.model_folder.read.inspect.Inspection(
        path=tmp_path / evil, model_type=evil, num_layers=1, experts={0: 8}, top_k=1, num_groups=1, num_bytes=1,
        bytes_per_expert={0: 1}, limits=(evil, evil), content={},
    )  # fmt: skip
    text = check_html(model._repr_html_())
    assert text.count("<script>") == 4
    assert "model type" in text


def test_a_long_cell_is_cut(tmp_path: Path) -> None:
    found = secateur.place({0: [1, 2]}, 2)
    content = {"layers": {"x" * 999: found.to_json()["layers"]["0"]}}
    page = type(found)(layers={}, plan=found.plan, content=content)._repr_html_()
    assert "x" * 200 + " ..." in page
    assert "x" * 201 not in page


def test_the_json_of_a_result_is_a_copy_and_the_result_stays_as_it_is() -> None:
    found = secateur.place({0: [1, 2]}, 2)
    found.to_json()["layers"]["0"]["order"].clear()
    assert found.to_json()["layers"]["0"]["order"] == [0, 1]
    with pytest.raises(AttributeError):
        found.plan = found.plan  # type: ignore[misc]


# --- documentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_docstring_has_every_argument_what_comes_back_and_an_example(name: str) -> None:
    function = getattr(secateur, name)
    text = inspect.cleandoc(function.__doc__)
    parts = re.split(r"^(Args|Returns|Raises|Example):\n", text, flags=re.MULTILINE)
    assert parts[1::2] == ["Args", "Returns", "Raises", "Example"]
    arguments = parts[2]
    for parameter in dict.fromkeys(
        "rule" if name in OPTIONS else name for name in inspect.signature(function).parameters
    ):
        assert re.search(rf"(^    |\. |; ){parameter}: ", arguments, re.MULTILINE), parameter
    assert f"secateur.{name}(" in parts[8]
    compile("\n".join(line.strip()[4:] for line in parts[8].splitlines() if ">>>" in line), name, "exec")
