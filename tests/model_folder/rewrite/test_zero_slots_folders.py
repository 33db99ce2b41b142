"""Model folders with zero slots go through the whole chain: apply, verify, undo, inspect, and a second plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from secateur.decide.keep import Keep
from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.checks.oracle import without_dropped
from secateur.model_folder.choice import Choice, decide_plan
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.inspect import inspect
from secateur.model_folder.read.load import load
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.undo import restore
from secateur.model_folder.source import of_folder
from secateur.plans import MIXED, LayerPlan, Plan
from secateur.surgery.zero_slots import remove_into_zero_slots_
from support.claims import detail, fallen, not_checked
from support.fresh import in_fresh
from support.model_folders import contents, loaded, plan_of, same_bytes, saved, tensors_of
from support.model_folders import write as write_folder
from support.odd_folders import llama4, qwen3_5, with_mtp
from support.tiny_models import FAMILIES, families, random_tokens
from support.zero_slot_models import TURNED, check_close, silenced_logits, zero_slot_plan

# One of each packing and experts' forward; then those whose router is another.
PACKINGS = {"deepseek_v3 grouped", "mixtral", "gpt_oss", "ernie4_5_moe", "jamba", "nemotron_h", "dbrx", "inkling_text"}
ROUTERS = {"qwen2_moe", "lfm2_moe", "afmoe", "minimax_m2", "hunyuan_v1_moe"}


def check_chain(source: Path, tmp_path: Path, plan: Plan, not_looked_at: frozenset[str] = frozenset()) -> None:
    """Apply and verify a plan, and restore the source."""
    apply_to_model(source, plan, tmp_path / "out", undo=tmp_path / "undo")
    checks = verify_model(source, tmp_path / "out", num_tokens=12)
    assert (fallen(checks), not_checked(checks)) == (set(), not_looked_at), checks
    assert detail(checks, "logits").endswith("bit for bit")
    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


@pytest.mark.parametrize("name", families(PACKINGS, {"mixtral"}, sorted(PACKINGS | ROUTERS)))
def test_a_folder_computes_what_its_source_does_with_gates_of_0_and_is_restored(name: str, tmp_path: Path) -> None:
    model, tokens = saved(name, tmp_path / "source"), random_tokens(2, 12)
    plan = zero_slot_plan(FAMILIES[name].layers)
    check_chain(tmp_path / "source", tmp_path, plan)
    expected = silenced_logits(model, plan, tokens)
    assert not torch.allclose(expected, logits_of(model, tokens), atol=3e-6)
    pruned = loaded(tmp_path / "out")
    found = logits_of(pruned, tokens)
    check_close(found, expected)

    remove_into_zero_slots_(model, plan)
    assert torch.equal(logits_of(model, tokens), found)
    assert type(model) is type(pruned)
    assert model.config.moe_config == pruned.config.moe_config
    assert same_bytes(model.state_dict(), pruned.state_dict())


@pytest.mark.slow
def test_experts_in_a_text_model_inside_another_may_have_zero_slots_of_other_numbers(tmp_path: Path) -> None:
    source = qwen3_5(tmp_path / "source")
    check_chain(source, tmp_path, zero_slot_plan(range(3)))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "PrunedQwen3_5MoeForConditionalGeneration"


def test_routers_keep_their_bytes_and_the_undo_folder_has_nothing_but_experts(tmp_path: Path) -> None:
    saved("deepseek_v3 grouped", tmp_path / "source")
    plan = zero_slot_plan((1, 2))
    report = apply_to_model(tmp_path / "source", plan, tmp_path / "out", undo=tmp_path / "undo")
    before, after, taken = (tensors_of(tmp_path / folder) for folder in ("source", "out", "undo"))
    routers = {name for name in before if ".mlp.gate." in name}
    assert len(routers) == 4  # of two layers: weight, selection bias
    assert all(torch.equal(before[name], after[name]) for name in routers)
    first, third = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (1, 3))
    assert torch.equal(after[first], before[third])
    assert taken.keys() == {
        name
        for name in before
        for layer, one in plan.layers.items()
        for old in one.dropped
        if name.startswith(f"model.layers.{layer}.mlp.experts.{old}.")
    }
    assert report["removed"] == "zero-slot"
    assert report["layers"]["1"] == {  # type: ignore[index, call-overload]
        "experts_before": 8, "experts_after": 3, "dropped": [1, 2, 4, 6, 7], "tensors_changed": 24,
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a removed expert | its slot stayed in the router and contributes nothing |" in card
    assert "trust_remote_code=True" in card
    assert "trust_remote_code" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "modeling_secateur.py").is_file()


def test_config_json_changes_only_where_it_must(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0, 2)), tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    assert after == before | {
        "model_type": "secateur_moe",
        "base_model_type": "qwen3_moe",
        "architectures": ["PrunedQwen3MoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_secateur.PrunedQwen3MoeConfig",
            "AutoModel": "modeling_secateur.PrunedQwen3MoeModel",
            **{
                f"AutoModelFor{task}": f"modeling_secateur.PrunedQwen3MoeFor{task}"
                for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
            },
        },
        "moe_config": {"per_layer_experts_blocks": [8, 8, 8], "kept_experts": {"0": [0, 3, 5], "2": [6]}},
    }


def test_a_plan_that_removes_nothing_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}))
    apply_to_model(tmp_path / "source", zero_slot_plan((0,), (tuple(range(8)),)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(path.read_text())
    assert same_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "source"))
    apply_to_model(tmp_path / "source", zero_slot_plan((0,)), tmp_path / "fewer")
    code = json.loads((tmp_path / "fewer" / "config.json").read_text())["auto_map"]
    assert code["AutoConfig"] == "modeling_secateur.PrunedQwen3MoeConfig"


def test_inspect_counts_experts_and_slots_apart(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0, 2)), tmp_path / "out")
    whole, found = inspect(tmp_path / "source").to_json(), inspect(tmp_path / "out").to_json()
    assert (whole["experts"], whole["zero_slots"]) == ({"0": 8, "1": 8, "2": 8}, {})
    assert (found["experts"], found["zero_slots"]) == ({"0": 3, "1": 8, "2": 1}, {"0": 5, "2": 7})
    assert found["bytes"]["routers"] == whole["bytes"]["routers"]
    row = 32 * 4
    assert found["bytes_per_expert"]["0"] == whole["bytes_per_expert"]["0"] - row
    assert found["least_experts"] == 1
    assert "a further plan is applied with --removed zero-slot" in found["limits"][0]


def test_fewer_experts_than_the_router_chooses_are_kept_only_where_it_stays_whole(tmp_path: Path) -> None:
    saved("deepseek_v3 grouped", tmp_path / "source")
    for order, message in (((6,), "keeps 1 experts, its router needs 4"), ((0, 1, 2, 4), "found the groups")):
        with pytest.raises(SecateurError, match=message):
            apply_to_model(tmp_path / "source", plan_of((1, list(order))), tmp_path / "none")
        apply_to_model(tmp_path / "source", zero_slot_plan((1,), (order,)), tmp_path / str(len(order)))


def test_verify_silences_the_slots_of_what_a_second_plan_drops(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0, 2), ((5, 0, 3),)), tmp_path / "first")
    later = Plan(layers={0: LayerPlan(experts_before=3, order=(0, 2))}, criterion="later", removed="zero-slot")
    apply_to_model(tmp_path / "first", later, tmp_path / "second")
    checks = verify_model(tmp_path / "first", tmp_path / "second", num_tokens=12)
    assert {check.passed for check in checks} == {True}, checks
    assert detail(checks, "logits").endswith("bit for bit")


@pytest.mark.slow
def test_a_second_plan_is_about_the_experts_that_are_left(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0, 2), ((5, 0, 3),)), tmp_path / "first", undo=tmp_path / "one")
    later = Plan(layers={0: LayerPlan(experts_before=3, order=(2, 0))}, criterion="later", removed="zero-slot")
    apply_to_model(tmp_path / "first", later, tmp_path / "second", undo=tmp_path / "two")
    checks = verify_model(tmp_path / "first", tmp_path / "second", num_tokens=12)
    assert {check.passed for check in checks} == {True}, checks
    assert read_model_folder(tmp_path / "second").config.kept == {0: (3, 5), 2: (5, 0, 3)}
    restore(tmp_path / "second", tmp_path / "two", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")

    apply_to_model(tmp_path / "source", Plan.load(tmp_path / "second" / "plan.json"), tmp_path / "at once")
    assert same_bytes(tensors_of(tmp_path / "at once"), tensors_of(tmp_path / "second"))
    for name in ("config.json", "modeling_secateur.py"):
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    with pytest.raises(SecateurError, match=r"its routers have zero slots, and the plan would cut rows of them; say"):
        apply_to_model(tmp_path / "first", plan_of((0, [0, 1]), experts=3), tmp_path / "none")


@pytest.mark.slow
def test_zero_slots_after_cut_rows_are_recorded_as_two_meanings(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", plan_of((0, [1, 2, 5])), tmp_path / "cut")
    plan = Plan(layers={0: LayerPlan(experts_before=3, order=(2,))}, criterion="test", removed="zero-slot")
    check_chain(tmp_path / "cut", tmp_path, plan)
    history = Plan.load(tmp_path / "out" / "plan.json")
    assert (history.removed, history.layers[0].order) == (MIXED, (5,))
    with pytest.raises(SecateurError, match="its steps mean different things by removing an expert"):
        apply_to_model(tmp_path / "source", history, tmp_path / "none")


def test_verify_finds_experts_at_wrong_slots(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0,)), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["moe_config"]["kept_experts"]["0"] = [0, 5, 3]
    path.write_text(json.dumps(config))
    (check,) = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=0)
    assert not check.passed
    assert check.detail == "found {0: 3, 1: 8, 2: 8} at the slots {0: (0, 5, 3)}"


@pytest.mark.slow
def test_verify_expects_every_bit_unless_experts_changed_places(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan(range(3), TURNED), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=12)
    assert {check.passed for check in checks} == {True}, checks
    apply_to_model(tmp_path / "source", zero_slot_plan(range(3)), tmp_path / "changed")
    name = "model.layers.2.mlp.experts.0.down_proj.weight"
    for file in (tmp_path / "changed").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: tensors[name] * 1.0001}, file, metadata={"format": "pt"})
    checks = verify_model(tmp_path / "source", tmp_path / "changed", num_tokens=12)
    assert fallen(checks) == {"tensors", "logits"}, checks


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0,)), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    text = path.read_text()
    for kept, message in (([0, 9, 1], "layer 0 has"), ([0, 1], "layer 0: 3 experts in the files, 2 by config.json")):
        config = json.loads(text)
        config["moe_config"]["kept_experts"]["0"] = kept
        path.write_text(json.dumps(config))
        with pytest.raises(SecateurError, match=message):
            read_model_folder(tmp_path / "out")


@pytest.mark.parametrize("mtp", [None, "whole", "drop"])
def test_layers_for_further_tokens_stay_whole_or_go(mtp: str | None, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", *with_mtp("mtp.layers.0."))
    apply_to_model(source, zero_slot_plan((1, 2)), tmp_path / "out", mtp=mtp, undo=tmp_path / "undo")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    theirs = {name: value for name, value in before.items() if "mtp" in name}
    kept = {} if mtp == "drop" else theirs
    assert same_bytes({name: value for name, value in after.items() if "mtp" in name}, kept)
    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    with pytest.raises(SecateurError, match=r"layers \[3\] predict further tokens \(MTP\), and transformers has no"):
        apply_to_model(source, zero_slot_plan((3,)), tmp_path / "none")


def quantised(folder: Path) -> Plan:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    return zero_slot_plan((0,))


REFUSED: dict[str, tuple[Callable[[Path], Plan], dict[str, Any], str]] = {
    "quantised": (quantised, {}, "zero slots: the model is quantised, and transformers then computes experts by code"),
    "ranks": (lambda folder: zero_slot_plan((0,)), {"expert_parallel": 2}, "such experts are not split over ranks"),
    "no such layer": (lambda folder: zero_slot_plan((7,)), {}, "layer 7 is not a MoE layer"),
    "another count": (
        lambda folder: Plan(layers={0: LayerPlan(experts_before=9, order=(0,))}, criterion="t", removed="zero-slot"),
        {},
        "layer 0 is for 9 experts, the model has 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    make, options, message = REFUSED[case]
    saved("qwen3_moe", tmp_path / "source")
    plan = make(tmp_path / "source")
    with pytest.raises(SecateurError, match=message):
        apply_to_model(tmp_path / "source", plan, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_family_that_runs_every_expert_is_refused_by_name(tmp_path: Path) -> None:
    llama4(nested=False).save_pretrained(tmp_path / "source")
    with pytest.raises(
        SecateurError, match=r"a 'llama4_text' model with zero slots cannot be built \(Llama4TextExpert"
    ):
        apply_to_model(tmp_path / "source", zero_slot_plan((1,)), tmp_path / "out")


def test_a_plan_for_other_zero_slots_is_refused(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    for name, order in (("one", (5, 0, 3)), ("two", (1, 2, 4))):
        apply_to_model(tmp_path / "source", zero_slot_plan((0,), (order,)), tmp_path / name)
    one, two = (model_facts(read_model_folder(tmp_path / name)) for name in ("one", "two"))
    assert one.num_experts == two.num_experts
    assert one.digest != two.digest


def test_criteria_on_a_model_with_zero_slots_read_experts_and_no_routers(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source")
    apply_to_model(tmp_path / "source", zero_slot_plan((0, 1, 2), ((5, 0, 3, 4),)), tmp_path / "out")
    source = of_folder(tmp_path / "out")
    plan = decide_plan(source, Choice(criterion="weight_norm", keep=Keep(count=1), removed="zero-slot"))
    assert {one.experts_after for one in plan.layers.values()} == {1}
    assert plan.removed == "zero-slot"
    apply_to_model(tmp_path / "out", plan, tmp_path / "again")
    with pytest.raises(SecateurError, match="criterion 'router_row_norm' does not tell their rows apart"):
        decide_plan(source, Choice(criterion="router_row_norm", keep=Keep(count=1), removed="zero-slot"))
    with pytest.raises(SecateurError, match="rows of these cannot be cut; say --removed zero-slot"):
        decide_plan(source, Choice(criterion="weight_norm", keep=Keep(count=2)))


WORKER = """
import json, sys
from pathlib import Path
sys.modules["secateur"] = None  # importing it fails from here on
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
found = {}
for name, auto in (pair.split("=") for pair in sys.argv[2:]):
    folder = Path(sys.argv[1]) / name
    data = load_file(folder / "expected.safetensors")
    def look(folder):
        options = {"trust_remote_code": True, "output_loading_info": True, "dtype": "auto"}
        model, info = getattr(transformers, auto).from_pretrained(folder, **options)
        for tensor in model.parameters():  # they lie anywhere in a mapped file, and products round by alignment
            tensor.data = tensor.data.clone()
        with torch.no_grad():
            logits = model.eval()(input_ids=data["tokens"], use_cache=False).logits
        return model, [type(model).__name__, any(info.values()), torch.equal(logits, data["logits"])]
    model, first = look(folder)
    model.save_pretrained(folder / "again")
    found[name] = [first, look(folder / "again")[1]]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_process_without_secateur_loads_the_folder_with_remote_code_and_saves_it_again(tmp_path: Path) -> None:
    autos = {"gpt_oss": "AutoModelForCausalLM", "nested": "AutoModelForImageTextToText"}
    saved("gpt_oss", tmp_path / "sources" / "gpt_oss")
    qwen3_5(tmp_path / "sources" / "nested")
    tokens = random_tokens(2, 12)
    for name in autos:
        source, out = tmp_path / "sources" / name, tmp_path / "models" / name
        found = read_model_folder(source)
        plan = zero_slot_plan(found.counts)
        apply_to_model(source, plan, out)
        model, _ = load(source, found)
        with without_dropped(model, found, plan.filled(found.all_counts)):
            logits = logits_of(model, tokens)
        save_file({"tokens": tokens, "logits": logits}, out / "expected.safetensors")
    said = in_fresh(
        WORKER,
        tmp_path / "models",
        *(f"{name}={auto}" for name, auto in autos.items()),
        environment={"HF_HOME": str(tmp_path / "hf")},
    )
    found = json.loads(said.rpartition("RESULT")[2])
    for name, kind in (
        ("gpt_oss", "PrunedGptOssForCausalLM"),
        ("nested", "PrunedQwen3_5MoeForConditionalGeneration"),
    ):
        assert found[name] == [[kind, False, True]] * 2
