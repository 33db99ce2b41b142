"""Bad input of `secateur pretrain`: one line that names the thing, before data is read where possible."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from secateur import cli
from secateur.data.tokenizer import train_tokenizer
from secateur.pretraining import data as of_data
from secateur.pretraining import run as program
from secateur.pretraining import run_folder
from support.small_corpus import write_corpus, write_jsonl
from support.small_runs import QWEN3_MOE, TINY, corpus_in, data_in, light_report, options

TINY_WORDS = [word for key, value in QWEN3_MOE.items() for word in ("--set", f"{key}={value}")]
SMALL_WORDS = [
    *("--vocab-size", "300", "--sequence-length", "32", "--batch-size", "4", "--steps", "40", "--threads", "1"),
    *("--log-steps", "5", "--eval-steps", "20", "--save-steps", "20", "--window-steps", "4", "--min-windows", "5"),
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a few steps with a pruning, without figures."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "write_report", light_report)
        program.run_pretraining(options(corpus, steps=5, prune_at_step=3), out)
    return out


@pytest.fixture
def refusal(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line that a command ends with, after checking that it left nothing behind."""

    def run(*words: str, out: Path | None = None, data: bool = True, model: bool = True, read: bool = False) -> str:
        folder = tmp_path / "run" if out is None else out
        command = ["secateur", "pretrain", "--out", str(folder), *SMALL_WORDS]
        command += [word for path in data_in(corpus) for word in ("--data", path)] if data else []
        command += TINY_WORDS if model else []
        monkeypatch.setattr(sys, "argv", [*command, *words])
        monkeypatch.setattr(program, "_train", lambda *args, **kwargs: pytest.fail("training was begun"))
        if not read:
            monkeypatch.setattr(of_data, "prepare", lambda *args, **kwargs: pytest.fail("data was read"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        if out is None:
            assert not folder.exists()
        text = capfd.readouterr().err
        assert text.startswith("error: ")
        assert len(text.splitlines()) == 1
        return text

    return run


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--preset llama", ["--preset 'llama'", "qwen3_moe"]),
        ("--set hidden_sise=3", ["--set hidden_sise"]),
        ("--set hidden_size=wide", ["hidden_size"]),
        ("--set num_attention_heads=0", ["qwen3_moe"]),
        ("--set num_experts=1", ["experts", "num_experts_per_tok is 2"]),
        ("--set output_router_logits=true", ["output_router_logits"]),
        ("--set vocab_size=299", ["--vocab-size is 300", "299"]),
        ("--config missing.json", ["--config missing.json"]),
        ("--preset olmoe --config c.json", ["--preset", "--config"]),
        ("--model missing", ["--model"]),
        ("--tokenizer missing", ["tokenizer missing", "no such folder"]),
        ("--data missing.txt", ["missing.txt", "no such file"]),
        ("--data none-*.txt", ["none-*.txt", "found 0 files"]),
        ("--optimizer adagrad", ["Adagrad", "no rule"]),
        ("--optimizer adamw_8bit", ["bitsandbytes"]),
        ("--optimizer nonsense", ["nonsense"]),
        ("--schedule nonsense", ["nonsense", "cosine"]),
        ("--schedule warmup_stable_decay", ["num_decay_steps"]),
        ("--schedule reduce_lr_on_plateau", ["--schedule reduce_lr_on_plateau"]),
        ("--precision fp8", ["--precision", "fp8"]),
        ("--report-to nonsense", ["nonsense", "tensorboard"]),
        ("--balance nonsense", ["nonsense", "mixtral"]),
        ("--balance bias", ["bias", "qwen3_moe", "deepseek_v3"]),
        ("--balance mixtral --balance-strength -1", ["coefficient", "-1"]),
        ("--balance-strength 0.1", ["balance 'none'", "0.1"]),
        ("--alpha 0", ["--alpha", "0"]),
        ("--beta 1.5", ["--beta", "1.5"]),
        ("--target-params 1.2", ["--target-params", "1.2"]),
        ("--max-rerouted 0", ["--max-rerouted", "0"]),
        ("--alpha 0.4 --target-params 0.5", ["--alpha", "--target-params"]),
        (
            "--target-params 0.2",
            ["target_params is 0.2", "smallest share that can be reached is 0.5", "keep at least 2"],
        ),
        ("--target-params 0.6 --min-experts 6", ["target_params is 0.6", "keep at least 6"]),
        ("--target-params 0.6 --multiple-of 8", ["target_params is 0.6", "keep at least 8"]),
        ("--target-params 0.6 --uniform --min-experts 7", ["with uniform"]),
        ("--prune step=9,target_params=0.7 --prune step=20,target_params=0.7", ["target_params is 0.48", "0.5"]),
        ("--max-experts 1", ["--max-experts 1", "top-2"]),
        ("--min-experts 9", ["--min-experts 9", "8 experts"]),
        ("--multiple-of 0", ["--multiple-of is 0"]),
        ("--multiple-of 3 --max-experts 2", ["--multiple-of 3", "--max-experts 2"]),
        ("--prune nonsense", ["--prune 'nonsense'", "stable"]),
        ("--prune-at-step 40", ["step 40", "--steps 40"]),
        ("--prune-at-step 400", ["step 400", "--steps 40"]),
        ("--prune-at-tokens 5000", ["5000 tokens", "step 40"]),
        ("--prune-at-tokens 1000000", ["1000000 tokens"]),
        ("--prune step=39,alpha=0.2 --prune stable,alpha=0.4", ["the stable phase", "step 59"]),
        ("--window-steps 8", ["the stable phase", "step 40", "--window-steps (8)", "5 windows"]),
        ("--warmup-steps 38", ["the stable phase", "step 40", "--warmup-steps (38)"]),
        ("--window-steps 0", ["window_steps is 0"]),
        ("--no-prune --alpha 0.4", ["--no-prune", "--alpha"]),
        ("--steps 0", ["--steps is 0"]),
        ("--threads 0", ["--threads is 0"]),
        ("--seed -1", ["--seed is -1"]),
        ("--eval-steps 7", ["--eval-steps is 7", "--log-steps (5)"]),
        ("--set x", ["--set 'x'"]),
        ("--ep 2", ["--ep 2", "found 1 process;", "torchrun --nproc-per-node 2"]),
        ("--tp 2", ["--tp 2", "found 1 process;", "torchrun --nproc-per-node 2"]),
        ("--fsdp 2 --tp 2", ["--fsdp 2 x --tp 2", "expected 4 processes, found 1 process;"]),
        ("--ep 3 --dry-run", ["--ep 3", "layer 0 has 8 experts"]),
        ("--ep 2 --tp 4 --dry-run", ["--ep 2", "multiple of --tp 4"]),
        ("--fsdp 2 --ep 4 --dry-run", ["--ep 4", "expected a multiple of 4 processes, found 2"]),
        ("--tp 2 --dry-run", ["--tp 2", "num_key_value_heads is 1"]),
        ("--fsdp 3 --dry-run", ["--batch-size 4", "multiple of the 3"]),
        ("--ep 4 --target-params 0.6 --min-experts 3 --max-experts 3 --dry-run", ["--ep 4", "--max-experts 3"]),
        ("--rearrange-ranks 3", ["--rearrange-ranks 3", "layer 0 has 8 experts"]),
        ("--rearrange-method nonsense", ["'nonsense'", "swaps"]),
        ("--no-rearrange --rearrange-every 5", ["--no-rearrange", "--rearrange-every"]),
    ],
)
def test_a_bad_option_is_named_before_data_is_read(
    words: str, named: list[str], refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    has_model = not any(word in words for word in ("--config", "--model", "--preset"))
    text = refusal(*words.split(), model=has_model)
    for part in named:
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_goal_that_can_just_be_reached_is_not_refused(corpus: Path) -> None:
    """The other side of the floor: the share that the error names is taken."""
    from secateur.errors import SecateurError
    from secateur.pretraining.preflight import check_before_data

    def check(share: float) -> None:
        changes = {"vocab_size": 300, "overrides": QWEN3_MOE, "data": data_in(corpus)}
        check_before_data(program.PretrainOptions(target_params=share, **changes))

    with pytest.raises(SecateurError) as caught:
        check(0.2)
    smallest = float(str(caught.value).partition("can be reached is ")[2].partition(":")[0])
    check(smallest)
    with pytest.raises(SecateurError):
        check(smallest - 0.0002)


@pytest.mark.parametrize("flag", ["ep", "fsdp"])
def test_a_family_that_transformers_cannot_split_is_named(
    flag: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG_MAPPING["qwen3_moe"], f"base_model_{flag}_plan", None)
    text = refusal(f"--{flag}", "2", "--dry-run")
    assert f"--{flag} 2: transformers has no {flag} plan for model type 'qwen3_moe'" in text


def test_fp16_is_refused_where_there_is_no_gpu(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--precision fp16 needs a GPU" in refusal("--precision", "fp16")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2}, ["'llama'", "experts"]),
        ({"model_type": "no_such_family"}, ["no_such_family"]),
        ({"model_type": "vit"}, ["'vit'", "no causal language model"]),
        ({"model_type": "jetmoe", "vocab_size": 300}, ["'jetmoe'", "second, separate set of experts"]),
        (
            {"model_type": "qwen3_moe", **QWEN3_MOE, "num_experts_per_tok": 9},
            ["num_experts_per_tok is 9", "there are 8 experts"],
        ),
        ({"model_type": "qwen3_moe", **QWEN3_MOE, "vocab_size": 200}, ["--vocab-size is 300", "200"]),
        ({"hidden_size": 32}, ["model_type"]),
    ],
)
def test_a_config_of_another_kind_of_model_is_named(
    fields: dict[str, Any], named: list[str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    text = refusal("--config", str(tmp_path / "config.json"), model=False)
    for part in named:
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "shape", "tokenizer", "larger tokenizer"])
def test_a_model_folder_that_does_not_fit_is_named_before_data_is_read(
    what: str, refusal: Callable[..., str], tmp_path: Path, finished: Path
) -> None:
    source, model = finished / "model", tmp_path / "model"
    model.mkdir()
    for path in source.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    words, named = ["--model", str(model), "--target-params", "0.95"], str(model)
    if what == "weights":
        (model / "model.safetensors").unlink()
    if what == "shape":
        config = json.loads((model / "config.json").read_text())
        config["moe_intermediate_size"] += 1
        (model / "config.json").write_text(json.dumps(config))
    if what == "tokenizer":
        (model / "tokenizer.json").unlink()
        named = "--tokenizer"
    if what == "larger tokenizer":
        large = train_tokenizer([" ".join(f"word{i}" for i in range(300))], vocab_size=400)
        large.save_pretrained(tmp_path / "tokenizer")
        words, named = [*words, "--tokenizer", str(tmp_path / "tokenizer")], "found 400 tokens"
    assert named in refusal(*words, model=False)


