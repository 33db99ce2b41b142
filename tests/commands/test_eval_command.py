"""`secateur eval`: losses of the models themselves, loaded or streamed, compared block by block."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from secateur import cli
from secateur.data.batch import Batch
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import SecateurError
from secateur.model_folder.evaluation import on_text as evaluate_module
from secateur.model_folder.evaluation.evaluate import evaluate
from secateur.model_folder.evaluation.on_text import evaluate_text
from secateur.model_folder.evaluation.perplexity import BlockLosses, block_losses, difference, summary
from secateur.model_folder.read import load as load_module
from secateur.model_folder.rewrite.apply import apply_to_model
from support import lm_eval_stand_in
from support.long_tests import long
from support.model_folders import loaded, plan_of, saved
from support.models_with_text import data_in, model_with_text
from support.tiny_models import VOCABULARY, random_tokens

Run = Callable[..., tuple[int, str, str]]


def losses(*pairs: tuple[float, int]) -> BlockLosses:
    return BlockLosses(
        loss=torch.tensor([loss for loss, _ in pairs], dtype=torch.float64),
        tokens=torch.tensor([tokens for _, tokens in pairs]),
    )


# --- numbers ------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_tokens() -> None:
    found = summary(losses((2.0, 2), (1.0, 2), (9.0, 4)), ["a", "b", "a"])
    assert found["loss"] == 12 / 8
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert (found["tokens"], found["blocks"]) == (8, 3)
    assert found["domains"]["a"]["loss"] == 11 / 6
    assert found["domains"]["b"]["perplexity"] == pytest.approx(math.exp(0.5))
    assert found["domains"]["b"]["standard_error"] is None
    assert summary(losses((8000.0, 2)), ["a"])["perplexity"] is None


def test_the_standard_error_of_equal_blocks_is_their_deviation_over_the_root_of_their_number() -> None:
    found = summary(losses((2.0, 2), (4.0, 2), (12.0, 2)), ["a"] * 3)
    assert found["standard_error"] == pytest.approx(torch.tensor([1.0, 2.0, 6.0]).std().item() / math.sqrt(3))


def test_a_difference_is_paired_and_its_range_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(200, generator=generator, dtype=torch.float64) * 100
    more = torch.randn(200, generator=generator, dtype=torch.float64) + 0.5
    tokens = torch.full((200,), 10)
    found = difference(BlockLosses(loss=base + 10 * more, tokens=tokens), BlockLosses(loss=base, tokens=tokens), seed=1)
    assert found["loss"] == pytest.approx(float(more.mean()))
    assert found["standard_error"] == pytest.approx(float(more.std()) / math.sqrt(200))
    assert found["low"] == pytest.approx(found["loss"] - 1.96 * found["standard_error"], abs=0.02)
    assert found["high"] == pytest.approx(found["loss"] + 1.96 * found["standard_error"], abs=0.02)
    same = difference(losses((1.0, 2), (3.0, 2)), losses((1.0, 2), (3.0, 2)))
    assert (same["loss"], same["low"], same["high"]) == (0, 0, 0)
    assert difference(losses((2.0, 2)), losses((1.0, 2))) == {
        "loss": 0.5, "standard_error": None, "low": None, "high": None
    }  # fmt: skip
    with pytest.raises(SecateurError, match="not of the same blocks"):
        difference(losses((1.0, 2)), losses((1.0, 3)))


def test_padding_is_not_counted_whatever_its_logits() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 0, 0], [0, 4, 5, 6, 1]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    logits[0, 3:], logits[1, 0] = float("nan"), float("nan")
    found = block_losses(logits, ids, mask)
    assert found.tokens.tolist() == [2, 3]
    assert float(found.loss[0]) == pytest.approx(float(cross_entropy(logits[0, :2], ids[0, 1:3], reduction="sum")))
    assert float(found.loss[1]) == pytest.approx(float(cross_entropy(logits[1, 1:4], ids[1, 2:], reduction="sum")))


def test_the_last_token_of_a_vocabulary_is_measured_and_the_one_after_it_is_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    ids = torch.tensor([[1, VOCABULARY - 1]])
    (found,) = evaluate_text([tmp_path / "model"], [Batch(input_ids=ids)], ["one"])
    assert found["tokens"] == 1
    with pytest.raises(SecateurError, match=f"a token of id {VOCABULARY}, but its vocabulary is {VOCABULARY}"):
        evaluate_text([tmp_path / "model"], [Batch(input_ids=ids + 1)], ["one"])


def test_a_loss_that_is_no_number_and_blocks_without_tokens_are_refused() -> None:
    with pytest.raises(SecateurError, match="the loss of block 1 is nan"):
        losses((1.0, 2), (float("nan"), 2))
    with pytest.raises(SecateurError, match="no token to predict"):
        losses((0.0, 0))


# --- models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, its pruned form, and text."""
    root = tmp_path_factory.mktemp("made")
    model_with_text(root)
    plan = plan_of(*((layer, [0, 2, 3, 5, 6]) for layer in range(3)))
    apply_to_model(root / "source", plan, root / "pruned")
    return root


