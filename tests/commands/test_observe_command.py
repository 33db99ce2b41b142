"""`secateur observe` as a user meets it: what it writes, what it says, and what becomes of a run that is killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import cli
from secateur.criteria import CRITERIA
from secateur.data.calibration import calibrate
from secateur.data.tokenizer import load_tokenizer, train_tokenizer
from secateur.model_folder.measure.observe import observe
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.stream import states
from secateur.model_folder.stream.resume import WorkFolder
from secateur.model_folder.stream.states import DiskStates
from secateur.observation.observation import Observation
from secateur.stats import DEFAULT_SUMS, SUMS
from support.faults import Kill
from support.long_tests import long
from support.model_folders import contents, loaded
from support.small_corpus import write_corpus
from support.small_runs import in_child
from support.streamed_runs import found_in, whole_run
from support.tiny_models import tiny_model

VOCABULARY = 257
SMALL = ("--samples", "6", "--sequence-length", "16", "--batch-size", "4", "--device", "cpu")
DISK = ("--activations", "disk")
EVERY_SUM = tuple(word for name in SUMS for word in ("--sums", name))
Result = tuple[int, str, str]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and a corpus."""
    root = tmp_path_factory.mktemp("made")
    write_corpus(root / "corpus")
    tiny_model("qwen3_moe", vocab_size=VOCABULARY).save_pretrained(root / "model", max_shard_size="60KB")
    train_tokenizer(["text"], vocab_size=VOCABULARY).save_pretrained(root / "model")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit status, standard output, standard error) of `secateur observe`, on both domains unless told otherwise."""

    def call(*options: object, data: bool = True, small: bool = True) -> Result:
        words = words_of(folder, *options, data=data, small=small)
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return call


def words_of(folder: Path, *options: object, data: bool = True, small: bool = True) -> list[str]:
    out = () if "--out" in options else ("--out", folder / "stats.safetensors")
    texts = ("--data", folder / "corpus/prose", "--data", folder / "corpus/code") if data else ()
    return [
        str(word)
        for word in ("secateur", "observe", folder / "model", *out, *texts, *(SMALL if small else ()), *options)
    ]


def in_a_child(words: list[str], hook: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    hook()
    sys.argv = words
    cli.main()


def test_it_writes_what_the_whole_model_shows_and_where_it_comes_from(folder: Path, run: Run) -> None:
    status, _, error = run()
    assert (status, error.strip()) == (0, "")
    found = Observation.load(folder / "stats.safetensors")
    data = calibrate(
        load_tokenizer(folder / "model"),
        [str(folder / "corpus/prose"), str(folder / "corpus/code")],
        samples=6,
        sequence_length=16,
    )
    expected, _ = whole_run(loaded(folder / "model"), data.batches(4))
    assert found.stats.digest() == expected.digest()
    assert found.stats.sums == DEFAULT_SUMS
    assert found.model == model_facts(found_in(folder / "model"))
    assert found.data["domains"] == {name: {"sequences": 3, "tokens": 48} for name in ("prose", "code")}
    assert found.data["digest"] == data.digest
    assert {"specs", "seed", "samples", "sequence_length", "tokens", "packed", "batch_size"} < set(found.data)
    assert {"secateur", "torch", "transformers"} < set(found.data["versions"])
    assert all(one.num_tokens == 96 for one in found.stats.layers.values())
    assert not list(folder.glob(".*"))


def test_its_statistics_serve_every_criterion_whose_sums_are_asked_for(folder: Path, run: Run) -> None:
    needed = {name for one in CRITERIA.values() if isinstance(one.needs, tuple) for name in one.needs}
    asked = sorted(needed & SUMS.keys())
    assert run("--quiet", *(word for name in asked for word in ("--sums", name)))[0] == 0
    assert needed <= {"token_count", *Observation.load(folder / "stats.safetensors").stats.sums}


def test_sums_on_request_are_those_of_the_whole_model_on_the_disk_and_in_memory(folder: Path, run: Run) -> None:
    assert run("--activations", "memory", *EVERY_SUM, "--out", folder / "one")[0] == 0
    assert run(*DISK, *EVERY_SUM, "--out", folder / "two")[0] == 0
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    found = Observation.load(folder / "one")
    texts = [str(folder / "corpus/prose"), str(folder / "corpus/code")]
    data = calibrate(load_tokenizer(folder / "model"), texts, samples=6, sequence_length=16)
    expected, _ = whole_run(loaded(folder / "model"), data.batches(4), sums=tuple(SUMS))
    assert found.stats.sums == tuple(SUMS)
    assert found.stats.digest() == expected.digest()


def test_a_dry_run_says_what_sums_on_request_take(folder: Path, run: Run) -> None:
    plain = json.loads(run("--dry-run", "--json")[1])
    status, out, _ = run("--dry-run", "--json", "--sums", "co_selection", "--sums", "neuron_gram", "--sums", "norm_sum")
    said = json.loads(out)
    expected = 3 * 8 * (8 * 8 + 8 * 24 * 24)  # layers, bytes of a number, experts and widths of experts
    assert (status, plain["sums_bytes"], said["sums_bytes"]) == (0, 0, expected)
    layers = [one["peak_memory_bytes_estimated"] - one["process_memory_bytes"] for one in (plain, said)]
    assert layers[1] - layers[0] == expected
    assert "112 kB of sums on request" in run("--dry-run", "--sums", "co_selection", "--sums", "neuron_gram")[1]


def test_a_sum_that_there_is_not_is_refused_with_those_there_are(folder: Path, run: Run) -> None:
    status, _, error = run("--sums", "gram", "--dry-run")
    said = " ".join(error.split())
    assert (status, "sum 'gram': expected one of weight_sum, norm_sum" in said, "neuron_gram" in said) == (
        2,
        True,
        True,
    )
    status, _, error = run("--sglang", "x.pt", "--sums", "input_gram", data=False, small=False)
    assert (status, "a recording holds counts only" in error) == (2, True)


def test_disk_and_memory_give_the_same_bytes(folder: Path, run: Run) -> None:
    assert run("--activations", "memory", "--out", folder / "one")[0] == 0
    assert run(*DISK, "--out", folder / "two")[0] == 0
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    assert not list(folder.glob(".*"))


FINISH = "secateur.model_folder.stream.states:DiskStates.finish"
KILLS = {
    "in the second layer": Kill("secateur.model_folder.stream.states:DiskStates.put", nth=3),
    "before a layer counts": Kill(FINISH),
    "after a layer counts": Kill(FINISH, when="after"),
    "in the last layer": Kill("secateur.model_folder.stream.resume:WorkFolder.save_layer", nth=3),
    "after the last layer": Kill(FINISH, nth=3, when="after"),
    "before the result": Kill("secateur.observation.observation:Observation.save"),
    "after the result": Kill("secateur.observation.observation:Observation.save", when="after"),
    "after it is noted": Kill("secateur.files.work_folder:Work.note", nth=2, when="after"),
    "while clearing up": Kill("pathlib:Path.unlink", when="after"),
}


# As another, in another layer or a moment later; benchmarks/faults.py kills at any moment.
LIKE_ANOTHER = {"before a layer counts", "in the last layer", "after the last layer", "after it is noted"}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=long if name in LIKE_ANOTHER else []) for name in KILLS])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(folder: Path, run: Run, name: str) -> None:
    assert run(*DISK, "--out", folder / "whole")[0] == 0
    assert in_child(in_a_child, words_of(folder, *DISK), KILLS[name]) == -9
    work = folder / ".stats.safetensors.work"
    assert work.is_dir()
    status, out, error = run(*DISK)
    if name == "while clearing up":  # nothing is left to say that the result is of this run
        assert (status, "it is there already" in error) == (2, True)
    else:
        assert (status, error.strip(), "went on with an interrupted run" in out) == (0, "", True)
    assert (folder / "stats.safetensors").read_bytes() == (folder / "whole").read_bytes()
    assert not list(folder.glob(".*"))


@pytest.mark.process
def test_a_killed_run_with_every_sum_goes_on_and_ends_with_the_same_bytes(folder: Path, run: Run) -> None:
    assert run(*DISK, *EVERY_SUM, "--out", folder / "whole")[0] == 0
    assert in_child(in_a_child, words_of(folder, *DISK, *EVERY_SUM), KILLS["in the last layer"]) == -9
    assert "sums was" in run(*DISK)[2]
    status, out, error = run(*DISK, *EVERY_SUM)
    assert (status, error.strip(), "went on with an interrupted run" in out) == (0, "", True)
    assert (folder / "stats.safetensors").read_bytes() == (folder / "whole").read_bytes()


@pytest.fixture
def interrupted(folder: Path) -> Path:
    """The work folder of a run that was killed in its second layer."""
    hook = Kill("secateur.model_folder.stream.states:DiskStates.put", nth=3)
    assert in_child(in_a_child, words_of(folder, *DISK), hook) == -9
    return folder / ".stats.safetensors.work"


@pytest.mark.process
@pytest.mark.slow
def test_a_run_goes_on_at_the_layer_it_had_reached(
    run: Run, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, save = [], WorkFolder.save_layer
    monkeypatch.setattr(
        WorkFolder, "save_layer", lambda self, layer, stats: kept.append(layer) or save(self, layer, stats)
    )
    assert run(*DISK)[0] == 0
    assert kept == [1, 2]


def test_layers_that_were_read_from_other_files_do_not_count(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there again at the next start, the same by size and time, as from a backup."""
    assert run(*DISK, "--out", folder / "whole")[0] == 0
    put, changed = DiskStates.put, folder / "changed"

    def once_changed(*values: Any) -> None:
        put(*values)
        if not changed.exists():
            (folder / "model").rename(folder / "as it was")
            shutil.copytree(folder / "as it was", folder / "model")
            for path in (folder / "model").glob("*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 64
                path.write_bytes(content)
            changed.touch()

    monkeypatch.setattr(DiskStates, "put", once_changed)
    status, _, error = run(*DISK)
    assert (status, "it was changed while it was in use" in error) == (2, True), error
    shutil.rmtree(folder / "model")
    (folder / "as it was").rename(folder / "model")
    assert run(*DISK)[0] == 0
    assert (folder / "stats.safetensors").read_bytes() == (folder / "whole").read_bytes()


@pytest.mark.process
def test_an_interrupted_run_is_refused_to_a_second_process_and_to_something_else_or_thrown_away(
    folder: Path, run: Run, interrupted: Path
) -> None:
    before = contents(interrupted)
    with (interrupted / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for options in ((), ("--restart",)):
            status, _, error = run(*DISK, *options)
            assert (status, "another process is at work for the same result" in error) == (2, True)
    for options, message in (
        (("--seed", "1"), "data was"),
        (("--batch-size", "3"), "batch size was 4, is 3"),
    ):
        status, _, error = run(*DISK, *options)
        assert status == 2
        assert "holds an unfinished run of something else" in error
        assert message in error
        assert "--restart" in error
    path = next((folder / "model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    assert "files was" in run(*DISK)[2]
    assert contents(interrupted) | {"lock": b""} == before
    status, out, _ = run(*DISK, "--restart")
    assert (status, "went on" in out) == (0, False)
    assert not list(folder.glob(".*"))


@pytest.mark.process
def test_a_run_in_memory_goes_on_too_where_one_on_the_disk_was_killed(
    folder: Path, run: Run, interrupted: Path
) -> None:
    status, out, _ = run("--activations", "memory")
    assert (status, "went on with an interrupted run" in out) == (0, True)
    assert not list(folder.glob(".*"))


def test_a_full_disk_leaves_no_half_file_and_the_run_goes_on(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = states.atomic_write, 0

    def full(path: Path, content: str | bytes, **how: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content, **how)

    with monkeypatch.context() as patch:
        patch.setattr(states, "atomic_write", full)
        status, _, error = run(*DISK)
    assert (status, "No space left on device" in error) == (1, True)
    assert not (folder / "stats.safetensors").exists()
    assert run(*DISK)[0] == 0
    assert run(*DISK, "--out", folder / "other")[0] == 0
    assert (folder / "stats.safetensors").read_bytes() == (folder / "other").read_bytes()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(folder: Path, run: Run) -> None:
    before = contents(folder)
    status, out, _ = run("--dry-run", "--json", *DISK)
    said = json.loads(out)
    assert status == 0
    sizes = {name: one.length for name, one in found_in(folder / "model").files.tensors.items()}
    outside = sum(size for name, size in sizes.items() if ".layers." not in name and "lm_head" not in name)
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert said["bytes_to_read"] == outside + 3 * layer
    of_model = said["peak_memory_bytes_estimated"] - said["process_memory_bytes"]
    assert of_model == outside + round(5 / 3 * layer)
    assert said["activation_bytes"] == 6 * 16 * 32 * 4
    assert (said["layers"], said["moe_layers"], said["activations"]) == (3, [0, 1, 2], "disk")
    assert (said["data"]["tokens"], said["dry_run"], said["mtp_layers_not_run"]) == (96, True, [])
    assert contents(folder) == before
    assert "would write" in run("--dry-run")[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a peak of memory")
def test_a_dry_run_says_at_least_the_memory_that_is_seen_and_at_most_half_more(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "moe_intermediate_size": 384, "num_experts": 32}  # 16 MB a layer
    tiny_model("qwen3_moe", vocab_size=VOCABULARY, **wide).save_pretrained(tmp_path / "model")
    train_tokenizer(["text"], vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    write_corpus(tmp_path / "corpus")
    options: dict[str, Any] = {"data": str(tmp_path / "corpus/prose"), "samples": 4, "sequence_length": 16}
    said = observe(tmp_path / "model", tmp_path / "stats", dry_run=True, **options).to_json()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    observe(tmp_path / "model", tmp_path / "stats", **options)
    lines = Path("/proc/self/status").read_text().splitlines()
    seen = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    assert seen <= said["peak_memory_bytes_estimated"] <= 1.5 * seen
    assert said["process_memory_bytes"] > 2**27  # Python and torch alone


def test_json_and_quiet(folder: Path, run: Run) -> None:
    status, out, error = run("--json")
    said = json.loads(out)
    assert (status, error.strip()) == (0, "")
    assert said["stats_digest"] == Observation.load(folder / "stats.safetensors").stats.digest()
    assert said["sums"] == ["token_count", *DEFAULT_SUMS]
    assert run("--quiet", "--force") == (0, "", "")


def test_an_existing_file_needs_force(folder: Path, run: Run) -> None:
    (folder / "stats.safetensors").write_text("mine")
    status, _, error = run()
    assert (status, "it is there already; --force writes over a file" in error) == (2, True)
    assert (folder / "stats.safetensors").read_text() == "mine"
    assert run("--force")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sequence-length", "65"), "at most 64 (max_position_embeddings in config.json)"),
        (("--samples", "99999"), "blocks of 16 tokens"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--out", "no/such/stats"), "no folder no/such"),
        (("--data", "nothing.txt"), "no such file or folder"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run: Run, options: tuple[str, ...], message: str) -> None:
    status, _, error = run(*options)
    assert status == 2
    assert message in error


def test_a_model_without_a_tokenizer_is_refused(folder: Path, run: Run) -> None:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()
    status, _, error = run()
    assert (status, "found no tokenizer" in error) == (2, True)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, run: Run) -> None:
    train_tokenizer(["the router keeps a token"] * 9, vocab_size=400).save_pretrained(folder / "model")
    status, _, error = run()
    assert status == 2
    assert "model (tokenizer.json, tokenizer_config.json): it makes a token of id" in error


def test_an_sglang_recording_becomes_statistics(folder: Path, run: Run) -> None:
    count = torch.arange(24, dtype=torch.int32).view(1, 3, 8)
    torch.save({"rank": 0, "logical_count": count}, folder / "recorded.pt")
    status, out, _ = run("--sglang", folder / "recorded.pt", data=False)
    found = Observation.load(folder / "stats.safetensors")
    assert status == 0
    assert "1 experts in 1 layers got no token" in out
    assert found.stats.loads() == {0: list(range(8)), 1: list(range(8, 16)), 2: list(range(16, 24))}
    assert found.stats.sums == ()
    assert found.model == model_facts(found_in(folder / "model"))
    assert (found.data["format"], found.data["file"], found.data["steps"]) == ("sglang", "recorded.pt", 1)
    before = (folder / "stats.safetensors").stat()
    status, out, _ = run("--sglang", folder / "recorded.pt", data=False)
    assert (status, "holds these statistics already; nothing was written" in out) == (0, True)
    assert (folder / "stats.safetensors").stat() == before
    Observation(stats=found.stats, data={"others": 1}).save(folder / "stats.safetensors")
    status, _, error = run("--sglang", folder / "recorded.pt", data=False)
    assert (status, "it is there already; --force writes over a file" in error) == (2, True)
    status, _, error = run("--sglang", folder / "recorded.pt", "--force")
    assert (status, "--sglang and --data" in error) == (2, True)


def test_chats_are_observed_through_the_template(folder: Path, run: Run) -> None:
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "prune " * 20}]} for _ in range(3)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, error = run("--data", folder / "chats.jsonl", data=False)
    assert (status, "has no chat template" in error) == (2, True)
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    assert run("--data", folder / "chats.jsonl", data=False)[0] == 0
    assert Observation.load(folder / "stats.safetensors").data["domains"]["chats"]["sequences"] == 6
