"""`--removed`: what a plan says of removed experts, and who may add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import cli
from secateur.decide.keep import Keep
from secateur.decide.rule import Rule
from secateur.errors import SecateurError
from secateur.model_folder.choice import Choice, check_choice, decide_plan, outcome
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.source import of_folder, of_observation
from secateur.model_folder.stages import run_stages
from secateur.observation.observation import Observation
from secateur.plans import MIXED, REROUTE, ZERO_SLOT, LayerPlan, Plan
from secateur.stats import RouterStats
from secateur.training_checkpoint.apply import apply_to_checkpoint
from support.dcp_checkpoints import save as save_checkpoint
from support.model_folders import plan_of, saved, tensors_of
from support.models_with_text import model_with_text
from support.odd_folders import llama4, qwen3_5
from support.zero_slot_models import zero_slot_plan


def plan(removed: str | None, order: tuple[int, ...] = (0, 3, 5), before: int = 8) -> Plan:
    return Plan(layers={0: LayerPlan(experts_before=before, order=order)}, criterion="test", removed=removed)


@pytest.mark.parametrize("removed", [None, REROUTE, ZERO_SLOT])
def test_a_plan_file_says_what_becomes_of_removed_experts_only_if_the_plan_does(
    removed: str | None, tmp_path: Path
) -> None:
    plan(removed).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan(removed)
    assert json.loads((tmp_path / "plan.json").read_text()).get("removed", None) == removed
    assert ("removed" in plan(removed).to_json()) is (removed is not None)
    assert plan(removed).leaves_zero_slots is (removed == ZERO_SLOT)
    assert ("removed experts: zero-slot" in plan(removed).describe()) is (removed == ZERO_SLOT)


def test_another_meaning_is_refused() -> None:
    with pytest.raises(SecateurError, match="removed is 'zero', expected reroute or zero-slot"):
        plan("zero")
    with pytest.raises(SecateurError, match=r"'removed' is \['reroute'\], expected a text or null"):
        Plan.from_json(plan(None).to_json() | {"removed": ["reroute"]})
    with pytest.raises(SecateurError, match="--removed zero: expected reroute or zero-slot"):
        Choice(criterion="random", keep=Keep(count=3), removed="zero")


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (None, None, None),
        (None, REROUTE, REROUTE),
        (REROUTE, None, REROUTE),
        (ZERO_SLOT, ZERO_SLOT, ZERO_SLOT),
        (None, ZERO_SLOT, MIXED),
        (ZERO_SLOT, REROUTE, MIXED),
    ],
)
def test_composed_plans_have_one_meaning_if_their_steps_do(
    first: str | None, second: str | None, both: str | None
) -> None:
    composed = plan(first).compose(plan(second, (2, 0), before=3))
    assert composed.removed == both
    steps: Any = composed.details["steps"]
    assert [step.get("removed") for step in steps] == [first, second]
    assert Plan.from_json(composed.to_json()) == composed


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["secateur", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def test_from_plan_to_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("qwen3_moe", tmp_path / "source")
    words = ["plan", tmp_path / "source", "--criterion", "random", "--keep", "1", "--out", tmp_path / "plan.json"]
    status, _, err = run(capsys, monkeypatch, *words)
    assert status == 2
    assert "expected one of [2, 3, 4, 5, 6, 7, 8]" in err
    status, out, _ = run(capsys, monkeypatch, *words, "--removed", "zero-slot")
    assert status == 0
    assert "every layer: 8 -> 1" in out
    assert "The routers are those of the original, with a slot for every expert that was removed" in out
    assert Plan.load(tmp_path / "plan.json").removed == ZERO_SLOT

    status, out, _ = run(
        capsys, monkeypatch, "apply", tmp_path / "source", tmp_path / "plan.json", "--out", tmp_path / "out"
    )
    assert status == 0
    assert "experts 24 -> 3 in 3 layers, 72 tensors changed" in out  # 3 of each expert, and no router
    status, out, _ = run(capsys, monkeypatch, "verify", tmp_path / "source", tmp_path / "out", "--tokens", "8")
    assert status == 0
    assert "passed: its logits are those of the source with the dropped experts silent (8 tokens, bit for bit)" in out
    status, out, _ = run(capsys, monkeypatch, "inspect", tmp_path / "out")
    assert status == 0
    assert "21 zero slots in 3 layers, of experts that were removed" in out


def test_prune_leaves_zero_slots_and_its_result_passes_every_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("deepseek_v3 grouped", tmp_path / "source")
    words = ["prune", tmp_path / "source", "--criterion", "random", "--keep", "1", "--removed", "zero-slot"]
    status, out, _ = run(capsys, monkeypatch, *words, "--out", tmp_path / "out", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["verified"]["passed"] is True
    assert (result["outcome"]["removed"], result["outcome"]["experts_after"]) == (ZERO_SLOT, 2)
    assert result["outcome"]["bytes_after"] == result["report"]["bytes_after"]


@pytest.mark.slow
def test_what_runs_on_text_refuses_zero_slots_or_computes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = model_with_text(tmp_path)
    apply_to_model(tmp_path / "source", zero_slot_plan(range(3)), tmp_path / "out")
    asked = [*data, "--samples", "4", "--sequence-length", "16"]
    words = ["observe", tmp_path / "out", *asked, "--out", tmp_path / "stats.safetensors"]
    status, _, err = run(capsys, monkeypatch, *words)
    assert status == 2
    assert "the model has zero slots: its routers choose among experts of which some were removed" in err
    words = ["prune", tmp_path / "out", *asked, "--criterion", "frequency", "--allocation", "global", "--keep", "0.5"]
    status, _, err = run(capsys, monkeypatch, *words, "--removed", "zero-slot", "--out", tmp_path / "none")
    assert status == 2
    assert "the model has zero slots: its routers choose among experts of which some were removed" in err
    perplexity = []
    for way in ("--stream", "--no-stream"):
        status, out, err = run(capsys, monkeypatch, "eval", tmp_path / "out", *asked, way, "--json")
        assert status == 0, err
        perplexity.append(json.loads(out)["models"][0]["perplexity"])
    assert perplexity[0] == perplexity[1]


def test_apply_may_say_what_the_plan_leaves_open_and_not_the_contrary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("qwen3_moe", tmp_path / "source")
    words = ["apply", tmp_path / "source", tmp_path / "plan.json", "--out", tmp_path / "out"]
    for removed in (REROUTE, ZERO_SLOT):
        plan(removed).save(tmp_path / "plan.json")
        other = ZERO_SLOT if removed == REROUTE else REROUTE
        status, _, err = run(capsys, monkeypatch, *words, "--removed", other)
        assert status == 2
        assert f"--removed {other}: the plan was made for --removed {removed}" in err
    plan(None).save(tmp_path / "plan.json")
    assert run(capsys, monkeypatch, *words, "--removed", "zero")[0] == 2
    assert not (tmp_path / "out").exists()
    assert run(capsys, monkeypatch, *words, "--removed", "zero-slot", "--undo", tmp_path / "undo")[0] == 0
    assert read_model_folder(tmp_path / "out").config.kept == {0: (0, 3, 5)}
    assert Plan.load(tmp_path / "out" / "plan.json").removed == ZERO_SLOT

    back = ["apply", tmp_path / "out", tmp_path / "undo", "--out", tmp_path / "again"]
    status, _, err = run(capsys, monkeypatch, *back, "--removed", "zero-slot")
    assert (status, "takes no other option" in err) == (2, True)
    assert run(capsys, monkeypatch, *back)[0] == 0
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "source").keys()


def test_a_training_checkpoint_has_no_zero_slots(tmp_path: Path) -> None:
    block = "model.layers.0.mlp"
    tensors = {f"{block}.gate.weight": torch.rand(8, 4), f"{block}.experts.down_proj": torch.rand(8, 4, 3)}
    save_checkpoint(tensors, tmp_path / "source")
    with pytest.raises(SecateurError, match="its removed experts are 'zero-slot', expected 'reroute'"):
        apply_to_checkpoint(tmp_path / "source", plan(ZERO_SLOT), tmp_path / "out")


def test_bytes_that_stay_with_the_routers_are_not_counted_as_gone(tmp_path: Path) -> None:
    saved("deepseek_v3 grouped", tmp_path / "source")
    source = of_folder(tmp_path / "source")
    wanted = Choice(criterion="random", keep=Keep(count=3), removed=ZERO_SLOT)
    counted = check_choice(source, wanted)
    assert counted is not None
    assert counted.leaves_zero_slots
    decided = decide_plan(source, wanted)
    assert {one.experts_after for one in decided.layers.values()} == {3}  # of groups 4 and 4, and a top-k of 2 in each
    told = outcome(source, decided)
    report = apply_to_model(tmp_path / "source", decided, tmp_path / "out")
    assert (told["removed"], told["bytes_after"]) == (ZERO_SLOT, report["bytes_after"])
    exact = Choice(criterion="random", keep=Keep(num_bytes=told["bytes_after"]), removed=ZERO_SLOT)
    assert outcome(source, decide_plan(source, exact))["bytes_after"] == told["bytes_after"]


def test_bytes_are_only_promised_where_the_folder_tells_those_of_routers(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    folder = read_model_folder(tmp_path / "source")
    stats = RouterStats.from_loads({layer: list(range(8)) for layer in range(3)}, 14)
    alone = of_observation(Observation(stats=stats, model=model_facts(folder)), None, "stats")
    asked = [
        Choice(criterion="frequency", keep=Keep(num_bytes=100_000), removed=ZERO_SLOT),
        Choice(criterion="laep", rule=Rule(target_params=0.9), removed=ZERO_SLOT),
    ]
    for choice in asked:
        with pytest.raises(SecateurError, match="name the folder of the model with --model"):
            decide_plan(alone, choice)
        assert decide_plan(of_observation(Observation(stats=stats), folder, "stats"), choice).leaves_zero_slots
    few = decide_plan(alone, Choice(criterion="frequency", keep=Keep(count=1), removed=ZERO_SLOT))
    assert few.layers[0].order == (7,)


@pytest.mark.slow
def test_a_text_model_inside_another_may_keep_other_numbers_in_its_layers(tmp_path: Path) -> None:
    source = of_folder(qwen3_5(tmp_path / "source"))
    keep = Keep(layers={0: 1, 1: 8, 2: 3})
    with pytest.raises(SecateurError, match="which can only have one count for all layers"):
        decide_plan(source, Choice(criterion="random", keep=Keep(layers={0: 2, 1: 8, 2: 3})))
    decided = decide_plan(source, Choice(criterion="random", keep=keep, removed=ZERO_SLOT))
    assert [one.experts_after for one in decided.layers.values()] == [1, 8, 3]


def test_a_plan_that_says_nothing_cuts_rows(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    whole = plan_of(*((layer, [0, 3, 5]) for layer in range(3)))
    for name, removed in (("open", None), ("said", REROUTE)):
        apply_to_model(tmp_path / "source", zero_slot_plan(range(3), ((0, 3, 5),), removed=removed), tmp_path / name)
        assert tensors_of(tmp_path / name)["model.layers.0.mlp.gate.weight"].shape == (3, 32)
    assert whole.removed is None


def test_a_family_that_cannot_is_refused_before_data_is_read(tmp_path: Path) -> None:
    llama4(nested=False).save_pretrained(tmp_path / "model")
    choice = Choice(criterion="frequency", keep=Keep(share=0.5), allocation="global", removed="zero-slot")

    def observe(found: object, stats: Path) -> Any:
        raise AssertionError("data was read")

    with pytest.raises(SecateurError, match="cannot be built"):
        run_stages(tmp_path / "model", tmp_path / "out", choice, observe=observe)