def batches(vocabulary: int = VOCABULARY) -> list[Batch]:
    return [Batch(input_ids=random_tokens(2, 12, seed=seed) % vocabulary) for seed in range(3)]


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
def test_the_losses_are_those_of_the_model_itself(stream: bool, made: Path) -> None:
    (found,) = evaluate_text([made / "source"], batches(), ["code", "prose"] * 3, stream=stream)
    model = loaded(made / "source").eval()
    total = 0.0
    with torch.no_grad():
        for batch in batches():
            total += float(model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss) * 22
    assert found["loss"] == pytest.approx(total / 66, rel=1e-6)
    assert (found["tokens"], found["blocks"], found["streamed"]) == (66, 6, stream)


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "gpt_oss", *(pytest.param(one, marks=long) for one in ("dbrx", "jamba", "mixtral"))],
)
def test_loaded_and_streamed_are_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "model")
    ways = [evaluate_text([tmp_path / "model"], batches(), ["a"] * 6, stream=stream)[0] for stream in (False, True)]
    assert ways[0] | {"streamed": True} == ways[1]


def test_layers_with_different_counts_are_measured_too(made: Path, tmp_path: Path) -> None:
    apply_to_model(made / "source", plan_of((0, [0, 1, 2]), (2, [3, 4, 5, 6])), tmp_path / "out")
    ways = [evaluate_text([tmp_path / "out"], batches(), ["a"] * 6, stream=stream)[0] for stream in (False, True)]
    assert ways[0] | {"streamed": True} == ways[1]


def test_a_model_is_streamed_where_it_does_not_fit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_text([made / "source"], batches(), ["a"] * 6)[0]["streamed"] is False
    monkeypatch.setattr(load_module, "free_memory", lambda: 1)
    monkeypatch.setattr(evaluate_module, "loaded_losses", lambda *_: pytest.fail("loaded"))
    assert evaluate_text([made / "source"], batches(), ["a"] * 6)[0]["streamed"] is True


def test_a_token_beyond_the_vocabulary_is_refused(made: Path) -> None:
    wrong = [Batch(input_ids=torch.tensor([[1, 9999]]))]
    with pytest.raises(SecateurError, match="a token of id 9999, but its vocabulary is"):
        evaluate_text([made / "source"], wrong, ["a"])


# --- as it is typed -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["secateur", "eval", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, " ".join(captured.err.split())

    return command


def text(made: Path) -> list[object]:
    return [*data_in(made), "--sequence-length", 16, "--samples", 8]


@pytest.mark.slow
def test_models_are_compared_on_the_same_tokens(run: Run, made: Path) -> None:
    status, out, err = run(made / "source", made / "pruned", *text(made), "--json")
    assert status == 0, err
    first, second = json.loads(out)["models"]
    assert first["tokens"] == second["tokens"] == 8 * 15
    assert first["domains"].keys() == {"code", "prose"}
    assert first["difference"] is None
    assert second["difference"]["loss"] == pytest.approx(second["loss"] - first["loss"])
    assert second["difference"]["low"] <= second["difference"]["loss"] <= second["difference"]["high"]
    assert first["experts"] == 24
    assert second["experts"] == 15
    assert run(made / "source", made / "pruned", *text(made), "--json", "--stream")[1] == out.replace(
        '"streamed": false', '"streamed": true'
    )
    status, out, _ = run(made / "source", made / "pruned", *text(made), "--quiet")
    assert status == 0
    for part in ("perplexity", "code", "prose", "8 blocks, 120 tokens"):
        assert part in out


def test_other_tokenizers_are_refused(run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pruned", tmp_path / "other")
    train_tokenizer(["was" * 50, "x y z " * 20], vocab_size=275).save_pretrained(tmp_path / "other")
    status, _, err = run(made / "source", tmp_path / "other", *text(made))
    assert (status, "its tokenizer makes other tokens of the text than that of" in err) == (2, True), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: give text with --data"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--lm-eval", "arc_easy"], "--lm-eval needs the package lm-eval, which is not installed"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, run: Run, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run(made / "source", *words)
    assert (status, message in err) == (2, True), err
    assert "a model is listed twice" in run(made / "source", made / "source", *text(made))[2]


def metrics_of(task: str, model: lm_eval_stand_in.HFLM) -> dict[str, Any]:
    """Of a stand-in for a task: that called `broken` ends in an error, as one whose data cannot be had does."""
    if task == "broken":
        raise FileNotFoundError("no\nsuch data")
    if task == "exits":
        raise SystemExit(1)
    return {"acc,none": torch.tensor(0.25), "alias": task}


