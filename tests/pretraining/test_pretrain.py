"""Whole runs of `secateur pretrain` on a tiny model: what is in the run folder, and that every option does its work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from secateur.commands.bars import run_bars
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plans import Plan
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.preflight import plan_of_run
from secateur.pretraining.run import run_pretraining
from secateur.surgery.events import PruneEvent
from support.event_files import scalars
from support.long_tests import long
from support.small_corpus import write_jsonl
from support.small_runs import (
    LOOSE,
    QWEN3_MOE,
    STRICT,
    Json,
    corpus_in,
    data_in,
    light_report,
    lines,
    options,
    run_in,
    strict,
    without_timings,
)

STEP_TOKENS = 4 * 32
# a pruning within the second window, and three steps after it
SHORT: Json = {"steps": 10, "eval_steps": 10, "prune_at_step": 7}
WATCHED: Json = {"steps": 10, "eval_steps": 10, "no_prune": True}
TRAIN_KEYS = {
    "kind",
    "step",
    "tokens",
    "seconds",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "phase",
    "load_max_over_mean",
    "parameters",
}
FILES = {
    "control",
    "data",
    "events.json",
    "figures",
    "loads.jsonl",
    "metrics.jsonl",
    "model",
    "plan.json",
    "report.html",
    "report.json",
    "run.json",
    "summary.json",
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a pruning at step 23 of 40, its control run and its report."""
    return run_in(tmp_path_factory)


