"""`secateur plan`: plans worked out by hand, every choice from the tables, and what is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from secateur import cli
from secateur.commands.plan_options import ALLOCATION_HELP
from secateur.criteria import CRITERIA
from secateur.decide.by_score import ALLOCATIONS
from secateur.decide.model_facts import ModelFacts
from secateur.errors import SecateurError
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.observation.observation import Observation
from secateur.plans import Plan
from secateur.stats import DEFAULT_SUMS, LayerStats, RouterStats
from support.made_up_sums import sums_like
from support.model_folders import saved
from support.odd_folders import qwen3_5
from support.tiny_models import tiny_model
from support.tuned_folders import finetuned

Run = Callable[..., tuple[int, str, str]]


def layer(counts: list[int], **sums: list[float]) -> LayerStats:
    """Statistics of a layer; sums that are not given are those of experts that are all alike."""
    count = torch.tensor(counts)
    alike = sums_like(count) | {"max_activation": (count > 0).double()}
    given = {name: torch.tensor(values).double() for name, values in sums.items()}
    return LayerStats(num_tokens=sum(counts) // 2, token_count=count, **alike | given)


def model(layers: dict[int, LayerStats], **changes: Any) -> ModelFacts:
    """2 kB, each expert 50 bytes of them."""
    counts = {number: one.num_experts for number, one in layers.items()}
    plain: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "digest": "d",
        "top_k": 2,
        "num_groups": 1,
        "min_experts": 2,
        "total_bytes": 2000,
        "has_one_count": False,
        "num_experts": counts,
        "bytes_per_expert": dict.fromkeys(counts, 50),
    }
    return ModelFacts(**plain | changes)


# REAP: 5 1 3 1 and 1 2 2.5 4. Frequency: 10 20 30 40 and 20 10 4 2.
LAYERS = {
    0: layer([10, 20, 30, 40], weighted_norm_sum=[50, 20, 90, 40]),
    3: layer([20, 10, 4, 2], weighted_norm_sum=[20, 20, 10, 8]),
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit status, standard output, standard error) of `secateur plan`."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["secateur", "plan", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, " ".join(captured.err.split())

    return command


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return stats_file(tmp_path, LAYERS)


def stats_file(folder: Path, layers: dict[int, LayerStats], data: dict[str, Any] | None = None, **changes: Any) -> Path:
    observation = Observation(stats=RouterStats(layers=layers), model=model(layers, **changes), data=data or {})
    observation.save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


def orders(run: Run, source: Path, *words: object) -> dict[int, tuple[int, ...]]:
    """The experts that the written plan keeps."""
    out = source.parent / "plan.json"
    status, _, err = run(source, "--out", out, "--force", *words)
    assert status == 0, err
    return {number: one.order for number, one in Plan.load(out).layers.items()}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--keep", "2"], {0: (0, 2), 3: (2, 3)}),  # reap, of equal scores the lower id stays
        (["--keep", "3"], {0: (0, 1, 2), 3: (1, 2, 3)}),
        (["--keep", "0.75"], {0: (0, 1, 2), 3: (1, 2, 3)}),
        (["--keep", "0.7"], {0: (0, 1, 2), 3: (1, 2, 3)}),  # 1.2 of 4 may go, so one does
        (["--keep", "2", "--criterion", "frequency"], {0: (2, 3), 3: (0, 1)}),
        (["--keep", "0:3,3:2"], {0: (0, 1, 2), 3: (2, 3)}),
        (["--keep", "1.85KB"], {0: (0, 2), 3: (2, 3)}),  # 150 bytes must go: two experts of each layer are 200
        (["--keep", "1.9KB"], {0: (0, 1, 2), 3: (1, 2, 3)}),
        # Shares of the scores: layer 0 .5 .1 .3 .1, layer 3 .105 .211 .263 .421: the cheapest three of both go.
        (["--keep", "1.85KB", "--allocation", "global"], {0: (0, 2), 3: (1, 2, 3)}),
        # Loads of layer 0 .1 .2 .3 .4, of layer 3 .556 .278 .111 .056: sums of the smallest .1, .3 and .056, .167.
        (["--keep", "1.85KB", "--allocation", "laep"], {0: (0, 1, 2), 3: (2, 3)}),
        (["--keep", "3", "--min-experts", "3", "--ep", "3"], {0: (0, 1, 2), 3: (1, 2, 3)}),
        (["--keep", "0.6", "--ep", "2"], {0: (0, 1, 2, 3), 3: (0, 1, 2, 3)}),  # 3, and rounded up
        (["--alpha", "0.4"], {0: (1, 2, 3), 3: (0, 1, 2)}),  # means 25 and 9: 10 of 40 %, 2 of 22 %
        (["--criterion", "laep", "--beta", "0.31"], {0: (2, 3), 3: (0, 1)}),  # 10 + 20 of 100, 2 + 4 of 36
        (["--beta", "0.2", "--allocation", "laep"], {0: (1, 2, 3), 3: (0, 1)}),
        (["--beta", "0.2"], {0: (1, 2, 3), 3: (0, 1, 2)}),  # one count for all layers
        (["--target-params", "0.95"], {0: (1, 2, 3), 3: (0, 1, 2)}),
        (["--max-rerouted", "0.05", "--allocation", "laep"], {0: (0, 1, 2, 3), 3: (0, 1)}),  # 6 of 136
    ],
)
def test_plans_are_those_worked_out_by_hand(
    words: list[str], kept: dict[int, tuple[int, ...]], run: Run, stats: Path
) -> None:
    assert orders(run, stats, *words) == kept


def test_random_plans_follow_the_seed(run: Run, stats: Path) -> None:
    for seed in (0, 7):
        kept = orders(run, stats, "--criterion", "random", "--seed", seed, "--keep", "2")
        for number in LAYERS:
            generator = random.Random(f"secateur {seed} {number}")
            scores = [generator.random() for _ in range(4)]
            assert kept[number] == tuple(sorted(sorted(range(4), key=scores.__getitem__)[2:]))
    assert Plan.load(stats.parent / "plan.json").details["seed"] == 7


def test_router_groups_drop_equally(run: Run, tmp_path: Path) -> None:
    source = stats_file(tmp_path, {0: layer([1, 2, 3, 4, 50, 60, 70, 80])}, num_groups=2, min_experts=4)
    assert orders(run, source, "--criterion", "frequency", "--keep", "6") == {0: (1, 2, 3, 5, 6, 7)}
    status, _, err = run(source, "--criterion", "frequency", "--keep", "5", "--out", tmp_path / "p")
    assert (status, "5 of 8 experts in layer 0, expected one of [4, 6, 8]" in err) == (2, True), err


def test_a_super_expert_is_rescued_and_named(run: Run, tmp_path: Path) -> None:
    maxima = [1.0, 900.0, 1.0, 1.0]
    layers = {0: layer([9, 1, 9, 9], max_activation=maxima), 1: layer([9, 9, 9, 9], max_activation=[1.0] * 4)}
    source = stats_file(tmp_path, layers)
    assert orders(run, source, "--criterion", "frequency", "--keep", "3")[0] == (0, 1, 2)
    assert orders(run, source, "--criterion", "frequency", "--keep", "3", "--no-protect")[0] == (0, 2, 3)
    _, out, _ = run(source, "--criterion", "frequency", "--keep", "3", "--dry-run")
    assert "super-experts protected: layer 0: 1; of these the criterion would have dropped: layer 0: 1" in out


def test_it_says_what_the_plan_does(run: Run, tmp_path: Path) -> None:
    layers = {0: layer([0, 20, 30, 50]), 1: layer([40, 40, 20, 0])}
    source = stats_file(tmp_path, layers, {"sources": ["a.jsonl"], "tokens": 50})
    words = [source, "--criterion", "frequency", "--keep", "2", "--out", tmp_path / "plan.json"]
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    assert "frequency: experts 8 -> 4 in 2 layers, 2 kB -> 1.8 kB" in out
    assert "every layer: 4 -> 2" in out
    assert "20.00 % of the routed tokens lose their expert" in out  # 0 + 20 and 20 + 0 of 200
    assert "never routed to: 2 experts, 2 of them go" in out
    assert "holds this plan already; nothing was written" in run(*words)[1]
    again = json.loads(run(*words, "--json")[1])
    assert again.pop("is_there") is True
    assert again == json.loads(run(*words, "--json", "--force")[1])
    words[words.index("2")] = "3"
    assert "plan.json: it is there already; --force writes over a file" in run(*words)[2]
    words[words.index("3")] = "2"
    status, out, _ = run(*words, "--json", "--force")
    result = json.loads(out)
    assert (result["bytes_before"], result["bytes_after"], result["rerouted_share"]) == (2000, 1800, 0.2)
    plan = Plan.load(tmp_path / "plan.json")
    assert Plan.from_json(result["plan"]) == plan
    assert plan.details["model"] == {"model_type": "qwen3_moe", "digest": "d"}
    assert plan.details["data"] == {"sources": ["a.jsonl"], "tokens": 50}
    assert plan.stats_digest == RouterStats(layers=layers).digest()
    (tmp_path / "plan.json").unlink()
    assert run(*words, "--quiet") == (0, "", "")
    (tmp_path / "plan.json").unlink()
    assert run(*words, "--dry-run")[1].startswith("would write")
    assert not (tmp_path / "plan.json").exists()


def test_an_expert_that_no_token_reached_and_that_stays_is_not_said_to_go(run: Run, tmp_path: Path) -> None:
    layers = {0: layer([9, 0, 0, 0]), 1: layer([9, 7, 5, 9])}  # of the three, the one with the lowest id stays
    words = [stats_file(tmp_path, layers), "--criterion", "frequency", "--keep", "2", "--dry-run"]
    found = json.loads(run(*words, "--json")[1])
    assert (found["never_routed"], found["never_routed_dropped"]) == (3, 2)
    assert "never routed to: 3 experts, 2 of them go" in run(*words)[1]


def test_different_counts_come_with_what_cannot_serve_them(run: Run, stats: Path) -> None:
    assert "vLLM" in run(stats, "--keep", "0:3,3:2", "--dry-run")[1]
    assert "vLLM" not in run(stats, "--keep", "3", "--dry-run")[1]


# --- choices come from the tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "prune"])
def test_the_choices_of_the_command_line_are_those_of_the_tables(command: str) -> None:
    texts = {one.name: one.help for one in get_command(cli.app).commands[command].params}
    for name, criterion in CRITERIA.items():
        assert f"{name}: {criterion.help}" in texts["criterion"]
    assert "laep: " in texts["criterion"]
    assert ALLOCATION_HELP.keys() == ALLOCATIONS.keys()
    for name, text in ALLOCATION_HELP.items():
        assert f"{name}: {text}" in texts["allocation"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, one of other routers that it may have been made from, and made-up statistics, in one folder."""
    root = tmp_path_factory.mktemp("tiny")
    saved("qwen3_moe", root / "model")
    finetuned("qwen3_moe").save_pretrained(root / "base")
    known = model_facts(read_model_folder(root / "model"))
    layers = {number: layer([number + 1, *range(5, 12)]) for number in known.num_experts}
    Observation(stats=RouterStats(layers=layers), model=known).save(root / "stats.safetensors")
    Observation(stats=RouterStats(layers=layers)).save(root / "bare.safetensors")
    return root


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_on_a_folder_and_its_plan_is_applied(
    criterion: str, run: Run, tiny: Path, tmp_path: Path
) -> None:
    words = ["--criterion", criterion, "--keep", "0.75", "--out", tmp_path / "plan.json", "--force"]
    if CRITERIA[criterion].needs == "router change":
        assert run(tiny / "model", *words)[0] == 2
        status, out, err = run(tiny / "model", "--pretrained", tiny / "base", *words)
    else:
        status, out, err = run(tiny / "stats.safetensors", "--model", tiny / "model", *words)
        alone, _, said = run(tiny / "model", *words)
        assert alone == (2 if CRITERIA[criterion].needs_data else 0), said
    assert (status, "every layer: 8 -> 6" in out) == (0, True), err
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.criterion == criterion
    report = apply_to_model(tiny / "model", plan, tmp_path / "out", dry_run=True)
    assert report["criterion"] == criterion


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_runs(allocation: str, run: Run, tiny: Path) -> None:
    status, out, err = run(tiny / "stats.safetensors", "--keep", "0.75", "--allocation", allocation, "--dry-run")
    assert (status, "experts 24 -> 18" in out) == (0, True), err


