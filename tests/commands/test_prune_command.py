"""`secateur prune`: the whole chain on every family; killed anywhere it goes on; refused before time is spent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import cli
from secateur.criteria import CRITERIA, Criterion, activation
from secateur.decide.by_score import plan_by_criterion
from secateur.decide.keep import Keep
from secateur.decide.rule import Rule
from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.files.work_folder import place_of_work, work_folder
from secateur.model_folder import stages as module
from secateur.model_folder.checks.claims import Check, verify_model
from secateur.model_folder.choice import Choice
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.rewrite.undo import restore
from secateur.model_folder.stages import Asked, run_stages
from secateur.observation.activations import ActivationObserver
from secateur.observation.observation import Observation
from secateur.plans import LayerPlan, Plan
from secateur.stats import DEFAULT_SUMS, LayerStats, RouterStats
from secateur.surgery.oracle import barred_experts
from support.claims import ALL, outcome
from support.faults import Kill
from support.long_tests import long
from support.made_up_sums import sums_like
from support.model_folders import contents, loaded, saved, tensors_of, write
from support.models_with_text import data_in, model_with_text
from support.odd_folders import with_mtp
from support.small_runs import in_child
from support.tiny_models import KINDS, ONE_OF_EACH_LAYOUT, families, random_tokens

QUICK = {"mixtral", "deepseek_v3 grouped", "gpt_oss"}
DATA = {"sources": ["made up"], "tokens": 64}
HALF = Choice(criterion="reap", keep=Keep(share=0.5))


def observe(folder: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """Of the loaded model on random tokens, as good as any other."""
    return DATA, lambda: write_stats(folder, stats)


def write_stats(folder: ModelFolder, stats: Path) -> None:
    live = loaded(folder.files.path).eval()
    observer = ActivationObserver(describe_moe(live))
    with torch.no_grad():
        live(random_tokens(4, 16), use_cache=False)
    Observation(stats=observer.read(), model=model_facts(folder), data=DATA).save(stats)


def made_up(folder: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """The same on every start, which a run of a model is not on every number of threads."""
    count = torch.arange(3, 11)
    sums = sums_like(count)
    layers = {layer: LayerStats(num_tokens=26, token_count=count.roll(layer), **sums) for layer in folder.counts}
    observation = Observation(stats=RouterStats(layers=layers), model=model_facts(folder), data=DATA)
    return DATA, lambda: observation.save(stats)


def not_again(folder: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    return DATA, lambda: pytest.fail("observed again")


@pytest.mark.parametrize("name", families(ONE_OF_EACH_LAYOUT, QUICK, sorted(KINDS)))
def test_the_chain_on_the_disk_ends_in_what_the_barred_source_computes(name: str, tmp_path: Path) -> None:
    moe, tokens = describe_moe(saved(name, tmp_path / "source")), random_tokens(2, 12)
    result = run_stages(
        tmp_path / "source", tmp_path / "out", HALF, observe=observe, undo=tmp_path / "undo", verify_tokens=8
    )
    assert outcome(result["verified"]["checks"]) == dict.fromkeys(ALL, True), result["verified"]
    assert json.loads((tmp_path / "out/verify.json").read_text()) == result["verified"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "undo"]

    plan = Plan.load(tmp_path / "out/plan.json")
    stats = Observation.load(tmp_path / "out/observed/stats.safetensors").stats
    assert plan.layers == plan_by_criterion("reap", Keep(share=0.5), moe.limits(), stats=stats).layers
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    assert torch.equal(logits_of(loaded(tmp_path / "out"), tokens), expected)
    assert {one.experts_after for one in plan.layers.values()} == {4}

    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and the result of a pruning that nothing disturbed."""
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "source")
    (root / "source/tokenizer.json").write_text("{}")
    start(root)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A new folder with the source in it, of which the same result must come."""
    shutil.copytree(made / "source", tmp_path / "source")
    return tmp_path


def start(root: Path, *hooks: Callable[[], None], **options: Any) -> dict[str, Any]:
    for hook in hooks:
        hook()
    given: dict[str, Any] = {"observe": made_up, "undo": root / "undo", "verify_tokens": 8}
    return run_stages(root / "source", root / "out", options.pop("choice", HALF), **given | options)


STAGES = {
    "before the statistics are kept": Kill("secateur.observation.observation:Observation.save"),
    "before the statistics are known": Kill("secateur.observation.observation:Observation.save", when="after"),
    "after the statistics are kept": Kill("secateur.files.kept:Kept.add", when="after"),
    "before the plan": Kill("secateur.model_folder.stages:decide_plan"),
    "after the weights": Kill("secateur.model_folder.rewrite.apply:write_weights", when="after"),
    "before verifying": Kill("secateur.model_folder.stages:verify_model"),
    "after verifying": Kill("secateur.model_folder.stages:verify_model", when="after"),
    "between the two new names": Kill("os:rename", when="after"),
    "after the last name": Kill("os:rename", nth=2, when="after"),
    "while clearing up": Kill("secateur.files.work_folder:Work.remove"),
}


# Between two of the others nothing new is on the disk; benchmarks/faults.py kills at any moment.
LIKE_ANOTHER = {
    "before the statistics are kept",
    "before the plan",
    "before verifying",
    "after verifying",
    "after the last name",
}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=long if stage in LIKE_ANOTHER else []) for stage in STAGES]
)
def test_killed_and_started_again_it_ends_in_the_same_bytes(stage: str, made: Path, folder: Path) -> None:
    assert in_child(start, folder, STAGES[stage]) == -9
    named = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert named == {"source"} | ({"undo"} if "name" in stage or "clearing" in stage else set()) | (
        {"out"} if "last name" in stage or "clearing" in stage else set()
    )
    start(folder, observe=made_up if "before the stat" in stage else not_again)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "source", "undo"]
    for name in ("out", "undo"):
        assert without_paths(contents(folder / name)) == without_paths(contents(made / name))
    assert contents(folder / "source") == contents(made / "source")


def without_paths(files: dict[str, bytes]) -> dict[str, bytes]:
    """All files of a folder; in those that say where it was made, the values of that are left out."""
    told = {"report.json": ("source",), "verify.json": ("source", "pruned")}
    plain = dict(files)
    for name, keys in told.items():
        if name in plain:
            value = json.loads(plain[name])
            plain[name] = json.dumps({key: one for key, one in value.items() if key not in keys}).encode()
    return plain


def test_statistics_that_are_there_serve_another_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "decide_plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(folder)
    choice = Choice(criterion="ean", keep=Keep(count=6))
    result = start(folder, observe=not_again, choice=choice)
    assert (result["report"]["criterion"], result["outcome"]["experts_after"]) == ("ean", 18)


@pytest.fixture
def by_outputs(monkeypatch: pytest.MonkeyPatch) -> str:
    """A criterion that reads a sum on request."""
    criterion = Criterion(
        name="by_outputs", home="activation", needs=("output_sum", "token_count"), source="control", help="a test"
    )
    monkeypatch.setattr(activation, "by_outputs", lambda layer: layer.output_sum.norm(dim=1), raising=False)
    monkeypatch.setitem(CRITERIA, "by_outputs", criterion)
    return "by_outputs"


def test_where_kept_statistics_lack_a_sum_the_model_is_observed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by_outputs: str
) -> None:
    def plain(folder: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], None]]:
        count = torch.arange(3, 11)
        layers = {layer: LayerStats(num_tokens=26, token_count=count) for layer in folder.counts}
        return DATA, lambda: Observation(stats=RouterStats(layers=layers), model=model_facts(folder)).save(stats)

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_to_model", refusing_to_write)
        with pytest.raises(SecateurError, match="no more today"):
            start(folder, observe=plain, choice=Choice(criterion="frequency", keep=Keep(count=6)))
    result = start(folder, choice=Choice(criterion=by_outputs, keep=Keep(count=6)))
    assert result["report"]["criterion"] == by_outputs


def test_an_unfinished_pruning_on_other_data_or_of_a_changed_model_is_not_taken_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "decide_plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(folder)
    with pytest.raises(SecateurError, match=r"unfinished pruning with another --data \(tokens was 64, is 65\)"):
        start(folder, observe=lambda *_: (DATA | {"tokens": 65}, not_again))
    shard = next((folder / "source").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(SecateurError, match=r"unfinished pruning with another model \(files was"):
        start(folder)
    shutil.rmtree(place_of_work(folder / "out"))
    assert start(folder)["report"]["criterion"] == "reap"


def test_statistics_outlive_a_start_that_needs_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_to_model", refusing_to_write)
        for choice in (HALF, Choice(criterion="aimer", keep=Keep(share=0.5))):
            with pytest.raises(SecateurError, match="no more today"):
                start(folder, choice=choice)
    with pytest.raises(SecateurError, match=r"with another --data .*begin anew with --restart"):
        start(folder, observe=lambda found, stats: ({"other": "text"}, lambda: pytest.fail("observed")))
    start(folder, observe=not_again)
    assert Plan.load(folder / "out/plan.json").criterion == "reap"


def refusing_to_write(*_: Any, dry_run: bool = False, **options: Any) -> None:
    if not dry_run:
        raise SecateurError("no more today")


def interrupted_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a start that had its statistics and its plan."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_to_model", refusing_to_write)
        with pytest.raises(SecateurError, match="no more today"):
            start(folder)
    return place_of_work(folder / "out")


def test_statistics_that_were_changed_since_are_refused_by_name_and_a_restart_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = interrupted_before_writing(folder, monkeypatch) / "stats.safetensors"
    before = Observation.load(kept)
    layers = {
        layer: LayerStats(num_tokens=one.num_tokens, token_count=one.token_count.flip(0), **one.sums)
        for layer, one in before.stats.layers.items()
    }
    Observation(stats=RouterStats(layers=layers), model=before.model, data=before.data).save(kept)
    with pytest.raises(
        SecateurError, match=r"\.out\.pruning/stats\.safetensors: it was changed since .*asked\.json.*--restart"
    ):
        start(folder, observe=not_again)
    assert not (folder / "out").exists()
    assert start(folder, restart=True)["verified"]["passed"] is True


def test_statistics_that_are_gone_or_of_which_nothing_is_noted_are_taken_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def again(found: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], None]]:
        data, take = made_up(found, stats)
        return data, lambda: taken.append(take())

    for name in ("stats.safetensors", "asked.json"):
        (interrupted_before_writing(folder, monkeypatch) / name).unlink()
        with monkeypatch.context() as patch:
            patch.setattr(module, "apply_to_model", refusing_to_write)
            with pytest.raises(SecateurError, match="no more today"):
                start(folder, observe=again)
    assert len(taken) == 2
    start(folder, observe=not_again)


def test_statistics_that_change_while_the_result_is_written_get_it_no_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes() + b" ")

    monkeypatch.setattr(module, "copy_file", spoil)
    with pytest.raises(SecateurError, match=r"stats\.safetensors: it was changed"):
        start(folder)
    assert not (folder / "out").exists()


def test_a_file_beside_the_weights_that_changes_after_the_data_were_read_gets_the_result_no_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*values: Any, **options: Any) -> Plan:
        (folder / "source/tokenizer.json").write_text('{"version"')
        return decide(*values, **options)

    decide = module.decide_plan
    monkeypatch.setattr(module, "decide_plan", changed)
    with pytest.raises(SecateurError, match=r"source/tokenizer\.json: it was changed while it was in use"):
        start(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".out.pruning", "source"]


def test_restart_throws_away_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_to_model", refusing_to_write)
        with pytest.raises(SecateurError, match="no more today"):
            start(folder)
    other = {"other": "text"}
    start(folder, observe=lambda found, stats: (other, made_up(found, stats)[1]), restart=True)
    assert not place_of_work(folder / "out").exists()


def test_a_plan_in_the_source_that_is_not_its_own_shows_before_the_model_is_run(folder: Path) -> None:
    Plan.identity({0: 5}).save(folder / "source/plan.json")
    with pytest.raises(SecateurError, match=r"source/plan\.json: expected the plan that made this model"):
        start(folder, observe=not_again)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--criterion", "aimer", "--data", "x.txt"], "criterion 'aimer' needs no data here"),
        (["--criterion", "random", "--pretrained", "source"], "does not compare two models; leave it out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    folder: Path, run: Callable[..., tuple[int, str, str]], words: list[str], message: str
) -> None:
    given = [folder / word if word == "source" else word for word in words]
    status, _, err = run(folder, "--keep", "0.5", *given)
    assert (status, message in err) == (2, True), err


def test_what_fails_a_check_gets_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Check(claim="it generates", passed=False, detail="no")
    monkeypatch.setattr(module, "verify_model", lambda *_, **__: [failed])
    with pytest.raises(SecateurError, match=r"what was written failed: it generates \(no\); nothing was left at"):
        start(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".out.pruning", "source"]
    monkeypatch.setattr(module, "verify_model", verify_model)
    assert start(folder, observe=not_again)["verified"]["passed"] is True


def test_a_flipped_byte_in_the_middle_of_a_tensor_is_found_before_it_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(source: Path, written: Path, **options: Any) -> list[Check]:
        path = max(written.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
        return verify_model(source, written, **options)

    monkeypatch.setattr(module, "verify_model", flip)
    with pytest.raises(SecateurError, match="every kept tensor equals its source byte for byte"):
        start(folder)
    assert not (folder / "out").exists()
    assert not (folder / "undo").exists()


def test_two_at_once_into_one_folder_are_refused(folder: Path) -> None:
    refused = pytest.raises(
        SecateurError, match=r"--out .*out: another process is pruning into it \(it holds .*pruning\)"
    )
    with work_folder(place_of_work(folder / "out"), Asked, "not asked for"), refused:
        start(folder)
    assert [path.name for path in folder.iterdir()] == ["source"]


@pytest.mark.slow
def test_a_folder_that_was_pruned_before_is_pruned_again(folder: Path) -> None:
    start(folder, choice=Choice(criterion="frequency", keep=Keep(count=6)))
    result = run_stages(folder / "out", folder / "second", Choice(criterion="weight_norm", keep=Keep(count=4)))
    assert result["verified"]["passed"] is True
    assert not (folder / "second/observed").exists()
    assert result["report"]["files_left_out"] == []
    assert Plan.load(folder / "second/plan.json").layers[0].experts_before == 8


# --- as it is typed -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def command(root: Path, *words: object) -> tuple[int, str, str]:
        arguments = ["secateur", "prune", root / "source", "--out", root / "out", *words]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, " ".join(captured.err.split())

    return command


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "criterion",
    [
        "aimer",
        pytest.param("random", marks=pytest.mark.slow),
        *(pytest.param(name, marks=long) for name in ("weight_norm", "router_row_norm")),
    ],
)
def test_criteria_without_data_need_none(criterion: str, run: Run, folder: Path) -> None:
    status, out, err = run(folder, "--criterion", criterion, "--keep", "0.75")
    assert status == 0, err
    assert f"{criterion}: experts 24 -> 18 in 3 layers" in out
    assert out.count("passed: ") == len(ALL)
    assert not (folder / "out/observed").exists()
    details = Plan.load(folder / "out/plan.json").details
    assert details["zero_weights"] == ({} if criterion in ("aimer", "weight_norm") else None)


def test_the_card_and_the_page_tell_how_the_experts_were_chosen(folder: Path) -> None:
    start(folder)
    for name in ("README.md", "report.html"):
        text = (folder / "out" / name).read_text()
        for part in (
            "reap: its mean gate times output norm (arXiv 2510.13999)",
            "0.5 of the experts",
            "uniform",
            "made up",
        ):
            assert part in text, (name, part)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer, and text."""
    root = tmp_path_factory.mktemp("spoken")
    model_with_text(root)
    return root