def test_a_folder_without_tokenizer_is_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "found no tokenizer" in refusal("--tokenizer", str(tmp_path / "empty"))


def test_a_dense_model_folder_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    train_tokenizer(["a text"], vocab_size=260).save_pretrained(tmp_path / "model")
    assert "'llama'" in refusal("--model", str(tmp_path / "model"), model=False)


def data_files(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """{what is wrong: (words, what the message names)}."""
    latin = folder / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    blank = folder / "blank.txt"
    blank.write_text(" \n")
    rows = write_jsonl(folder / "rows.jsonl")
    broken = folder / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    number = folder / "number.jsonl"
    number.write_text('{"text": "a"}\n{"text": 3}\n')
    one = folder / "one.txt"
    one.write_text("the only document")
    words = write_jsonl(folder / "two.jsonl", documents=2)
    return {
        "not UTF-8": (["--data", str(latin)], ["latin.txt", "not UTF-8"]),
        "blank": (["--data", str(blank)], ["blank.txt", "found no text"]),
        "missing key": (["--data", str(rows), "--text-key", "body"], ["rows.jsonl:1", "'text'", "'body'"]),
        "broken line": (["--data", str(broken)], ["broken.jsonl:2"]),
        "no string": (["--data", str(number)], ["number.jsonl:2", "int"]),
        "one document": (["--data", str(one)], ["one.txt", "found 1 document"]),
        "no block": (
            ["--data", str(words), "--sequence-length", "4096"],
            ["found", "one block of sequence_length 4096"],
        ),
        "no step": (["--data", str(rows), "--batch-size", "999"], ["--batch-size 999", "expected at least the 999"]),
        "no step by accumulation": (["--data", str(rows), "--accumulation", "99"], ["4 x --accumulation 99", "396"]),
    }


@pytest.mark.parametrize("what", [
    "not UTF-8", "blank", "missing key", "broken line", "no string", "one document", "no block", "no step",
    "no step by accumulation",
])  # fmt: skip
def test_bad_data_is_named_and_leaves_nothing_behind(what: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    words, named = data_files(tmp_path)[what]
    text = refusal(*words, data=False, read=True)
    for part in named:
        assert part in text


def test_an_empty_file_is_named_before_any_other_is_read(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: found 0 bytes" in refusal("--data", str(tmp_path / "empty.txt"))


def test_bad_data_in_an_empty_folder_that_was_there_leaves_it_empty(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words, _ = data_files(tmp_path)["not UTF-8"]
    refusal(*words, data=False, read=True, out=out)
    assert list(out.iterdir()) == []


def test_after_a_refusal_the_same_folder_can_be_used(
    refusal: Callable[..., str], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words, _ = data_files(tmp_path)["missing key"]
    refusal(*words, data=False, read=True, out=out)
    assert not out.exists()
    begun: list[Path] = []
    monkeypatch.setattr(program, "_finish", lambda options, folder, *rest, **more: begun.append(folder.path) or {})
    changes = {"vocab_size": 300, "sequence_length": 32, "overrides": QWEN3_MOE}
    program.run_pretraining(program.PretrainOptions(data=data_in(corpus), **changes), out)
    assert begun == [out]


def test_a_folder_with_files_is_refused_and_untouched(refusal: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "expected a new or empty folder" in refusal(out=out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"thesis.tex": "years of work"}


def test_a_finished_run_is_refused_and_untouched(refusal: Callable[..., str], finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "--resume" in refusal(out=finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_file_is_refused_as_the_folder(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    assert "found a file" in refusal(out=tmp_path / "file")
    assert "cannot be made" in refusal(out=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "content"


def test_a_folder_that_cannot_be_written_is_refused_before_data_is_read(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(run_folder.Path, "open", refuse)  # root may write anywhere, so no real folder would do
    assert f"--out {out}: cannot be written (Permission denied)" in refusal(out=out)


@pytest.mark.parametrize("preset", [name for name in TINY if name != "qwen3_moe"])
def test_the_floor_of_a_goal_is_found_for_other_families_too(preset: str, refusal: Callable[..., str]) -> None:
    words = [word for key, value in TINY[preset].items() for word in ("--set", f"{key}={value}")]
    text = refusal("--preset", preset, *words, "--target-params", "0.05", model=False)
    assert "smallest share that can be reached" in text


def test_two_domains_of_a_corpus_are_enough(tmp_path: Path) -> None:
    """The corpus of these tests is itself good input."""
    assert {path.name for path in write_corpus(tmp_path / "corpus", documents=2).iterdir()} == {"prose", "code"}
