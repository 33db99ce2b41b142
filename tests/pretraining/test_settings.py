"""Options are parsed once, a model is described once, and a run starts from what preflight found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from secateur import families
from secateur.data.tokenizer import train_tokenizer
from secateur.decide.rules import OPTIONS
from secateur.errors import SecateurError
from secateur.pretraining import data as of_data
from secateur.pretraining import options as options_module
from secateur.pretraining import preflight
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.preflight import check_before_data, plan_of_run
from secateur.pretraining.run import resume, run_pretraining
from secateur.train.distributed.trainer import ResumableTrainer
from support.small_runs import corpus_in, light_report, options

# option -> where it is in the settings, for those that are not simply a field of the same name in a part
PARSED = {
    **dict.fromkeys(("no_prune", "prune", *OPTIONS, "uniform"), "pruning.prunings"),
    **dict.fromkeys(
        ("prune_at_step", "prune_at_tokens", "multiple_of", "min_experts", "max_experts"), "pruning.prunings"
    ),
    **dict.fromkeys(
        ("no_rearrange", "rearrange_ranks", "rearrange_every", "rearrange_method", "rearrange_nodes"),
        "pruning.rearrange",
    ),
    "rearrange_tolerance": "pruning.rearrange",
    **dict.fromkeys(("max_regret", "max_noise", "min_change", "min_windows"), "pruning.phase"),
    "window_steps": "pruning.window_steps",
    "balance": "balance.kind",
    "balance_strength": "balance.arguments",
    "control": "control",
}
# another value than the default, and what else must be given for it to be one
OTHERS: dict[str, dict[str, Any]] = {
    "preset": {"preset": "olmoe"},
    "config": {"config": "c.json"},
    "model": {"model": "folder"},
    "overrides": {"overrides": {"num_hidden_layers": 3}},
    "data": {"data": ("a.txt",)},
    "text_key": {"text_key": "body"},
    "tokenizer": {"tokenizer": "folder"},
    "schedule": {"schedule": "linear"},
    "optimizer": {"optimizer": "sgd"},
    "precision": {"precision": "bf16"},
    "report_to": {"report_to": "wandb"},
    "balance": {"balance": "mixtral"},
    "balance_strength": {"balance": "mixtral", "balance_strength": 0.5},
    "prune": {"prune": ("stable alpha=0.2",)},
    **{name: {name: option.parse("2" if option.type is int else "0.5")} for name, option in OPTIONS.items()},
    "rearrange_method": {"rearrange_method": "greedy"},
    "rearrange_nodes": {"rearrange_ranks": 4, "rearrange_nodes": 2},
    "rearrange_tolerance": {"rearrange_tolerance": 0.1},
    "validation_share": {"validation_share": 0.1},
    "max_regret": {"max_regret": 0.5},
    "min_windows": {"min_windows": 9},
    "max_noise": {"max_noise": 0.5},
    "min_change": {"min_change": 0.5},
    "eval_steps": {"eval_steps": 50},
    "save_steps": {"save_steps": 50},
    "log_steps": {"log_steps": 50},
}


def other(name: str) -> dict[str, Any]:
    default = {field.name: field.default for field in fields(PretrainOptions)}[name]
    if name in OTHERS:
        return OTHERS[name]
    return {name: (not default) if isinstance(default, bool) else (default or 1) + 1}


def found_at(options: PretrainOptions, path: str) -> Any:
    found: Any = options.settings
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("name", [field.name for field in fields(PretrainOptions)])
def test_every_option_has_its_place_in_the_settings(name: str) -> None:
    changed, default = PretrainOptions(**other(name)), PretrainOptions()
    if name in PARSED:
        assert found_at(changed, PARSED[name]) != found_at(default, PARSED[name])
        return
    parts = [getattr(changed.settings, part.name) for part in fields(changed.settings) if part.name != "control"]
    values = [getattr(part, name) for part in parts if hasattr(part, name)]
    assert values == [getattr(changed, name)] * len(values) != []
    assert getattr(changed, name) != getattr(default, name)


def test_the_control_run_has_the_settings_of_options_without_pruning() -> None:
    given = PretrainOptions(control=True, seed=3, alpha=0.2)
    assert given.settings.control == given.without_pruning().settings
    assert given.settings.control.pruning.prunings == ()
    assert given.settings.control.record.options == given.without_pruning().to_json()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[Any, ...]]]:
    """Count the calls of a function of `families`, wherever it was imported."""

    def count(name: str) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        original = getattr(families, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return original(*args, **kwargs)

        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("secateur.") and vars(module).get(name) is original:
                monkeypatch.setattr(module, name, counting)
        return calls

    return count


@pytest.fixture
def before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], list[Any]]:
    """What a list held when the first step of a training began."""
    monkeypatch.setattr(program, "write_report", light_report)

    def watch(calls: list[Any]) -> list[Any]:
        held: list[Any] = []
        step = ResumableTrainer.training_step

        def first(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not held:
                held.extend(calls)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(ResumableTrainer, "training_step", first)
        return held

    return watch


def on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def test_each_model_is_described_once_before_the_first_step(
    corpus: Path, tmp_path: Path, counted: Any, before_the_first_step: Any
) -> None:
    """Two models are made: without weights, for what can be refused early, and the one that is trained."""
    described = before_the_first_step(counted("describe_moe"))
    probed = counted("find_expert_layout")
    run_pretraining(options(corpus, steps=5, no_prune=True), tmp_path / "run")
    assert [on_meta(model) for model, *_ in described] == [True, False]
    assert len(probed) == 1  # two builds tell where the experts are; the second description is told


def test_a_resumed_run_describes_the_model_of_its_checkpoint_alone(
    corpus: Path, tmp_path: Path, counted: Any, before_the_first_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ResumableTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_pretraining(options(corpus, steps=10, save_steps=5, no_prune=True), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-5").is_dir()
    described = before_the_first_step(counted("describe_moe"))
    resume(tmp_path / "run")
    assert [on_meta(model) for model, *_ in described] == [False]


def test_a_dry_run_describes_its_model_once_and_tries_its_optimizer_once(
    corpus: Path, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, tried = counted("describe_moe"), []
    trainer = preflight.Trainer
    monkeypatch.setattr(preflight, "Trainer", lambda **kwargs: tried.append(kwargs) or trainer(**kwargs))
    plan_of_run(options(corpus))
    assert len(described) == len(tried) == 1


@pytest.mark.parametrize(("control", "times"), [(False, 1), (True, 2)])
def test_the_schedule_is_parsed_once_for_a_run_and_once_for_its_control(
    control: bool, times: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[None] = []
    original = PretrainOptions.prunings
    monkeypatch.setattr(PretrainOptions, "prunings", lambda self: parsed.append(None) or original(self))
    monkeypatch.setattr(program, "write_report", light_report)
    run_pretraining(options(corpus, steps=5, prune=("step=3 target_params=0.8",), control=control), tmp_path / "run")
    assert len(parsed) == times


def test_the_run_goes_on_with_the_tokenizer_that_preflight_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(["a text about experts"] * 3, vocab_size=270).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(program, "given_tokenizer", lambda *_: pytest.fail("read again"))
    used: list[Any] = []

    def prepare(*args: Any, tokenizer: Any, **kwargs: Any) -> Any:
        used.append(tokenizer)
        raise KeyboardInterrupt

    monkeypatch.setattr(of_data, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(options(corpus, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "run")
    assert len(used[0]) == 270


def test_preflight_gives_back_what_it_found(corpus: Path) -> None:
    found = check_before_data(options(corpus, target_params=0.8, multiple_of=4))
    assert found.tokenizer is None
    assert found.moe.counts == {0: 8, 1: 8}
    assert on_meta(found.moe.model)
    (limits,) = found.limits
    assert [limit.counts() for limit in limits.values()] == [[4, 8], [4, 8]]
    assert found.state_bytes == 2 + 1 / 64**2  # AdamW: two numbers a parameter, and one that counts the steps
    assert (found.sizes.fsdp, found.sizes.ep, found.sizes.tp) == (1, 1, 1)


def test_windows_of_no_steps_are_refused_for_a_pruning_at_tokens_too(corpus: Path) -> None:
    with pytest.raises(SecateurError, match="window_steps is 0"):
        check_before_data(options(corpus, prune_at_tokens=1000, window_steps=0))


def test_options_that_cannot_be_parsed_are_refused_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SecateurError("not parsed")

    monkeypatch.setattr(options_module, "as_prunings", refuse)
    with pytest.raises(SecateurError, match="not parsed"):
        PretrainOptions()