def test_without_a_criterion_it_is_reap_for_statistics_and_aimer_for_a_model(run: Run, tiny: Path) -> None:
    for source, expected in (("stats.safetensors", "reap"), ("model", "aimer")):
        result = json.loads(run(tiny / source, "--keep", "6", "--dry-run", "--json")[1])
        assert result["criterion"] == expected
    assert json.loads(run(tiny / "stats.safetensors", "--beta", "0.1", "--dry-run", "--json")[1])["criterion"] == "laep"


def test_statistics_without_their_model_take_it_from_the_folder(run: Run, tiny: Path) -> None:
    words = ["--criterion", "frequency", "--keep", "6", "--dry-run"]
    assert "name its folder with --model" in run(tiny / "bare.safetensors", *words)[2]
    assert run(tiny / "bare.safetensors", *words, "--model", tiny / "model")[0] == 0


def test_a_training_run_is_pruned_by_its_last_loads(run: Run, tiny: Path, tmp_path: Path) -> None:
    first = {str(number): [1] * 8 for number in range(3)}
    last = {str(number): [0, 1, 9, 9, 9, 9, 9, 2] for number in range(3)}
    lines = [{"step": step, "tokens": 9, "layers": loads} for step, loads in ((1, first), (2, last))]
    (tmp_path / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "model").symlink_to(tiny / "model")
    status, _, err = run(tmp_path, "--beta", "0.1", "--out", tmp_path / "plan.json")
    assert status == 0, err
    assert {one.dropped for one in Plan.load(tmp_path / "plan.json").layers.values()} == {(0, 1, 7)}
    last["1"].pop()  # as a damaged line may lack one
    (tmp_path / "loads.jsonl").write_text(json.dumps(lines[1]) + "\n")
    status, _, err = run(tmp_path, "--beta", "0.1", "--out", tmp_path / "new.json")
    assert (status, f"{tmp_path}/loads.jsonl: statistics of experts {{0: 8, 1: 7, 2: 8}}, expected" in err) == (2, True)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "1"], "1 of 4 experts in layer 0, expected one of [2, 3, 4]"),
        (["--keep", "5"], "5 experts in layer 0, which has only 4"),
        (["--keep", "0.1"], "expected one of [2, 3, 4]"),
        (["--keep", "3", "--ep", "2"], "3 of 4 experts in layer 0"),
        (["--keep", "1.7KB"], "300 bytes must go, but at most 200 can"),
        (["--keep", "1.7KB", "--allocation", "global"], "300 bytes must go, but at most 200 can"),
        (["--keep", "0:2"], "found layers [0], expected [0, 3]"),
        (["--keep", "0:3,3:2", "--allocation", "global"], "leaves nothing to allocate"),
        (["--keep", "three"], "keep: found 'three', expected a share"),
        ([], "--keep says how many experts stay; it is missing"),
        (["--keep", "3", "--criterion", "raep"], "criterion is 'raep', expected one of frequency,"),
        (["--keep", "3", "--allocation", "even"], "expected one of uniform, global, laep"),
        (["--keep", "3", "--criterion", "aimer"], "reads expert weights: name the folder of the model with --model"),
        (["--keep", "3", "--criterion", "laep"], "expected thresholds (--alpha, --beta or both)"),
        (["--keep", "3", "--alpha", "1"], "and no --keep"),
        (["--alpha", "1", "--criterion", "reap"], "are for criterion 'laep', found 'reap'"),
        (["--alpha", "1", "--target-params", "0.5"], "expected exactly one of"),
        (["--alpha", "1", "--allocation", "global"], "expected --allocation uniform or laep"),
        (["--beta", "2"], "beta (--beta) is 2.0"),
        (["--keep", "3", "--model", "nowhere"], "nowhere: not a folder"),
        (["--keep", "3", "--ep", "0"], "'--ep'"),
    ],
)
def test_what_cannot_be_asked_ends_with_status_2_and_no_file(
    words: list[str], message: str, run: Run, stats: Path
) -> None:
    status, _, err = run(stats, "--out", stats.parent / "plan.json", *words)
    assert (status, message in err) == (2, True), err
    assert not (stats.parent / "plan.json").exists()


