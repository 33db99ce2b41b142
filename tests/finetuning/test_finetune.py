"""Fine-tuning of language models: what is learnt, what is kept, and that a killed run ends as if it had not been."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from typer.testing import CliRunner

from secateur.cli import app
from secateur.data.batch import Batch
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import SecateurError
from secateur.files.work_folder import place_of_work
from secateur.finetuning.model import kept_files, load
from secateur.finetuning.options import FinetuneOptions, in_parts
from secateur.finetuning.run import WHAT
from secateur.finetuning.text import pack_domains, text_task
from secateur.model_folder.evaluation.on_text import evaluate_text
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.plans import LayerPlan, Plan
from secateur.train import checkpoints
from support.faults import Kill, LimitFileSize
from support.small_finetunes import files_of, run, text_folder, text_options
from support.small_runs import in_child
from support.tiny_models import tiny_model

UNEVEN = Plan(
    layers={0: LayerPlan(experts_before=8, order=(0, 2, 5)), 2: LayerPlan(experts_before=8, order=(1, 3, 4, 6, 7))},
    criterion="random",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("text"))


def copy_of(root: Path, place: Path) -> Path:
    return Path(shutil.copytree(root / "source", place / "source"))


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    options = text_options(root, eval_data=text_options(root).data, steps=10)
    run(root, root / "tuned", options)
    return root / "tuned"


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "finetune.json").read_text())
    return record


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def blocks_of(root: Path) -> dict[str, torch.Tensor]:
    options = text_options(root)
    packed = pack_domains(load_tokenizer(root / "source"), options.data, 16, options)
    return {domain: one.blocks for domain, one in packed.items()}


def test_the_loss_falls_on_what_is_trained(tuned: Path) -> None:
    record = record_of(tuned)
    before, after = record["evaluations"]
    assert (before["step"], after["step"]) == (0, 10)
    assert after["loss"] < before["loss"] - 1
    assert record["losses"][-1]["loss"] < record["losses"][0]["loss"] - 1
    assert record["tokens_per_second"] > 0
    assert record["router_aux_loss"] is None  # its config has a weight for one and does not ask for it


def test_the_loss_before_the_first_step_is_the_one_that_eval_measures(root: Path, tuned: Path, tmp_path: Path) -> None:
    blocks = blocks_of(root)
    batches = [Batch(input_ids=one.long()) for one in blocks.values()]
    domains = [domain for domain, one in blocks.items() for _ in one]
    (found,) = evaluate_text([root / "source"], batches, domains)
    measured = record_of(tuned)["evaluations"][0]
    assert measured["loss"] == pytest.approx(found["loss"], abs=1e-5)
    for domain in blocks:
        assert measured["domains"][domain]["loss"] == pytest.approx(found["domains"][domain]["loss"], abs=1e-5)
    whole = run(root, tmp_path / "out", text_options(root, steps=1, batch_size=len(domains)))
    assert whole["losses"][0]["loss"] == pytest.approx(found["loss"], abs=1e-5)


def test_the_loss_after_the_last_step_is_that_of_the_folder(root: Path, tuned: Path) -> None:
    blocks = blocks_of(root)
    batches = [Batch(input_ids=one.long()) for one in blocks.values()]
    (found,) = evaluate_text([tuned], batches, [domain for domain, one in blocks.items() for _ in one])
    assert record_of(tuned)["evaluations"][-1]["loss"] == pytest.approx(found["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "name", ["report.json", "report.html", "verify.json", "finetune.json", "observed/stats.safetensors"]
)
def test_what_was_said_of_other_weights_is_not_carried_along(name: str, root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("{}")
    kept = [str(relative) for relative in kept_files(read_model_folder(source))]
    assert name not in kept
    assert {"plan.json", "more/notes.txt", "tokenizer.json"} <= set(kept)


def test_what_lay_beside_the_weights_is_kept_and_what_is_no_longer_true_is_not(root: Path, tuned: Path) -> None:
    source, out = files_of(root / "source"), files_of(tuned)
    weights = {name for name in source if name.startswith("model")}
    assert len(weights) > 2  # the source is in several files
    for name in source.keys() - weights - {"report.json"}:
        assert out[name] == source[name], name
    assert {"config.json", "generation_config.json", "plan.json", "more/notes.txt", "tokenizer.json"} <= out.keys()
    assert out.keys() - source.keys() == {"README.md"}
    assert "report.json" not in out
    assert b"fine-tuned from `source`" in out["README.md"]
    assert not place_of_work(tuned, WHAT).exists()


def test_every_tensor_has_its_name_and_type_and_was_trained(root: Path, tuned: Path) -> None:
    before, after = tensors_of(root / "source"), tensors_of(tuned)
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    assert not any(torch.equal(one, after[name]) for name, one in before.items())


@pytest.mark.slow
def test_small_batches_add_up_to_a_large_one(root: Path, tmp_path: Path) -> None:
    for out, sizes in (("large", (8, 1)), ("small", (2, 4))):
        batch_size, gradient_accumulation = sizes
        options = text_options(root, batch_size=batch_size, gradient_accumulation=gradient_accumulation, steps=3,
                               learning_rate=1e-3)  # fmt: skip
        run(root, tmp_path / out, options)
    large, small = (record_of(tmp_path / out) for out in ("large", "small"))
    for one, other in zip(large["losses"], small["losses"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_frozen_parameters_stay_byte_for_byte(root: Path, tmp_path: Path) -> None:
    record = run(root, tmp_path / "out", text_options(root, freeze=(r"mlp\.gate\.", "embed_tokens"), weight_decay=0.1))
    before, after = tensors_of(root / "source"), tensors_of(tmp_path / "out")
    frozen = {name for name in before if "mlp.gate." in name or "embed_tokens" in name}
    assert len(frozen) == 4
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert record["parameters"] - record["trained_parameters"] == sum(before[name].numel() for name in frozen)


@pytest.mark.slow
def test_a_model_in_sixteen_bits_is_trained_in_float32_and_written_in_sixteen(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(root / "source", source)
    model = AutoModelForCausalLM.from_pretrained(source)
    for path in source.glob("model*"):
        path.unlink()
    model.bfloat16().save_pretrained(source)
    # a step of 1e-5 on weights of about 0.02 is lost in bfloat16; twenty of them are not
    options = text_options(root, steps=20, learning_rate=1e-5, schedule="constant")
    run(tmp_path, tmp_path / "out", options)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert {one.dtype for one in after.values()} == {torch.bfloat16}
    moved = torch.cat([(before[name] != after[name]).flatten() for name in before]).float().mean()
    assert moved > 0.3


@pytest.fixture(scope="module")
def uneven(root: Path) -> Path:
    """A folder with `source`, which has layers of different sizes, and `out`, tuned from it."""
    folder = root / "uneven"
    folder.mkdir()
    apply_to_model_without_plan(root, folder / "source")
    run(folder, folder / "out", text_options(root, eval_data=text_options(root).data))
    return folder


def test_layers_of_different_sizes_go_in_and_come_out(uneven: Path) -> None:
    folder = read_model_folder(uneven / "out")
    assert folder.counts == {0: 3, 1: 8, 2: 5}
    for name in ("plan.json", "modeling_secateur.py", "config.json"):
        assert (uneven / "out" / name).read_bytes() == (uneven / "source" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(uneven / "out")
    assert type(model).__name__ == "PrunedQwen3MoeForCausalLM"
    assert "was not changed" not in (uneven / "out" / "README.md").read_text().rpartition("# Fine-tuned")[2]


def apply_to_model_without_plan(root: Path, out: Path) -> None:
    plain = out.with_name("plain")
    shutil.copytree(root / "source", plain)
    (plain / "plan.json").unlink()  # a stand-in that is no plan
    apply_to_model(plain, UNEVEN, out)


@pytest.mark.process
@pytest.mark.slow
def test_stock_transformers_loads_a_tuned_model_of_different_layers(uneven: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(uneven / "out").eval()
    expected = float(model(torch.arange(8)[None]).logits.detach().sum())
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(uneven / 'out')!r}, trust_remote_code=True).eval();"
        "print(float(m(torch.arange(8)[None]).logits.sum()), 'secateur' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [str(expected), "False"], done.stderr


def test_the_measured_loss_is_that_of_the_labels_alone(root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"output_router_logits": True, "router_aux_loss_coef": 0.5})
    )
    options = text_options(root, eval_data=text_options(root).data, steps=1, batch_size=64)
    (before, _) = run(tmp_path, tmp_path / "out", options)["evaluations"]
    blocks = blocks_of(root)
    batches = [Batch(input_ids=one.long()) for one in blocks.values()]
    (found,) = evaluate_text([root / "source"], batches, [domain for domain, one in blocks.items() for _ in one])
    assert before["loss"] == pytest.approx(found["loss"], abs=1e-5)  # with the routers' losses it is 1 more


@pytest.mark.slow
def test_the_losses_of_routers_are_those_of_the_config_or_of_the_option(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text()) | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    path.write_text(json.dumps(config))
    rest = {"eval_data": text_options(root).data, "steps": 1, "batch_size": 64}
    records = {
        coefficient: run(tmp_path, tmp_path / f"{coefficient}", text_options(root, router_aux_loss=coefficient, **rest))
        for coefficient in (None, 0.0, 0.25)
    }
    plain = records[0.0]["losses"][0]["loss"]
    for one in records.values():  # measured without, whatever training adds
        assert one["evaluations"][0]["loss"] == pytest.approx(plain, abs=1e-5)
    # the loss of top-2 routers is 2 where they are balanced, and these nearly are
    assert records[None]["losses"][0]["loss"] - plain == pytest.approx(0.5 * 2, rel=0.1)
    assert records[0.25]["losses"][0]["loss"] - plain == pytest.approx(0.25 * 2, rel=0.1)
    assert records[None]["router_aux_loss"] == {"from": "config", "router_aux_loss_coef": 0.5}
    assert records[0.25]["router_aux_loss"] == {"from": "option", "router_aux_loss": 0.25}
    assert records[0.0]["router_aux_loss"] is None
    assert (tmp_path / "0.25" / "config.json").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_chats_go_through_the_template(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    template = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    chats = [
        [{"role": "user", "content": f"code {turn}"}, {"role": "assistant", "content": "prose"}] for turn in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = load_tokenizer(tmp_path / "source")
    text = [f"user: code {turn}\nassistant: prose\n" for turn in range(9)]
    ids = [token for one in text for token in tokenizer(one)["input_ids"]]
    options = text_options(root, data=(str(tmp_path / "chats.jsonl"),))
    packed = pack_domains(tokenizer, options.data, 16, options)["chats"]
    assert packed.blocks.flatten().tolist() == ids[: packed.num_tokens]
    assert packed.num_dropped == len(ids) - packed.num_tokens < 16
    assert run(tmp_path, tmp_path / "out", options)["data"]["train"]["chats"]["documents"] == 9


def test_epochs_are_turned_into_steps(root: Path, tmp_path: Path) -> None:
    sequences = sum(len(one) for one in blocks_of(root).values())
    options = text_options(root, steps=None, epochs=1.5, batch_size=4, gradient_accumulation=3, warmup=0.1)
    record = run(root, tmp_path / "out", options, dry_run=True)
    assert record["steps"] == math.ceil(1.5 * math.ceil(math.ceil(sequences / 4) / 3))
    assert record["warmup_steps"] == math.ceil(0.1 * record["steps"])
    assert not list(tmp_path.iterdir())
    assert options.warmup_steps(100) == 10
    assert FinetuneOptions(data=("x",), warmup=7).warmup_steps(100) == 7
    assert FinetuneOptions(data=("x",), warmup=1).warmup_steps(100) == 1  # a step, and not all of them


def test_the_learning_rate_rises_and_falls_as_asked(root: Path, tmp_path: Path) -> None:
    options = text_options(root, warmup=2, schedule="linear", batch_size=1)
    rates = [line["learning_rate"] for line in run(root, tmp_path / "out", options)["losses"]]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_a_loss_that_is_no_number_stops_with_a_clear_error(root: Path, tmp_path: Path) -> None:
    options = text_options(root, learning_rate=1e15, steps=6, max_grad_norm=0)
    with pytest.raises(SecateurError, match=r"the training loss is (nan|inf) at step \d: the run has diverged"):
        run(root, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": ()}, "nothing to train on"),
    "data that is not there": ({"data": ("nowhere.jsonl",)}, "no such file or folder"),
    "too little text": (
        {"sequence_length": 64, "data": ("little.txt",)},
        r"'little': \d+ tokens, expected at least one",
    ),
    "a sequence that is too long": ({"sequence_length": 4096}, "sequences of up to 64 tokens"),
    "steps and epochs": ({"epochs": 1.0}, "--steps and --epochs"),
    "a schedule that is not there": ({"schedule": "step"}, "--schedule step: expected one of cosine"),
    "a rate that is not there": ({"learning_rate": 0.0}, "--learning-rate: found 0.0"),
    "nothing frozen": ({"freeze": ("nowhere",)}, "no parameter has such a name"),
    "all frozen": ({"freeze": (".",)}, "no parameter is left"),
    "no expression": ({"freeze": ("(",)}, "not a regular expression"),
    "a head for text": ({"new_head": True}, "--new-head: a 'qwen3_moe' model reads text"),
    "a seed that is not there": ({"seed": -1}, "--seed: found -1"),
    "a seed that is too large": ({"seed": 2**32}, "--seed: found 4294967296"),
    "an optimizer that is not there": ({"optimizer": "lion"}, "--optimizer lion: expected one of adamw, sgd"),
    "a logger that is not there": ({"report_to": "nonsense"}, "--report-to nonsense: expected none, all or one of"),
    "steps of nothing": ({"eval_steps": 3}, "--eval-steps needs --eval-data"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(root: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = WRONG[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "little.txt").write_text("too little")
    with pytest.raises(SecateurError, match=message):
        run(root, tmp_path / "out", text_options(root, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["little.txt"]


def test_a_logger_without_its_package_is_named_before_data_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_package() -> None:
        raise RuntimeError("it requires x to be installed")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", without_package)
    with pytest.raises(SecateurError, match="--report-to wandb: it requires x to be installed"):
        run(root, tmp_path / "out", text_options(root, report_to="wandb", data=("nowhere",)), dry_run=True)


@pytest.mark.slow
def test_a_tied_tensor_that_is_stored_twice_stays_so(root: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(root / "source")
    source = tmp_path / "source"
    tiny_model("qwen3_moe", vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(source)
    tokenizer.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run(tmp_path, tmp_path / "out", text_options(root))
    after = tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_a_folder_that_is_not_free_a_job_of_two_and_a_quantised_model_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = text_options(root)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    with pytest.raises(SecateurError, match="it is there already and not an empty folder"):
        run(root, tmp_path / "out", options)
    with pytest.raises(SecateurError, match="nothing was left of a fine-tuning"):
        run(root, tmp_path / "new", options, resume=True)
    shutil.copytree(root / "source", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(SecateurError, match="it is quantised"):
        run(tmp_path, tmp_path / "new", options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SecateurError, match="runs in one process, WORLD_SIZE is 2"):
        run(root, tmp_path / "new", options)


def test_a_tokenizer_that_does_not_fit_the_model_is_named(root: Path, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")  # a vocabulary of 64
    load_tokenizer(root / "source").save_pretrained(tmp_path / "source")
    with pytest.raises(SecateurError, match=r"makes a token of id \d+, but its vocabulary is 64"):
        run(tmp_path, tmp_path / "out", text_options(root))


def test_the_largest_token_of_the_data_is_in_a_vocabulary_that_is_one_larger(root: Path, tmp_path: Path) -> None:
    largest = max(int(blocks.max()) for blocks in blocks_of(root).values())
    source = copy_of(root, tmp_path)
    config = json.loads((source / "config.json").read_text())
    for size in (largest + 1, largest):
        (source / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        message = rf"makes a token of id {largest}, but its vocabulary is {size}" if size == largest else None
        with pytest.raises(SecateurError, match=message) if message else contextlib.nullcontext():
            settings = in_parts(text_options(root))
            text_task(read_model_folder(source), settings.data, settings.model)


def test_the_command_says_what_it_would_do_and_does_it(root: Path, tmp_path: Path) -> None:
    words = [
        "finetune",
        root / "source",
        "--data",
        f"code={root / 'code.jsonl'}",
        "--steps",
        2,
        "--sequence-length",
        16,
    ]
    words += ["--save-steps", 0, "--freeze", "norm", "--freeze", "embed", "--out", tmp_path / "out"]
    dry = CliRunner().invoke(app, [*map(str, words), "--dry-run"])
    assert dry.exit_code == 0
    assert "would write" in dry.stdout
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    assert told == record_of(tmp_path / "out") | {"dry_run": False}
    assert told["options"]["freeze"] == ["norm", "embed"]
    assert [line["step"] for line in told["losses"]] == [2]


# one epoch is 11 steps here: a checkpoint within the first, one within the second
STEADY: dict[str, Any] = {"steps": 16, "save_steps": 3, "schedule": "constant", "learning_rate": 1e-3, "batch_size": 3,
                          "gradient_accumulation": 2, "eval_steps": 4}  # fmt: skip
STEP_END = "secateur.finetuning.trainer:FinetuneLog.on_step_end"
LAST = "after the result got its name"
# moment -> how the run is killed there; every run goes on with what the one before left
MOMENTS = {
    "between two checkpoints": Kill(STEP_END, 8),
    "between a checkpoint and its seal": Kill("secateur.train.training_log:seal", 2),
    "after the last step": Kill("secateur.finetuning.run:write"),
    "while the result is written": Kill("secateur.finetuning.model:copy_file", 2),
    LAST: Kill("secateur.files.work_folder:Work.remove"),
}


def steady(root: Path) -> FinetuneOptions:
    return text_options(root, **STEADY, eval_data=(f"code={root / 'code.jsonl'}",))


def start(root: Path, out: Path, resume: bool, hook: Callable[[], None] | None = None) -> None:
    if hook is not None:
        hook()
    run(root, out, steady(root), resume=resume)


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Path:
    start(root, root / "uninterrupted", False)
    return root / "uninterrupted"


@pytest.mark.process
@pytest.mark.slow
def test_a_run_killed_at_every_moment_ends_as_if_it_had_not_been(
    root: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    for moment, kill in MOMENTS.items():
        is_resumed = place_of_work(out, WHAT).exists()
        assert in_child(start, root, out, is_resumed, kill) == -signal.SIGKILL, moment
        assert out.exists() == (moment == LAST), moment
    start(root, out, True)
    assert files_of(out) == files_of(uninterrupted)
    for key in ("losses", "evaluations", "steps", "data"):
        assert record_of(out)[key] == record_of(uninterrupted)[key], key
    one, other = (record["tokens_per_second"] * record["seconds"] for record in map(record_of, (out, uninterrupted)))
    assert one == pytest.approx(other)  # those before the kill are counted, and once
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NO_ROOM = 7


def on_a_full_disk(root: Path, out: Path, place: str) -> None:
    LimitFileSize(place, 1, 1000)()
    try:
        run(root, out, text_options(root, steps=1, save_steps=1))
    except OSError as error:
        text = f"{error.filename} {error}"
        sys.exit(NO_ROOM if ".safetensors" in text and os.strerror(errno.EFBIG) in text else 1)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("place", ["secateur.finetuning.model:save_file", "secateur.finetuning.trainer:save_model"])
def test_a_disk_without_room_for_the_weights_is_an_error_of_the_disk(place: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert in_child(on_a_full_disk, root, out, place) == NO_ROOM
    assert not out.exists()


@pytest.mark.slow
def test_what_a_killed_run_left_is_neither_lost_nor_mixed_up(root: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", text_options(root, save_steps=2)

    def stop(done: int, total: int, numbers: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, out, options, on_progress=stop)
    work = place_of_work(out, WHAT)
    assert checkpoints.last_whole(work) == work / "checkpoint-2"
    assert not out.exists()
    with pytest.raises(SecateurError, match="was interrupted after checkpoint-2: go on with --resume"):
        run(root, out, options)
    with pytest.raises(SecateurError, match=r"--learning-rate is 0\.5, but the run was started with 0\.01"):
        run(root, out, text_options(root, save_steps=2, learning_rate=0.5), resume=True)
    with pytest.raises(SecateurError, match="--resume and --restart"):
        run(root, out, options, resume=True, restart=True)
    assert run(root, out, options, resume=True)["resumed_after_step"] == 2
    assert not work.exists()


def test_logs_for_tensorboard_are_in_the_result(root: Path, tmp_path: Path) -> None:
    logs = place_of_work(tmp_path / "out", WHAT) / "runs"

    def write(done: int, total: int, numbers: str) -> None:
        logs.mkdir(exist_ok=True)
        (logs / "events").write_text("as TensorBoard would")

    source = copy_of(root, tmp_path)
    (source / "runs").mkdir()
    (source / "runs" / "of the model before").touch()
    run(tmp_path, tmp_path / "out", text_options(root, steps=1), on_progress=write)
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["events"]


def test_tensors_wider_than_the_config_says_are_neither_rounded_nor_narrowed(root: Path, tmp_path: Path) -> None:
    """Routers in float32 in a model of bfloat16."""
    source = copy_of(root, tmp_path)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        mixed = {name: one * (1 + 2**-12) if "mlp.gate." in name else one.bfloat16() for name, one in tensors.items()}
        save_file(mixed, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    run(tmp_path, tmp_path / "out", text_options(root, steps=1, freeze=(r"mlp\.gate\.",)))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert {one.dtype for one in before.values()} == {torch.float32, torch.bfloat16}
    assert {name: one.dtype for name, one in before.items()} == {name: one.dtype for name, one in after.items()}
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "mlp.gate." in name
    }


def test_tensors_that_transformers_passes_over_are_named_before_training(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen3_5_moe_text", vocab_size=len(load_tokenizer(root / "source"))).save_pretrained(source)
    load_tokenizer(root / "source").save_pretrained(source)
    tensors = load_file(source / "model.safetensors") | {"model.visual.patch_embed.weight": torch.ones(3)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"1 of its tensors, which would be lost: model\.visual\.patch_embed"):
        run(tmp_path, tmp_path / "out", text_options(root), dry_run=True)


def test_a_balance_loss_over_zero_slots_is_refused(root: Path, tmp_path: Path) -> None:
    plain = copy_of(root, tmp_path / "plain")
    (plain / "plan.json").unlink()  # a stand-in that is no plan
    apply_to_model(plain, dataclasses.replace(UNEVEN, removed="zero-slot"), tmp_path / "source")
    with pytest.raises(SecateurError, match=r"--router-aux-loss: .* has zero slots in layers \[0, 2\]"):
        run(tmp_path, tmp_path / "out", text_options(root, router_aux_loss=0.1))
    assert run(tmp_path, tmp_path / "out", text_options(root, router_aux_loss=0.0), dry_run=True)


def test_resuming_onto_a_result_of_another_run_deletes_nothing(root: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tuned, out)
    work = place_of_work(out, WHAT)
    (work / "checkpoint-5").mkdir(parents=True)
    same = text_options(root, eval_data=text_options(root).data, steps=10)
    other = text_options(root, eval_data=text_options(root).data, steps=10, learning_rate=0.5)
    with pytest.raises(SecateurError, match=r"not from this run \(--resume: --learning-rate is 0\.5, but .* 0\.01"):
        run(root, out, other, resume=True)
    with pytest.raises(SecateurError, match=r"nothing says what .* is of"):
        run(root, out, same, resume=True)
    assert (work / "checkpoint-5").is_dir()
    (work / "checkpoint-5").rmdir()
    assert run(root, out, same, resume=True) == record_of(tuned)
    assert not work.exists()


def test_what_is_left_without_a_whole_checkpoint_is_not_mixed_in(root: Path, tmp_path: Path) -> None:
    work = place_of_work(tmp_path / "out", WHAT)
    (work / "runs").mkdir(parents=True)
    (work / "runs" / "of a killed run").touch()
    run(root, tmp_path / "out", text_options(root, steps=1))
    assert not (tmp_path / "out" / "runs").exists()


def test_another_process_that_was_faster_is_not_overwritten(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_slowly(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        return load(*args, **kwargs)

    monkeypatch.setattr("secateur.finetuning.run.load", load_slowly)
    with pytest.raises(SecateurError, match="it is there already"):
        run(root, tmp_path / "out", text_options(root), on_progress=lambda *_: pytest.fail("it trained"))


def test_a_model_whose_weights_were_changed_is_not_the_one_that_was_interrupted(root: Path, tmp_path: Path) -> None:
    source = copy_of(root, tmp_path)
    options = text_options(root, save_steps=1)

    def stop(done: int, total: int, numbers: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "out", options, on_progress=stop)
    os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(SecateurError, match="--resume: the model is not the one"):
        run(tmp_path, tmp_path / "out", options, resume=True)


@pytest.mark.slow
def test_sgd_has_momentum_and_is_resumed_with_it(root: Path, tmp_path: Path) -> None:
    """Against a plain loop of steps: v = 0.9 v + g, w = w - rate v, on one batch of all data."""
    rate, whole = 0.3, 64
    options = text_options(root, optimizer="sgd", learning_rate=rate, schedule="constant", batch_size=whole, steps=3,
                           max_grad_norm=0, save_steps=1)  # fmt: skip

    def stop(done: int, total: int, numbers: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", options, on_progress=stop)
    run(root, tmp_path / "out", options, resume=True)
    model: Any = AutoModelForCausalLM.from_pretrained(root / "source").train()
    ids = torch.cat(list(blocks_of(root).values())).long()
    assert len(ids) <= whole
    moving = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for _ in range(3):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for name, one in model.named_parameters():
                moving[name] = 0.9 * moving[name] + one.grad
                one -= rate * moving[name]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(root / "source")
    for name, one in model.named_parameters():
        moved = (one - start.get_parameter(name)).abs().max()
        assert (found.get_parameter(name) - one).abs().max() < 0.01 * moved + 1e-7, name


@pytest.mark.slow
def test_a_new_start_after_restart_is_a_run_of_its_own(root: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", text_options(root, save_steps=2)

    def stop(done: int, total: int, numbers: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, out, options, on_progress=stop)
    assert run(root, out, options, restart=True)["resumed_after_step"] is None
    run(root, tmp_path / "never", options)
    assert files_of(out) == files_of(tmp_path / "never")
    run(root, tmp_path / "other seed", text_options(root, save_steps=2, seed=1))
    assert record_of(tmp_path / "other seed")["losses"] != record_of(out)["losses"]


def test_a_model_is_loaded_into_memory_of_its_own(root: Path) -> None:
    """Tensors that lie anywhere in a mapped file round matrix products otherwise."""
    loaded = load(read_model_folder(root / "source"))
    assert all(one.data_ptr() % 64 == 0 for one in loaded.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3 grouped", "gpt_oss", "dbrx"])
def test_other_families_keep_the_names_and_shapes_of_their_files(name: str, root: Path, tmp_path: Path) -> None:
    """Experts stored one by one, in stacks with biases, and in flat matrices; selection biases are not trained."""
    tokenizer = load_tokenizer(root / "source")
    tiny_model(name, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    run(tmp_path, tmp_path / "out", text_options(root))
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert {key: (one.shape, one.dtype) for key, one in before.items()} == {
        key: (one.shape, one.dtype) for key, one in after.items()
    }
    for key, one in before.items():
        if "e_score_correction_bias" in key:
            assert torch.equal(one, after[key])
    assert any(not torch.equal(one, after[key]) for key, one in before.items() if "router" in key or "gate." in key)
