"""The table of pruning rules: every option is reachable from everywhere, with its type, range and help."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import secateur
from secateur import LAEP, LAEPCallback, PhaseConstants, Pruning, Rule, SecateurError
from secateur.cli import app
from secateur.decide import by_load
from secateur.decide.rules import DEFAULT_RULE, OPTIONS, RULES, RuleOption, RuleOptions, flags_in_words
from secateur.families import describe_moe
from secateur.pretraining.options import PretrainOptions, parse_pruning
from secateur.train.rearrange import Rearrangement
from secateur.train.schedule import as_prunings
from support.rule_ways import WAYS, begun
from support.tiny_models import tiny_model
from support.toy_problem import of_toy

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def a_value(option: RuleOption) -> float:
    return 2 if option.type is int else 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_reachable_in_every_way(name: str, way: str, folder: Path) -> None:
    value = a_value(OPTIONS[name])
    found = WAYS[way](folder, name, value)
    expected = Rule(**{name: value}).to_json() | {"uniform": way == "secateur plan"}  # --allocation uniform
    if way in ("secateur pretrain", "secateur plan"):  # these print strict JSON
        expected = {key: "inf" if one == math.inf else one for key, one in expected.items()}
    assert found == expected
    assert type(found[name]) is OPTIONS[name].type


@pytest.mark.parametrize("command", ["pretrain", "plan", "prune"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_command_has_the_option_with_its_help(name: str, command: str) -> None:
    (parameter,) = (one for one in COMMANDS[command].params if one.name == name)
    option = OPTIONS[name]
    assert (parameter.opts, parameter.default) == ([option.flag], None)
    assert option.row.help[1:] in parameter.help


def test_the_options_stand_together_in_the_help() -> None:
    for command, before in (("pretrain", "prune"), ("plan", "protect"), ("prune", "protect")):
        names = [one.name for one in COMMANDS[command].params]
        start = names.index(before) + 1
        assert names[start : start + len(OPTIONS)] == list(OPTIONS)
        assert "rule" not in names


@pytest.mark.parametrize("kind", RULES)
def test_the_options_of_a_kind_have_one_function_which_takes_them(kind: str) -> None:
    (name,) = {option.row.decides for option in RULES[kind].options}
    assert len(RULES[kind].options) == 1 or all(option.row.off is not None for option in RULES[kind].options)
    assert RULES[kind].function is getattr(by_load, name)
    names = [option.name for option in RULES[kind].options]
    assert list(inspect.signature(RULES[kind].function).parameters) == ["problem", *names]


@pytest.mark.parametrize("kind", RULES)
def test_the_example_of_every_rule_is_true(kind: str) -> None:
    function = RULES[kind].function
    names = {function.__name__: function, "of_toy": of_toy}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, kind, globs=names)
    assert any("of_toy(" in one.source for one in example.examples), f"{kind} has no example of what it keeps"
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"found no option, expected exactly one of: thresholds \(alpha \(--alpha\)"),
        ({"uniform": True}, "found no option"),
        ({"beta": 0.1, "max_rerouted": 0.1}, r"found beta \(--beta\) with max_rerouted \(--max-rerouted\)"),
        ({"target_params": 0.5, "max_rerouted": 0.1}, r"found target_params \(--target-params\) with"),
        ({"alpha": 0}, r"alpha \(--alpha\) is 0, expected a number above 0, or inf"),
        ({"alpha": math.nan}, "is nan"),
        ({"alpha": "0.2"}, "is '0.2'"),
        ({"beta": 1.5}, r"beta \(--beta\) is 1.5, expected a number above 0 and at most 1"),
        ({"beta": True}, "is True"),
        ({"target_params": 1.0}, r"target_params \(--target-params\) is 1.0, expected a share above 0 and below 1"),
        ({"max_rerouted": math.nan}, r"max_rerouted \(--max-rerouted\) is nan"),
    ],
)
def test_bad_rules_are_refused_by_option(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Rule(**arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_of_another_type_or_out_of_range_is_refused_in_the_words_of_the_row(name: str) -> None:
    option = OPTIONS[name]
    for value in (0, -1, math.nan, True, "1"):
        with pytest.raises(SecateurError) as caught:
            Rule(**{name: value})  # type: ignore[arg-type]
        assert str(caught.value) == f"{name} ({option.flag}) is {value!r}, expected {option.row.range.expected}"


def test_an_option_of_whole_numbers_takes_no_others() -> None:
    option = dataclasses.replace(OPTIONS["alpha"], name="drop_count", type=int)
    option.check(2)
    assert option.parse("2") == 2
    with pytest.raises(SecateurError, match=r"drop_count \(--drop-count\) is 2\.0, expected"):
        option.check(2.0)
    with pytest.raises(ValueError, match=r"drop_count is '2\.5', expected a number above 0"):
        option.parse("2.5")


def test_a_rule_says_what_was_given_and_what_stands_for_the_rest() -> None:
    rule = Rule(alpha=0.4)
    assert (rule.alpha, rule.beta, rule.target_params) == (0.4, None, None)
    assert (rule.kind, rule.given, rule.thresholds) == ("thresholds", {"alpha": 0.4}, (0.4, 1.0))
    assert rule.values == {"alpha": 0.4, "beta": 1.0}
    assert Rule(beta=0.1, uniform=True).to_json() == {"alpha": math.inf, "beta": 0.1, "uniform": True}
    assert Rule(target_params=0.5).to_json() == {"target_params": 0.5, "uniform": False}
    others = "".join(f", {name}=None" for name in OPTIONS if name != "alpha")
    assert repr(rule) == f"Rule(alpha=0.4{others}, uniform=False)", "LAEP's state in a checkpoint is compared by this"


def test_a_rule_is_a_value() -> None:
    rule = Rule(max_rerouted=0.1, uniform=True)
    for other in (Rule(max_rerouted=0.1, uniform=True), pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):  # noqa: S301
        assert other == rule
        assert hash(other) == hash(rule)
    assert rule != Rule(max_rerouted=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.max_rerouted = 0.2  # type: ignore[misc]


@pytest.mark.parametrize("of", [secateur.Rule, LAEP, LAEPCallback], ids=lambda of: of.__name__)
def test_the_docstring_lists_the_options_of_rules_among_its_arguments(of: Any) -> None:
    listed = of.__doc__.partition("Args:")[2].partition("Raises:")[0]
    for name, option in OPTIONS.items():
        assert f"\n        {name}: {option.row.help}; {option.row.range.expected}" in listed


def test_a_goal_is_the_default_only_where_no_rule_is_named() -> None:
    assert as_prunings(None)[0].rule == Rule(**DEFAULT_RULE) == Rule(target_params=0.67)
    assert as_prunings(None, alpha=None, uniform=True)[0].rule == Rule(target_params=0.67, uniform=True)
    for name, option in OPTIONS.items():
        assert as_prunings(None, **{name: a_value(option)})[0].rule.given == {name: a_value(option)}
    assert PretrainOptions().prunings()[0].rule.given == DEFAULT_RULE


@pytest.mark.parametrize("function", [as_prunings, LAEP, LAEPCallback], ids=lambda function: function.__name__)
def test_a_function_that_takes_a_rule_spells_out_its_options(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert not [one for one in parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    for name, option in OPTIONS.items():
        found = parameters[name]
        assert (found.kind, found.default) == (inspect.Parameter.KEYWORD_ONLY, None)
        assert found.annotation == option.type | None
    for field in dataclasses.fields(Pruning):
        if field.name != "rule":
            found = parameters[field.name]
            assert (found.default, str(found.annotation)) == (field.default, field.type)


def test_the_callback_takes_what_laep_takes_in_the_same_order() -> None:
    laep, callback = (list(inspect.signature(one).parameters.values()) for one in (LAEP, LAEPCallback))
    assert [one.name for one in laep[:2]] == ["model", "optimizer"]
    assert [one.name for one in callback[:2]] == ["on_event", "by_layer"]
    assert laep[2:] == callback[2:]


def test_laep_and_its_callback_make_the_same_schedule_and_the_callback_hands_the_rest_on(folder: Path) -> None:
    model = tiny_model("mixtral")
    pruning: dict[str, Any] = {"at_step": 3, "multiple_of": 2, "min_experts": 4, "max_experts": 6}
    phase, moe = PhaseConstants(max_regret=0.5), describe_moe(model)
    others: dict[str, Any] = {
        "copies": [],
        "window_steps": 7,
        "phase": phase,
        "warmup_steps": 30,
        "self_check": False,
        "on_message": [].append,
        "count_mask": lambda given: None,
        "rearrange": Rearrangement(ranks=2),
    }
    callback = LAEPCallback(alpha=0.3, beta=0.2, uniform=True, moe=moe, **pruning, **others)
    pruner = begun(callback, model, folder)
    watch = pruner.state_dict()["watch"]
    pruner.detach()
    expected = Pruning(rule=Rule(alpha=0.3, beta=0.2, uniform=True), **pruning)
    direct = LAEP(model, torch.optim.AdamW(model.parameters()), alpha=0.3, beta=0.2, uniform=True, **pruning)
    direct.detach()
    assert pruner.prunings == direct.prunings == (expected,)
    assert (pruner.window_steps, pruner.self_check, pruner.moe) == (7, False, moe)
    watching = LAEP(model, torch.optim.AdamW(model.parameters()), prunings=[], **others)
    watching.detach()
    assert watch == watching.state_dict()["watch"]
    assert pruner._rearrange == Rearrangement(ranks=2)
    for refuse in (LAEPCallback, lambda **wrong: LAEP(model, torch.optim.AdamW(model.parameters()), **wrong)):
        with pytest.raises(SecateurError, match="at_tokens is 0"):
            refuse(at_tokens=0)
    assert {*pruning, *others, "at_tokens", "uniform", "moe", "prunings", "on_event", "by_layer", *OPTIONS} == set(
        inspect.signature(LAEPCallback).parameters
    ), "a keyword that is not tried here"


def test_a_schedule_may_be_any_iterable_of_prunings_and_of_nothing_else() -> None:
    schedule = [Pruning(rule=Rule(alpha=0.3), at_step=step) for step in (3, 9)]
    assert as_prunings(one for one in schedule) == tuple(schedule)
    with pytest.raises(SecateurError, match=r"prunings: found 'stable alpha=0\.3', expected Pruning values"):
        as_prunings(["stable alpha=0.3"])  # type: ignore[list-item]
    for wrong in ({"multiple_of": 0}, {"multiple_of": None}, {"min_experts": 1.5}, {"max_experts": 0}):
        with pytest.raises(SecateurError, match=f"{next(iter(wrong))} is .*, expected a whole number of at least 1"):
            as_prunings(None, **wrong)  # type: ignore[arg-type]


def test_an_unknown_keyword_is_a_type_error_whatever_else_is_given() -> None:
    for given in ({}, {"prunings": []}, {"alpha": 0.4}):
        for value in (1, None):
            with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_rule'"):
                LAEPCallback(**given, no_such_rule=value)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_rule'"):
        Rule(no_such_rule=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_rule'"):
        PretrainOptions(no_such_rule=1)


def test_words_of_a_schedule_are_named_where_one_is_unknown() -> None:
    with pytest.raises(SecateurError, match=f"unknown word 'no_such_rule=2'; .*{', '.join(OPTIONS)}"):
        parse_pruning("step=4 no_such_rule=2")


def test_all_rules_in_words() -> None:
    *goals, last = [option.flag for option in OPTIONS.values() if option.kind != "thresholds"]
    assert flags_in_words() == f"thresholds (--alpha, --beta or both), {', '.join(goals)} or {last}"


def test_the_settings_of_a_run_hold_the_options_at_the_top_as_they_did() -> None:
    saved = PretrainOptions(alpha=math.inf, beta=0.05).to_json()
    found = {name: saved[name] for name in OPTIONS}
    assert found == dict.fromkeys(OPTIONS) | {"alpha": "inf", "beta": 0.05}


def test_the_table_is_the_type_of_the_keywords() -> None:
    assert list(RuleOptions.__annotations__) == list(OPTIONS) == [field.name for field in dataclasses.fields(Rule)][:-1]