SHORT = ["--samples", 8, "--sequence-length", 16, "--batch-size", 2]


def test_a_dry_run_says_what_it_can_and_writes_nothing(run: Run, spoken: Path) -> None:
    before = contents(spoken)
    status, out, _ = run(spoken, "--criterion", "aimer", "--keep", "6", "--dry-run")
    assert (status, "aimer: experts 24 -> 18" in out) == (0, True)
    data = [*data_in(spoken), *SHORT, "--dry-run"]
    status, out, err = run(spoken, "--keep", "6", *data)
    assert (status, "reap: experts 24 -> 18" in out) == (0, True), err
    assert "which experts go is decided by the data" in out
    status, out, _ = run(spoken, "--keep", "6", *data, "--allocation", "global", "--ep", 3)
    assert (status, "how many experts each layer keeps is decided by the data" in out) == (0, True)
    status, _, err = run(spoken, "--keep", "6", "--data", spoken / "nowhere.jsonl", "--dry-run")
    assert (status, "nowhere.jsonl" in err) == (2, True), err
    assert contents(spoken) == before
    assert sorted(path.name for path in spoken.iterdir()) == ["code.jsonl", "prose.jsonl", "source"]


@pytest.mark.slow
def test_one_command_makes_what_four_make(
    run: Run, spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(spoken, tmp_path / "one")
    root = tmp_path / "one"
    data = [*data_in(root), *SHORT]
    status, out, err = run(root, "--keep", "0.5", *data, "--json")
    assert status == 0, err
    assert json.loads(out)["verified"]["passed"] is True
    for words in (
        ["observe", root / "source", *data, "--out", root / "stats.safetensors"],
        ["plan", root / "stats.safetensors", "--keep", "0.5", "--out", root / "plan.json"],
        ["apply", root / "source", root / "plan.json", "--out", root / "steps"],
    ):
        monkeypatch.setattr("sys.argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    one, steps = contents(root / "out"), contents(root / "steps")
    assert one.pop("observed/stats.safetensors") == (root / "stats.safetensors").read_bytes()
    del one["verify.json"]
    assert one == steps
    for name in ("README.md", "report.html"):
        assert "sequences 4, tokens 64" in one[name].decode()
    assert str(root).encode() not in one["README.md"]


@pytest.mark.process
@pytest.mark.slow
def test_a_real_pass_that_was_killed_goes_on_at_its_layer(spoken: Path, tmp_path: Path) -> None:
    """All in processes of one kind: sums differ in their last places with the number of threads."""
    for name in ("one", "two"):
        shutil.copytree(spoken, tmp_path / name)
    words = ["--keep", "0.5", *data_in(spoken), *SHORT, "--activations", "disk", "--quiet"]
    assert in_child(typed, tmp_path / "one", words) == 0
    kill = Kill("secateur.model_folder.stream.resume:WorkFolder.save_layer", nth=2, when="after")
    assert in_child(typed, tmp_path / "two", words, kill) == -9
    layers = (tmp_path / "two/.out.pruning/.stats.safetensors.work/layers").iterdir()
    assert sorted(path.name for path in layers) == ["0.safetensors", "0.sha256", "1.safetensors", "1.sha256"]
    assert in_child(typed, tmp_path / "two", words) == 0
    assert without_paths(contents(tmp_path / "two/out")) == without_paths(contents(tmp_path / "one/out"))
    assert not (tmp_path / "two/.out.pruning").exists()


def typed(root: Path, words: list[object], *hooks: Callable[[], None]) -> None:
    for hook in hooks:
        hook()
    sys.argv = ["secateur", "prune", str(root / "source"), "--out", str(root / "out"), *map(str, words)]
    cli.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "1", "--criterion", "aimer"], "1 of 8 experts in layer 0"),
        (["--keep", "1", "--data", "x"], "1 of 8 experts in layer 0"),
        (["--keep", "1KB", "--data", "x"], "bytes must go, but at most"),
        (["--criterion", "aimer"], "--keep says how many experts stay; it is missing"),
        (["--keep", "6", "--criterion", "aimer", "--verify-tokens", "1"], "expected 0, or 2 and more"),
        (["--keep", "6", "--criterion", "aimer", "--mtp", "maybe"], "--mtp maybe: expected whole, drop or prune"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    words: list[str], message: str, run: Run, folder: Path
) -> None:
    status, _, err = run(folder, *words)
    assert (status, message in err) == (2, True), err
    assert [path.name for path in folder.iterdir()] == ["source"]


