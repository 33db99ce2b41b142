"""The settings of a run as one value: what they refuse, and that they survive being saved."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.pretraining.options import PretrainOptions, option, parse_pruning


def test_the_defaults_are_a_run_of_the_first_preset_that_prunes_once_at_the_stable_phase() -> None:
    options = PretrainOptions()
    assert options.preset == "qwen3_moe"
    (pruning,) = options.prunings()
    assert pruning.rule.target_params == 0.67
    assert pruning.at_step is None
    assert pruning.at_tokens is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": "olmoe", "config": "c.json"}, ["--preset", "--config", "found preset, config"]),
        ({"preset": "olmoe", "model": "m"}, ["found preset, model"]),
        ({"model": "m", "overrides": {"a": 1}}, ["--set", "--model"]),
        ({"steps": 0}, ["--steps is 0"]),
        ({"batch_size": 0}, ["--batch-size is 0"]),
        ({"accumulation": -1}, ["--accumulation is -1"]),
        ({"vocab_size": 0}, ["--vocab-size is 0"]),
        ({"sequence_length": 1}, ["--sequence-length is 1"]),
        ({"max_data_bytes": 0}, ["--max-data-bytes is 0"]),
        ({"threads": 0}, ["--threads is 0"]),
        ({"learning_rate": 0.0}, ["--learning-rate is 0.0"]),
        ({"learning_rate": math.inf}, ["--learning-rate is inf"]),
        ({"learning_rate": math.nan}, ["--learning-rate is nan"]),
        ({"validation_share": 1.0}, ["--validation-share is 1.0", "below 1.0"]),
        ({"validation_share": 0.0}, ["--validation-share is 0.0"]),
        ({"warmup_steps": -1}, ["--warmup-steps is -1"]),
        ({"weight_decay": -0.1}, ["--weight-decay is -0.1"]),
        ({"weight_decay": math.nan}, ["--weight-decay is nan"]),
        ({"max_grad_norm": math.inf}, ["--max-grad-norm is inf"]),
        ({"seed": -1}, ["--seed is -1"]),
        ({"seed": 2**32}, ["--seed is 4294967296"]),
        ({"precision": "fp8"}, ["--precision is 'fp8'", "bf16"]),
        ({"log_steps": 0}, ["--log-steps is 0"]),
        ({"eval_steps": 15}, ["--eval-steps is 15", "--log-steps (10)"]),
        ({"save_steps": 25}, ["--save-steps is 25", "--log-steps (10)"]),
        ({"no_prune": True, "alpha": 0.4}, ["--no-prune contradicts --alpha"]),
        ({"no_prune": True, "prune_at_step": 4}, ["--no-prune contradicts --prune-at-step"]),
        ({"no_prune": True, "prune_at_tokens": 4}, ["--no-prune contradicts --prune-at-tokens"]),
        ({"no_prune": True, "prune": ("stable alpha=0.2",)}, ["--no-prune contradicts --prune"]),
        ({"prune": ("stable alpha=0.2",), "alpha": 0.4}, ["--prune is a whole schedule"]),
        ({"prune": ("stable alpha=0.2",), "prune_at_step": 4}, ["--prune is a whole schedule"]),
        ({"prune": ("step=20 alpha=0.2", "step=10 alpha=0.4")}, ["at_step must increase"]),
        ({"prune_at_step": 4, "prune_at_tokens": 4}, ["at_step or at_tokens"]),
        ({"prune_at_step": 0}, ["at_step is 0"]),
        ({"alpha": 0.0}, ["--alpha", "is 0.0"]),
        ({"alpha": -1.0}, ["--alpha", "is -1.0"]),
        ({"alpha": math.nan}, ["--alpha", "is nan"]),
        ({"beta": 0.0}, ["--beta", "is 0.0"]),
        ({"beta": 1.5}, ["--beta", "is 1.5"]),
        ({"target_params": 1.0}, ["--target-params", "is 1.0"]),
        ({"target_params": 0.0}, ["--target-params", "is 0.0"]),
        ({"max_rerouted": 1.0}, ["--max-rerouted", "is 1.0"]),
        ({"target_params": 0.5, "alpha": 0.5}, ["--target-params", "--alpha"]),
        ({"max_regret": 1.1}, ["max_regret is 1.1"]),
        ({"max_noise": -0.1}, ["max_noise is -0.1"]),
        ({"min_change": math.nan}, ["min_change is nan"]),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_found(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(SecateurError) as caught:
        PretrainOptions(**changes)
    for words in named:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("stable alpha=0.2 beta=0.1", {"alpha": 0.2, "beta": 0.1}),
        ("alpha=inf,stable,beta=0.05", {"alpha": math.inf, "beta": 0.05}),
        ("step=400 target_params=0.6", {"at_step": 400, "target_params": 0.6}),
        ("tokens=100000 max_rerouted=0.1", {"at_tokens": 100_000, "max_rerouted": 0.1}),
    ],
)
def test_one_pruning_of_a_schedule_is_a_time_and_a_rule(text: str, fields: dict[str, Any]) -> None:
    pruning = parse_pruning(text, uniform=True, multiple_of=4, min_experts=2, max_experts=None)
    assert (pruning.rule.uniform, pruning.multiple_of, pruning.min_experts) == (True, 4, 2)
    found = {**vars(pruning.rule), "at_step": pruning.at_step, "at_tokens": pruning.at_tokens}
    del found["uniform"]
    assert {name: value for name, value in found.items() if value is not None} == fields


@pytest.mark.parametrize(
    "text",
    [
        "",
        "stable",
        "alpha=0.2",
        "stable step=3 alpha=0.2",
        "step=3 tokens=9 alpha=0.2",
        "step=x alpha=0.2",
        "step=1.5 alpha=0.2",
        "stable alpha=x",
        "stable alpha",
        "stable gamma=1",
        "stable alpha=0.2 target_params=0.5",
        "soon alpha=0.2",
        "stable=1 alpha=0.2",
        "stable alpha=0.2 alpha=0.4",
    ],
)
def test_words_that_are_no_pruning_are_refused(text: str) -> None:
    with pytest.raises(SecateurError, match=r"--prune|pruning|at_step"):
        parse_pruning(text)


def test_a_schedule_keeps_its_order_and_shares_the_limits() -> None:
    options = PretrainOptions(prune=("stable alpha=0.2", "step=400 alpha=0.4"), multiple_of=4, max_experts=12)
    first, second = options.prunings()
    assert (first.rule.alpha, second.rule.alpha, second.at_step) == (0.2, 0.4, 400)
    assert {one.multiple_of for one in (first, second)} == {4}
    assert {one.max_experts for one in (first, second)} == {12}


@pytest.mark.parametrize(
    "options",
    [
        PretrainOptions(),
        PretrainOptions(alpha=math.inf, beta=0.05),
        PretrainOptions(prune=("stable alpha=0.2", "step=400 alpha=0.4"), data=("a=b.txt", "c")),
        PretrainOptions(config="c.json", overrides={"num_hidden_layers": 3, "hidden_act": "silu", "x": [1, 2]}),
    ],
)
def test_saved_settings_come_back_equal_through_strict_json(options: PretrainOptions) -> None:
    text = json.dumps(options.to_json(), allow_nan=False)
    assert PretrainOptions.from_json(json.loads(text)) == options


def test_settings_of_another_release_are_refused_by_name() -> None:
    saved = PretrainOptions().to_json()
    with pytest.raises(SecateurError, match=r"unknown settings \['new'\]"):
        PretrainOptions.from_json({**saved, "new": 1})
    del saved["steps"]
    with pytest.raises(SecateurError, match=r"missing settings \['steps'\]"):
        PretrainOptions.from_json(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": ("stable alpha=0.2",)},
        {"alpha": 0.2, "prune_at_tokens": 9},
        {"target_params": 0.5, "prune_at_step": 9},
    ],
)
def test_the_control_run_differs_only_in_pruning_nothing(changes: dict[str, Any]) -> None:
    options = PretrainOptions(control=True, seed=3, balance="mixtral", **changes)
    control = options.without_pruning()
    assert control.prunings() == ()
    assert not control.control
    differing = {
        field.name
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != getattr(control, field.name)
    }
    assert differing == {"no_prune", "control", *changes}


@pytest.mark.parametrize(
    ("balance", "strength", "expected"),
    [
        ("none", None, {}),
        ("mixtral", 0.1, {"coefficient": 0.1}),
        ("deepseek_v3", 0.1, {"coefficient": 0.1}),
        ("bias", 0.1, {"update_rate": 0.1}),
    ],
)
def test_the_strength_of_a_balance_goes_under_the_name_it_has_there(
    balance: str, strength: float | None, expected: dict[str, float]
) -> None:
    assert PretrainOptions(balance=balance, balance_strength=strength).balance_arguments() == expected


def test_every_setting_has_its_option_name() -> None:
    assert option("prune_at_step") == "--prune-at-step"
    assert option("overrides") == "--set"