@pytest.fixture
def start(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Make a run without figures; returns its folder.

    It says nothing by itself, whatever its options, and leaves the logging of transformers as it was.
    """
    monkeypatch.setattr(program, "write_report", light_report)

    def make(**changes: Any) -> Path:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        capfd.readouterr()
        before = logging_of_transformers()
        run_pretraining(options(corpus, **changes), out)
        assert capfd.readouterr() == ("", "")
        assert logging_of_transformers() == before
        return out

    return make


def logging_of_transformers() -> tuple[int, bool]:
    return transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()


def events(run: Path) -> list[PruneEvent]:
    return [PruneEvent.from_json(event) for event in strict(run / "events.json")]


def of_kind(run: Path, kind: str) -> list[Json]:
    return [line for line in lines(run / "metrics.jsonl") if line["kind"] == kind]


def test_the_run_folder_has_its_files_and_nothing_else(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == FILES
    names = {"data", "figures", "report.html", "report.json", "control"}
    assert {path.name for path in (run / "control").iterdir()} == FILES - names
    assert {path.name for path in (run / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "modeling_secateur.py",
        "plan.json",
        "report.json",
        "tokenizer.json",
    }


def test_every_log_step_has_one_complete_line(run: Path) -> None:
    for folder in (run, run / "control"):
        train = of_kind(folder, "train")
        assert [line["step"] for line in train] == [5, 10, 15, 20, 25, 30, 35, 40]
        for line in train:
            assert set(line) == TRAIN_KEYS
            assert line["tokens"] == line["step"] * STEP_TOKENS
        assert [line["seconds"] for line in train] == sorted(line["seconds"] for line in train)
        assert all(line["loss"] > 0 and line["tokens_per_second"] > 0 for line in train)


def test_the_loss_falls(run: Path) -> None:
    train = of_kind(run, "train")
    assert train[-1]["loss"] < train[0]["loss"] - 0.5


def test_phase_and_parameters_change_at_the_pruning(run: Path) -> None:
    (event,) = events(run)
    for line in of_kind(run, "train"):
        after = line["step"] > 23
        assert (line["phase"] == "pruned") == after
        assert line["parameters"] == (event.parameters_after if after else event.parameters_before)
    control = of_kind(run / "control", "train")
    assert {line["parameters"] for line in control} == {event.parameters_before}
    assert "pruned" not in {line["phase"] for line in control}


def test_each_validation_is_the_mean_over_the_sequences_of_all_domains(run: Path) -> None:
    evals = of_kind(run, "eval")
    assert [line["step"] for line in evals] == [20, 40]
    tokens = {name: one["validation_tokens"] for name, one in strict(run / "run.json")["data"]["domains"].items()}
    assert set(tokens) == {"prose", "code"}
    for line in evals:
        by_domain = line["validation_loss_by_domain"]
        mean = sum(by_domain[name] * count for name, count in tokens.items()) / sum(tokens.values())
        assert line["validation_loss"] == pytest.approx(mean, rel=1e-12)


def test_the_stated_validation_loss_is_that_of_the_saved_model(run: Path) -> None:
    from secateur.data.prepare import load_prepared

    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    blocks = load_prepared(run / "data").validation["code"].blocks.to(torch.int64)
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)
    assert strict(run / "summary.json")["validation_loss_by_domain"]["code"] == pytest.approx(loss, rel=1e-5)


def test_the_loads_of_a_window_add_up_to_top_k_times_its_tokens(run: Path) -> None:
    (event,) = events(run)
    windows = lines(run / "loads.jsonl")
    # windows of four steps, begun anew after the pruning at step 23
    assert [line["step"] for line in windows] == [4, 8, 12, 16, 20, 27, 31, 35, 39]
    for line in windows:
        assert line["tokens"] == line["step"] * STEP_TOKENS
        for layer, loads in line["layers"].items():
            assert sum(loads) == 2 * 4 * STEP_TOKENS
            one = event.layers[int(layer)]
            assert len(loads) == (one.experts_before if line["step"] <= 23 else one.experts_after)


def test_the_event_says_what_the_pruning_did(run: Path) -> None:
    (event,) = events(run)
    assert (event.step, event.tokens, event.reason) == (23, 23 * STEP_TOKENS, "step")
    assert event.parameters_after <= 0.67 * event.parameters_before
    assert event.experts_before == 16
    assert event.experts_after == sum(one.experts_after for one in event.plan.layers.values())
    assert event.oracle_max_abs_difference == 0.0
    # the last three whole windows and the three steps of the open one
    assert {sum(loads) for loads in event.loads.values()} == {2 * (3 * 4 + 3) * STEP_TOKENS}
    moe = describe_moe(AutoModelForCausalLM.from_pretrained(run / "model"))
    assert moe.num_parameters == event.parameters_after == strict(run / "summary.json")["parameters"]
    assert {layer: one.experts_after for layer, one in event.plan.layers.items()} == moe.counts
    assert Plan.load(run / "plan.json") == Plan.load(run / "model" / "plan.json")
    assert {layer: one.order for layer, one in Plan.load(run / "plan.json").layers.items()} == {
        layer: one.order for layer, one in event.plan.layers.items()
    }


def test_memory_of_parameters_and_optimizer_falls_with_the_parameters(run: Path) -> None:
    (event,) = events(run)
    for memory, parameters in (
        (event.memory_before, event.parameters_before),
        (event.memory_after, event.parameters_after),
    ):
        assert memory.parameters_bytes == 4 * parameters
        assert memory.optimizer_bytes == pytest.approx(8 * parameters, rel=0.01)


def test_run_json_holds_the_settings_the_versions_and_the_model(run: Path, corpus: Path) -> None:
    content = strict(run / "run.json")
    assert PretrainOptions.from_json(content["config"]) == options(corpus, control=True)
    assert content["versions"]["torch"] == torch.__version__
    assert content["secateur"] == content["versions"]["secateur"]
    assert content["hardware"]["cores"] >= 1
    assert content["command"] == [Path(sys.argv[0]).name, *sys.argv[1:]]
    assert content["model"]["experts"] == {"0": 8, "1": 8}
    assert content["model"]["parameters"] == events(run)[0].parameters_before
    assert content["model"]["top_k"] == 2
    domains = content["data"]["domains"]
    assert {name: one["documents"] for name, one in domains.items()} == {"prose": 24, "code": 24}
    assert strict(run / "control" / "run.json")["config"]["no_prune"] is True


def test_the_summary_is_the_last_validation_and_the_medians_of_the_speeds(run: Path) -> None:
    summary, last = strict(run / "summary.json"), of_kind(run, "eval")[-1]
    assert summary["finished"] is True
    assert (summary["steps"], summary["tokens"]) == (40, 40 * STEP_TOKENS)
    assert summary["validation_loss"] == last["validation_loss"]
    speeds = {line["step"]: line["tokens_per_second"] for line in of_kind(run, "train")}
    assert summary["tokens_per_second"]["before"] == speeds_median(speeds, (10, 15, 20))
    assert summary["tokens_per_second"]["after"] == speeds_median(speeds, (30, 35, 40))
    assert strict(run / "control" / "summary.json")["tokens_per_second"]["after"] is None


def speeds_median(speeds: dict[int, float], steps: tuple[int, ...]) -> float:
    return sorted(speeds[step] for step in steps)[1]


def test_the_report_has_the_fields_that_others_read(run: Path) -> None:
    report = strict(run / "report.json")
    (event,) = report["events"]
    assert {"step", "layers", "parameters_before", "parameters_after", "experts_before", "experts_after"} <= set(event)
    assert report["validation_loss"] == strict(run / "summary.json")["validation_loss"]
    assert set(report["tokens_per_second"]) >= {"before", "after"}
    assert "torch" in report["versions"]
    assert "<html" in (run / "report.html").read_text()
    assert (run / "model" / "report.json").read_bytes() == (run / "report.json").read_bytes()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())


def test_the_control_run_is_the_same_run_until_the_pruning(run: Path) -> None:
    pruned, control = ([without_timings(line) for line in of_kind(one, "train")] for one in (run, run / "control"))
    assert pruned[:4] == control[:4]
    assert pruned[5:] != control[5:]
    assert strict(run / "control" / "events.json") == []


def test_the_saved_model_and_its_tokenizer_load_again_and_generate(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    counts = model.config.moe_config["per_layer_experts_blocks"]
    assert counts == [one["experts_after"] for one in strict(run / "events.json")[0]["layers"].values()]
    ids = tokenizer("The router", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.slow
def test_a_control_run_says_nothing_by_itself_either(start: Any) -> None:
    start(**SHORT, control=True)  # which looks at what was said


@pytest.mark.slow
def test_a_plain_terminal_gets_only_our_lines(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "write_report", light_report)
    with run_bars(quiet=False) as on_progress:
        settings = options(corpus, steps=20, eval_steps=10, prune_at_step=7)
        run_pretraining(settings, tmp_path / "run", on_progress=on_progress)
    out, err = capfd.readouterr()
    assert out == ""
    starts = ("pretrain 5/20", "pruned at step 7", "pretrain 10/20", "step 10:", "pretrain 15/20", "pretrain 20/20")
    found = err.splitlines()
    assert len(found) == len(starts) + 1
    assert all(line.startswith(words) for line, words in zip(found, starts, strict=False))
    for words in ("loss ", "tok/s", "begin", "load max/mean"):
        assert words in found[0]


@pytest.mark.slow
def test_the_detector_prunes_after_the_windows_that_agree(start: Any) -> None:
    (event,) = events(start(**LOOSE, steps=25, eval_steps=25))
    assert (event.step, event.reason) == (20, "stable")


@pytest.mark.slow
def test_loads_that_keep_moving_are_never_pruned(start: Any) -> None:
    run = start(**STRICT, steps=25, eval_steps=25)
    assert strict(run / "events.json") == []
    assert {line["phase"] for line in of_kind(run, "train")} <= {"begin", "moving", "unknown", "unlearned"}
    unpruned = strict(run / "report.json")["unpruned"]
    assert unpruned == strict(run / "unpruned.json")
    assert unpruned["step"] == 25
    assert sum(map(len, unpruned["dropped"].values())) > 0


@pytest.mark.slow
def test_tokens_prune_at_the_end_of_the_window_that_reaches_them(start: Any) -> None:
    (event,) = events(start(prune_at_tokens=10 * STEP_TOKENS, steps=15, eval_steps=15))
    assert (event.step, event.reason) == (12, "tokens")


@pytest.mark.slow
def test_a_schedule_prunes_more_than_once_and_its_plan_is_of_the_first_numbering(start: Any) -> None:
    run = start(prune=("step=5 target_params=0.8", "step=9 target_params=0.8"), steps=10, eval_steps=10)
    first, second = events(run)
    assert (first.step, second.step) == (5, 9)
    assert second.parameters_after <= 0.8 * first.parameters_after == 0.8 * second.parameters_before
    whole = Plan.load(run / "plan.json")
    assert whole.layers == first.plan.compose(second.plan).layers
    assert {one.experts_before for one in whole.layers.values()} == {8}


@pytest.mark.slow
def test_no_prune_only_watches(start: Any) -> None:
    run = start(**WATCHED)
    assert strict(run / "events.json") == []
    assert len(lines(run / "loads.jsonl")) == 2
    assert type(AutoModelForCausalLM.from_pretrained(run / "model")).__name__ == "Qwen3MoeForCausalLM"
    assert strict(run / "model" / "plan.json")["layers"]["0"]["order"] == list(range(8))


@pytest.mark.slow
def test_uniform_keeps_one_count_and_the_native_class(start: Any) -> None:
    run = start(**SHORT, uniform=True, multiple_of=2)
    (event,) = events(run)
    (count,) = {one.experts_after for one in event.layers.values()}
    assert count % 2 == 0
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (type(model).__name__, model.config.num_experts) == ("Qwen3MoeForCausalLM", count)
    assert not (run / "model" / "modeling_secateur.py").exists()


@pytest.mark.slow
def test_kept_counts_are_multiples_and_within_the_limits(start: Any) -> None:
    (event,) = events(start(**SHORT, multiple_of=3, min_experts=4, target_params=None, alpha=float("inf"), beta=0.9))
    assert {one.experts_after for one in event.layers.values()} <= {6, 8}
    (event,) = events(start(**SHORT, max_experts=5, target_params=None, alpha=0.01))
    assert {one.experts_after for one in event.layers.values()} <= {4, 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "check"),
    [
        ({"alpha": 0.6, "beta": 0.3}, lambda event: (event.alpha, event.beta) == (0.6, 0.3)),
        ({"alpha": float("inf"), "beta": 0.1}, lambda event: event.beta == 0.1),
        ({"max_rerouted": 0.1}, lambda event: 0 < event.rerouted_share <= 0.1),
        ({"target_params": 0.8}, lambda event: event.parameters_after <= 0.8 * event.parameters_before),
    ],
)
def test_every_rule_decides(start: Any, rule: Json, check: Any) -> None:
    (event,) = events(start(**SHORT, **rule))
    assert event.experts_after < event.experts_before
    assert check(event)


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Any:
    """The run without a balance, made once a preset."""
    root = tmp_path_factory.mktemp("unbalanced")

    def make(preset: str, **changes: Any) -> Path:
        if not (root / preset).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(program, "write_report", light_report)
                run_pretraining(options(corpus, preset=preset, balance="none", **changes), root / preset)
        return root / preset

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "balance"),
    [
        pytest.param("mixtral", "mixtral", marks=long),  # another preset with the balance of the next one
        ("qwen3_moe", "mixtral"),
        ("deepseek_v3", "deepseek_v3"),
        ("deepseek_v3", "bias"),
    ],
)
def test_every_balance_changes_the_run_and_lasts_through_the_pruning(
    start: Any, unbalanced: Any, preset: str, balance: str
) -> None:
    changes = {"preset": preset, "steps": 20, "prune_at_step": 9}
    plain, balanced = (
        [line["layers"] for line in lines(run / "loads.jsonl")]
        for run in (unbalanced(**changes), start(**changes, balance=balance, balance_strength=0.1))
    )
    assert plain != balanced
    last = [sum(max(loads) / (sum(loads) / len(loads)) for loads in one[-1].values()) for one in (plain, balanced)]
    assert last[1] < last[0]


@pytest.mark.slow
def test_bf16_trains_and_keeps_float32_weights(start: Any) -> None:
    run = start(**SHORT, precision="bf16")
    assert len(events(run)) == 1
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_gradient_checkpointing_changes_neither_the_losses_nor_the_loads(run: Path, start: Any) -> None:
    checkpointed = start(gradient_checkpointing=True)
    for name in ("metrics.jsonl", "loads.jsonl"):
        assert without_timings(lines(run / name)) == without_timings(lines(checkpointed / name))


@pytest.mark.slow
def test_accumulation_counts_every_token_also_where_an_epoch_ends(start: Any) -> None:
    run = start(accumulation=3, steps=15, eval_steps=15, prune_at_step=7, batch_size=4)
    blocks = strict(run / "run.json")["data"]["domains"]
    epoch = sum(one["train_tokens"] for one in blocks.values()) // STEP_TOKENS
    assert epoch % 3, "the corpus must leave micro-batches over"
    assert epoch < 3 * 15, "the run must pass the end of an epoch"
    for line in lines(run / "loads.jsonl"):
        assert {sum(loads) for loads in line["layers"].values()} == {2 * 4 * 3 * STEP_TOKENS}
        assert line["tokens"] == line["step"] * 3 * STEP_TOKENS
    (event,) = events(run)
    assert event.tokens == 7 * 3 * STEP_TOKENS


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_same_step_as_one_batch(start: Any) -> None:
    whole, parts = (
        start(**WATCHED),
        start(**WATCHED, batch_size=2, accumulation=2),
    )
    for one, other in zip(of_kind(whole, "train"), of_kind(parts, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(  # the states of the long ones have the shape of the parameter, as those of the default
    "optimizer",
    ["sgd", "adafactor", pytest.param("rmsprop", marks=long), pytest.param("adamw_torch_fused", marks=long)],
)
def test_every_optimizer_with_a_rule_goes_through_the_pruning(start: Any, optimizer: str) -> None:
    run = start(**SHORT, optimizer=optimizer, learning_rate=1e-3)
    assert len(events(run)) == 1


@pytest.mark.slow
def test_a_schedule_of_the_learning_rate_is_untouched_by_the_pruning(run: Path) -> None:
    rates = [[line["learning_rate"] for line in of_kind(one, "train")] for one in (run, run / "control")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


@pytest.mark.slow
def test_a_last_step_that_is_no_eval_step_is_validated_once(start: Any) -> None:
    run = start(steps=9, log_steps=3, eval_steps=6, save_steps=6, prune_at_step=5)
    assert [line["step"] for line in of_kind(run, "eval")] == [6, 9]


@pytest.mark.slow
def test_a_run_shorter_than_a_log_step_has_a_result(start: Any) -> None:
    run = start(steps=3, no_prune=True)
    assert of_kind(run, "train") == []
    assert strict(run / "summary.json")["tokens_per_second"] == {"before": None, "after": None}
    assert strict(run / "report.json")["validation_loss"] > 0


@pytest.mark.slow
def test_a_config_file_is_trained_as_it_says(start: Any, tmp_path: Path) -> None:
    fields = {
        "model_type": "qwen3_moe",
        "vocab_size": 320,
        "dtype": "bfloat16",
        **QWEN3_MOE,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    run = start(**SHORT, config=str(tmp_path / "config.json"), target_params=0.8)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.vocab_size == 320
    assert strict(run / "run.json")["model"]["experts"] == {"0": 6, "1": 6}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_pruned_model_goes_on_where_it_was_with_its_tokenizer(run: Path, start: Any) -> None:
    further = start(**WATCHED, model=str(run / "model"), learning_rate=1e-9, weight_decay=0.0)
    before, after = (strict(one / "summary.json")["validation_loss"] for one in (run, further))
    assert after == pytest.approx(before, rel=1e-3)
    tokenizers = [(one / "model" / "tokenizer.json").read_bytes() for one in (run, further)]
    assert tokenizers[0] == tokenizers[1]
    counts = [AutoConfig.from_pretrained(one / "model").moe_config for one in (run, further)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_pruned_model_is_pruned_again(run: Path, start: Any) -> None:
    further = start(**SHORT, model=str(run / "model"), target_params=0.9)
    (first,), (second,) = events(run), events(further)
    assert {layer: one.experts_before for layer, one in second.layers.items()} == {
        layer: one.experts_after for layer, one in first.layers.items()
    }
    moe = describe_moe(AutoModelForCausalLM.from_pretrained(further / "model"))
    assert moe.counts == {layer: one.experts_after for layer, one in second.layers.items()}
    assert moe.num_parameters <= 0.9 * second.parameters_before


def test_the_config_of_a_pruned_model_makes_another_one_with_its_counts(run: Path, start: Any) -> None:
    further = start(config=str(run / "model" / "config.json"), no_prune=True, steps=5)
    (event,) = events(run)
    assert strict(further / "run.json")["model"]["experts"] == {
        str(layer): one.experts_after for layer, one in event.layers.items()
    }


@pytest.mark.slow
def test_a_given_tokenizer_is_the_one_that_is_used_and_kept(run: Path, start: Any) -> None:
    further = start(tokenizer=str(run / "data" / "tokenizer"), vocab_size=4096, steps=5, no_prune=True)
    kept, given = (one / "data" / "tokenizer" / "tokenizer.json" for one in (further, run))
    assert kept.read_bytes() == given.read_bytes()
    assert strict(further / "model" / "config.json")["vocab_size"] == 300


@pytest.mark.slow
def test_folders_files_and_globs_are_read_as_domains(start: Any, corpus: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", key="body", seed=1)
    run = start(data=(str(corpus / "prose"), f"rows={rows}", f"py={corpus}/code/*.py"), text_key="body", **WATCHED)
    domains = strict(run / "run.json")["data"]["domains"]
    assert {name: one["documents"] for name, one in domains.items()} == {"prose": 24, "rows": 24, "py": 24}
    assert set(strict(run / "summary.json")["validation_loss_by_domain"]) == {"prose", "rows", "py"}


def test_the_plan_of_a_run_says_what_the_run_then_does(run: Path, corpus: Path) -> None:
    plan = plan_of_run(options(corpus, control=True))
    (event,) = events(run)
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["model"].items() >= strict(run / "run.json")["model"].items()
    assert plan["training"]["tokens"] == strict(run / "summary.json")["tokens"]
    assert plan["memory_bytes"]["parameters"] == event.memory_before.parameters_bytes
    assert plan["memory_bytes"]["optimizer"] == pytest.approx(event.memory_before.optimizer_bytes, rel=0.01)
    assert plan["data"]["sources"] == list(data_in(corpus))


@pytest.mark.parametrize(("optimizer", "ratio"), [("adamw_torch", 2), ("rmsprop", 1), ("sgd", 0)])
def test_the_plan_knows_the_memory_of_the_optimizer(corpus: Path, optimizer: str, ratio: int) -> None:
    memory = plan_of_run(options(corpus, optimizer=optimizer))["memory_bytes"]
    assert memory["optimizer"] == pytest.approx(ratio * memory["parameters"], rel=0.01)


def test_the_plan_counts_the_checkpoints_and_the_least_experts(corpus: Path) -> None:
    plan = plan_of_run(
        options(corpus, steps=45, save_steps=10, multiple_of=3, min_experts=4, alpha=float("inf"), beta=0.5)
    )
    assert plan["training"]["checkpoints"] == 5
    (pruning,) = plan["prunings"]
    assert pruning["least_experts_per_layer"] == {"0": 6, "1": 6}
    assert pruning["rule"] == {"alpha": "inf", "beta": 0.5, "uniform": False}
    assert pruning["when"] == "step 23"


@pytest.mark.slow
def test_tensorboard_logs_outlast_the_checkpoints(start: Any) -> None:
    pytest.importorskip("tensorboard")
    run = start(**SHORT, report_to="tensorboard")
    logged = scalars(run / "tensorboard")
    assert 10 in logged["train/loss"]
    assert 7 in logged["train/laep/experts"]


def test_a_run_that_diverges_ends_with_an_error_that_says_so(start: Any, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"diverged.*--learning-rate|NaN or infinite"):
        start(learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0)
    assert all("NaN" not in (path / "metrics.jsonl").read_text() for path in tmp_path.glob("run*"))


def test_a_gradient_norm_that_is_infinite_is_null_in_the_log(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *args, **kwargs: float("inf"))
    assert {line["grad_norm"] for line in of_kind(start(steps=5, no_prune=True), "train")} == {None}


@pytest.mark.slow
def test_a_domain_smaller_than_a_batch_is_validated_too(start: Any) -> None:
    run = start(batch_size=48, steps=5, eval_steps=5, no_prune=True)
    tokens = strict(run / "run.json")["data"]["domains"]["code"]["validation_tokens"]
    assert tokens < 48 * 32
    assert set(of_kind(run, "eval")[0]["validation_loss_by_domain"]) == {"code", "prose"}


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_batch(run: Path, start: Any) -> None:
    """That of the run, whose batch is of 4, is measured again with others."""
    frozen = {"model": str(run / "model"), "learning_rate": 1e-12, "weight_decay": 0.0, "no_prune": True}
    frozen |= {"steps": 2, "log_steps": 1, "eval_steps": 2}
    runs = [run, *(start(**frozen, batch_size=size) for size in (3, 48))]
    losses = [strict(one / "summary.json")["validation_loss"] for one in runs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