def test_what_needs_data_is_named_where_there_are_none(folder: Path) -> None:
    six = Keep(count=6)
    for choice, who in (
        (HALF, "criterion 'reap'"),
        (Choice(criterion="aimer", keep=six, allocation="laep"), "--allocation laep"),
        (Choice(criterion="aimer", keep=six, protect=True), "--protect"),
    ):
        with pytest.raises(SecateurError, match=f"{who} needs data to run the model on"):
            start(folder, choice=choice, observe=None)


def test_targets_that_are_not_free_are_refused_and_left_alone(folder: Path, run: Run) -> None:
    (folder / "out").mkdir()
    (folder / "out/mine").touch()
    with pytest.raises(SecateurError, match="it is there already and not an empty folder"):
        start(folder, observe=not_again)
    shutil.rmtree(folder / "out")
    for bad in (folder / "source/inside", folder / "source"):
        with pytest.raises(SecateurError, match="the same or inside each other"):
            run_stages(folder / "source", bad, HALF, observe=observe)
    with pytest.raises(SecateurError, match=r"--undo .* same or inside each other"):
        start(folder, undo=folder / "out/undo")
    (folder / "undo").mkdir()
    (folder / "undo/mine").touch()
    with pytest.raises(SecateurError, match=r"--undo .*: it is there already"):
        start(folder)
    assert (folder / "undo/mine").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["source", "undo"]