def test_tasks_are_handed_to_lm_eval_one_by_one_on_a_device(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = lm_eval_stand_in.install(monkeypatch, metrics_of)
    status, out, err = run(made / "source", made / "pruned", "--lm-eval", "one, two", "--batch-size", 3, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["lm_eval"][str(made / "pruned")] == {
        task: {"acc,none": 0.25, "alias": task} for task in ("one", "two")
    }
    assert found["lm_eval_failures"] == {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert calls == [
        {"folder": str(made / folder), "tasks": [task], "batch_size": 3, "device": device}
        for folder in ("source", "pruned")
        for task in ("one", "two")
    ]
    assert "acc,none 0.25" in run(made / "source", "--lm-eval", "one")[1]
    assert "it names no task" in run(made / "source", "--lm-eval", " , ")[2]


def test_what_was_measured_before_a_task_fails_is_printed_and_the_failure_is_named(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval_stand_in.install(monkeypatch, metrics_of)
    words = (made / "source", *text(made), "--lm-eval", "one,broken,exits,two")
    status, out, err = run(*words)
    assert status == 2
    assert "lm-eval cannot run it: FileNotFoundError: no such data" in err
    assert "exits" in err
    assert "tokens to predict" in out
    assert [line.split(": ")[1] for line in out.splitlines() if "acc,none" in line] == ["one", "two"]
    status, out, err = run(*words, "--json")
    found = json.loads(out)
    assert (status, len(found["models"])) == (2, 1)
    assert list(found["lm_eval"][str(made / "source")]) == ["one", "two"]
    assert list(found["lm_eval_failures"][str(made / "source")]) == ["broken", "exits"]


def test_a_task_on_a_model_that_was_changed_has_failed_and_those_before_it_have_not(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))

    def change_it(task: str, model: lm_eval_stand_in.HFLM) -> dict[str, Any]:
        if task == "two":
            os.utime(source / "config.json", (1, 1))
        return metrics_of(task, model)

    lm_eval_stand_in.install(monkeypatch, change_it)
    status, out, err = run(source, "--lm-eval", "one,two", "--json")
    found = json.loads(out)
    assert (status, list(found["lm_eval"][str(source)])) == (2, ["one"])
    assert "config.json: it was changed while it was in use" in found["lm_eval_failures"][str(source)]["two"]
    assert "run it again" in err


def test_a_tokenizer_that_is_changed_while_models_are_measured_is_an_error_and_a_card_is_not(
    made: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    for name in ("README.md", "tokenizer.json"):
        (source / name).touch()

    def measure(name: str) -> None:
        change = lambda what, done, total: (source / name).write_text("other")  # noqa: E731
        evaluate(source, data=made / "code.jsonl", samples=2, sequence_length=16, batch_size=2, on_progress=change)

    measure("README.md")
    with pytest.raises(SecateurError, match=r"tokenizer\.json: it was changed .*; start again when nobody changes it"):
        measure("tokenizer.json")


def test_a_model_that_lm_eval_cannot_load_fails_all_its_tasks_and_no_other_models(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval_stand_in.install(monkeypatch, metrics_of)
    (tmp_path / "empty").mkdir()
    status, out, err = run(tmp_path / "empty", made / "pruned", "--lm-eval", "one,two")
    assert (status, err.count("lm-eval cannot load")) == (2, 2), err
    assert out.count("acc,none") == 2


# --- lm-eval itself, where it is installed --------------------------------------------------------------------------


def test_the_stand_in_has_the_parameters_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    real = {"simple_evaluate": evaluator.simple_evaluate, "HFLM": models.HFLM.__init__}
    lm_eval_stand_in.install(monkeypatch, metrics_of)
    standing = {"simple_evaluate": sys.modules["lm_eval"].simple_evaluate, "HFLM": lm_eval_stand_in.HFLM.__init__}
    for name, function in standing.items():
        assert inspect.signature(function).parameters.keys() <= inspect.signature(real[name]).parameters.keys()


@pytest.mark.slow
def test_a_task_of_lm_eval_runs_on_a_model_whose_layers_differ(run: Run, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    questions = [{"q": f"def return {number}", "answers": ["x", "times"], "label": number % 2} for number in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    task = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "made_up.yaml").write_text(json.dumps(task))  # which is YAML too
    (tmp_path / "broken.yaml").write_text(json.dumps(task | {"task": "broken"}).replace("q.jsonl", "none.jsonl"))
    tasks = f"{tmp_path}/broken.yaml,{tmp_path}/made_up.yaml"
    status, out, err = run(made / "source", made / "pruned", "--lm-eval", tasks, "--json")
    assert (status, "none.jsonl" in err) == (2, True), err
    found = json.loads(out)["lm_eval"]
    assert {model: 0 <= tasks["made_up"]["acc,none"] <= 1 for model, tasks in found.items()} == {
        str(made / "source"): True,
        str(made / "pruned"): True,
    }