def test_out_is_asked_for(run: Run, stats: Path) -> None:
    assert "--out names the file" in run(stats, "--keep", "3")[2]
    assert "a folder, expected a file" in run(stats, "--keep", "3", "--out", stats.parent)[2]
    assert run(stats.parent / "nothing", "--keep", "3", "--dry-run")[2].endswith(
        "not there, expected a statistics file or the folder of a model"
    )


def test_a_source_is_never_written_over_nor_a_file_put_into_a_model(run: Run, tiny: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    for source, out, more in (
        ("stats.safetensors", "stats.safetensors", ()),
        ("model", "model/config.json", ()),
        ("stats.safetensors", "model/plan.json", ("--model", tiny / "model")),
    ):
        status, _, err = run(tiny / source, "--keep", "6", "--force", "--out", tiny / out, *more)
        assert (status, "or inside it, which is only read" in err) == (2, True), err
    assert before == {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}


def test_counts_that_the_ranks_cannot_share_are_refused_by_plan(run: Run, tiny: Path) -> None:
    status, _, err = run(tiny / "model", "--keep", "0.95", "--ep", "3", "--dry-run")
    assert (status, "layer 0 would keep 8 of 8 experts, expected a multiple of 3" in err) == (2, True), err


def test_statistics_without_tokens_are_refused(run: Run, tmp_path: Path) -> None:
    zero = {"token_count": [0] * 4, **{name: [0.0] * 4 for name in DEFAULT_SUMS}}
    stats = RouterStats.from_json(
        {"format": "secateur-stats", "version": 2, "layers": {"0": {"num_tokens": 0, **zero}}}
    )
    Observation(stats=stats, model=model(stats.layers)).save(tmp_path / "zero.safetensors")
    for words in (["--keep", "3"], ["--beta", "0.5"], ["--keep", "0.75", "--allocation", "laep"]):
        status, _, err = run(tmp_path / "zero.safetensors", *words, "--dry-run")
        assert status == 2
        assert re.search("token_count is 0 for every expert|no token was routed", err), err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_sum_that_is_no_number_is_refused_by_name(value: float, run: Run, stats: Path) -> None:
    data = stats.read_bytes()
    good = torch.tensor([50.0], dtype=torch.float64).numpy().tobytes()
    assert data.count(good) == 1
    bad = {-1.0: ("norm_sum", 40.0)}.get(value, ("weighted_norm_sum", 50.0))
    old = torch.tensor([bad[1]], dtype=torch.float64).numpy().tobytes()
    stats.write_bytes(data.replace(old, torch.tensor([value], dtype=torch.float64).numpy().tobytes()))
    status, _, err = run(stats, "--keep", "3", "--dry-run")
    assert status == 2
    assert re.search(rf"of expert \d is {value}, expected a finite number", err), err


def test_statistics_and_plans_of_another_model_are_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "mixtral")
    status, _, err = run(tiny / "stats.safetensors", "--model", tmp_path / "mixtral", "--keep", "6", "--dry-run")
    assert (status, "statistics of a qwen3_moe model" in err) == (2, True), err
    saved("qwen2_moe", tmp_path / "qwen2_moe")  # experts in layers 0 and 2 only
    words = ["--criterion", "frequency", "--keep", "6", "--dry-run"]
    status, _, err = run(tiny / "bare.safetensors", "--model", tmp_path / "qwen2_moe", *words)
    assert (status, "expected those of the model" in err) == (2, True), err

    run(tiny / "stats.safetensors", "--keep", "6", "--out", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    with pytest.raises(SecateurError, match=r"made for a qwen3_moe model with other layers or routers.*a mixtral"):
        apply_to_model(tmp_path / "mixtral", plan, tmp_path / "out")
    composed = plan.compose(Plan.identity({0: 6}))
    with pytest.raises(SecateurError, match="made for a qwen3_moe model"):
        apply_to_model(tmp_path / "mixtral", composed, tmp_path / "out")
    apply_to_model(tiny / "model", composed, tmp_path / "out", dry_run=True)


def test_a_fine_tuned_model_takes_the_plan_of_its_base_and_one_without_facts_fits_by_its_counts(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    run(tiny / "stats.safetensors", "--keep", "6", "--out", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    tiny_model("qwen3_moe", seed=9).save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert apply_to_model(tmp_path / "tuned", plan, tmp_path / "out")["criterion"] == "reap"
    bare = Plan(layers=plan.layers, criterion="somebody's")
    saved("mixtral", tmp_path / "mixtral")
    assert apply_to_model(tmp_path / "mixtral", bare, tmp_path / "other")["criterion"] == "somebody's"


def test_layers_of_a_text_model_inside_another_must_keep_one_count(run: Run, tmp_path: Path) -> None:
    qwen3_5(tmp_path / "model")
    words = [tmp_path / "model", "--criterion", "random", "--dry-run"]
    assert run(*words, "--keep", "6")[0] == 0
    for more in (["--keep", "0:6,1:6,2:5"], ["--keep", "0.75", "--allocation", "global"]):
        status, _, err = run(*words, *more)
        assert (status, "one count for all layers" in err) == (2, True), err