def test_the_command_records_the_sums_that_its_criterion_reads(spoken: Path, run: Run, by_outputs: str) -> None:
    words = ["--criterion", by_outputs, "--keep", "6", *data_in(spoken), *SHORT, "--verify-tokens", "0"]
    status, _, err = run(spoken, *words)
    assert status == 0, err
    assert Observation.load(spoken / "out/observed/stats.safetensors").stats.sums == (*DEFAULT_SUMS, "output_sum")


def test_bytes_to_keep_are_those_of_what_is_written(tmp_path: Path) -> None:
    """MTP layers that are dropped take no room; those that stay do."""
    source = write(tmp_path / "source", *with_mtp("mtp.layers.0."))
    sizes = {name: tensor.nbytes for name, tensor in tensors_of(source).items()}
    without = sum(size for name, size in sizes.items() if not name.startswith("mtp."))
    choice = Choice(criterion="aimer", keep=Keep(num_bytes=without))
    dropped = run_stages(source, tmp_path / "dropped", choice, mtp="drop", verify_tokens=0)["outcome"]
    assert dropped["experts_after"] == dropped["experts_before"]
    assert (dropped["bytes_before"], dropped["bytes_after"]) == (sum(sizes.values()), without)
    assert sum(tensor.nbytes for tensor in tensors_of(tmp_path / "dropped").values()) == without
    whole = run_stages(source, tmp_path / "whole", choice, mtp="whole", dry_run=True)["outcome"]
    assert whole["experts_after"] < whole["experts_before"]
    assert whole["bytes_after"] <= without


def test_a_share_to_keep_is_one_of_what_is_written(tmp_path: Path) -> None:
    """With its MTP layers dropped, a model is pruned as if it never had any."""
    config, tensors = with_mtp("mtp.layers.0.")
    write(tmp_path / "source", config, tensors)
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    write(tmp_path / "plain", config | {"num_nextn_predict_layers": 0}, plain)
    choice = Choice(criterion="laep", rule=Rule(target_params=0.8))

    def pruned(name: str, **options: Any) -> dict[int, LayerPlan]:
        out = tmp_path / f"of {name}"
        run_stages(tmp_path / name, out, choice, observe=made_up, verify_tokens=0, **options)
        return dict(Plan.load(out / "plan.json").layers)

    assert pruned("source", mtp="drop") == pruned("plain")
