"""Names of training checkpoints: what has an expert axis, and that nothing with one is overlooked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.surgery.optimizer import OPTIMIZER_RULES
from secateur.training_checkpoint.changes import LIKE_PARAMETER_KEYS, survey
from secateur.training_checkpoint.names import NAMINGS, TORCHTITAN, TRANSFORMERS, find_naming, understand
from secateur.training_checkpoint.names_file import read_naming
from secateur.training_checkpoint.stored import StoredBytes, StoredCheckpoint, StoredTensor
from support.tiny_models import FAMILIES, NUM_EXPERTS, every_family, tiny_config

E = NUM_EXPERTS
BLOCK = "model.layers.0.mlp"
MODEL = {
    f"{BLOCK}.gate.weight": (E, 4),
    f"{BLOCK}.experts.gate_up_proj": (E, 6, 4),
    f"{BLOCK}.experts.down_proj": (E, 4, 3),
    f"{BLOCK}.shared_expert.up_proj.weight": (3, 4),
    "model.layers.1.mlp.gate_proj.weight": (8, 4),
    "model.embed_tokens.weight": (8, 4),
}
PLAN = Plan(layers={0: LayerPlan(experts_before=E, order=(1, 0, 5))}, criterion="test")


def stored(shapes: dict[str, tuple[int, ...]], blobs: Iterable[str] = ()) -> StoredCheckpoint:
    """A description without files."""
    tensors = {n: StoredTensor(name=n, dtype=torch.float32, shape=s, chunks=()) for n, s in shapes.items()}
    return StoredCheckpoint(
        tensors=tensors, blobs={n: StoredBytes(path=Path("x"), start=0, length=1) for n in blobs}, files=frozenset()
    )


def state(keys: dict[str, tuple[int, ...]], name: str = f"{BLOCK}.experts.down_proj") -> dict[str, tuple[int, ...]]:
    return {f"optimizer.state.{name}.{key}": shape for key, shape in keys.items()}


@every_family
def test_the_names_of_transformers_give_the_axes_that_the_model_classes_build(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    axes = {spec.name: spec for block in describe_moe(model).blocks.values() for spec in block.tensors}
    entries = model.state_dict()
    if name == "gemma4_text":  # a layer has its experts beside all else, so a file has to name them
        with pytest.raises(SecateurError, match=r"the names fit none .* give it to --names"):
            find_naming(entries)
        return
    assert find_naming(entries) is TRANSFORMERS
    for key in entries:
        entry = understand(TRANSFORMERS, key)
        assert entry is not None, key
        assert (entry.role is not None) == (key in axes), key
        if key in axes:
            axis = axes[key].axis
            assert (entry.named.axis.dim, not entry.named.rows_known) == (axis.dim, axis.rows_per_expert > 1), key
    shapes = {key: tuple(tensor.shape) for key, tensor in entries.items()}
    layers = FAMILIES[name].layers
    plan = Plan(layers={layers[0]: LayerPlan(experts_before=E, order=(2, 0, 1, 6))}, criterion="test")
    if FAMILIES[name].trailing:  # rows of shared experts in the router, which no name shows
        with pytest.raises(SecateurError, match=r"different numbers of experts: 10 in .*gate\.weight, 8 in"):
            survey(stored(shapes), TRANSFORMERS, plan)
        return
    found = survey(stored(shapes), TRANSFORMERS, plan)
    assert found.counts == dict.fromkeys(layers, E)
    changed = {key: change.spec for key, change in found.changes.items()}
    assert changed == {key: spec for key, spec in axes.items() if key.split(".")[2] == str(layers[0])}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.3.moe.routed_experts.inner_experts.w2_EDF", "expert"),
        ("layers.3.moe.experts.w1", "expert"),
        ("layers.3.moe.experts.mlp1_bias", "expert"),
        ("layers.3.moe.router.gate.weight", "router"),
        ("layers.3.moe.expert_bias_E", "router"),
        ("layers.3.moe.tokens_per_expert", "counter"),
        ("optimizer.state.layers.3.moe.experts.w1_EFD.exp_avg", "expert"),
        ("state.layers.3.moe.experts.w1_EFD.exp_avg", "expert"),
    ],
)
def test_the_names_of_torchtitan(name: str, role: str) -> None:
    entry = understand(TORCHTITAN, name)
    assert entry is not None
    assert (entry.layer, entry.role) == (3, role)


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.moe.experts.w4",
        "layers.3.moe.router.noise.weight",
        "layers.3.moe.experts._extra_state",
        "layers.3.block.experts.w1",
        "optimizer.state.layers.3.moe.experts.w1.shampoo.left",
    ],
)
def test_a_name_that_sounds_like_an_expert_but_has_no_rule_is_an_error_that_names_it(name: str) -> None:
    assert understand(TORCHTITAN, name) is None
    with pytest.raises(SecateurError, match=name):
        survey(stored({"layers.3.moe.experts.w1": (E, 2), name: (E, 2)}), TORCHTITAN, PLAN)


def test_an_unnamed_engine_is_an_error_and_a_checkpoint_without_experts_is_none() -> None:
    with pytest.raises(SecateurError, match=r"fit none of transformers, torchtitan.*blocks\.0\.router"):
        find_naming(["blocks.0.router.weight", "blocks.0.norm"])
    assert find_naming(["model.layers.0.mlp.gate_proj.weight", "lr_scheduler.last_epoch"]) is None
    with pytest.raises(SecateurError, match="say which with --names"):
        find_naming(["layers.0.mlp.experts.down_proj", "layers.0.moe.experts.w1"])


def test_layers_that_only_share_their_numbers_are_not_mixed_up() -> None:
    second = {name.replace("model.", "draft."): shape for name, shape in MODEL.items()}
    with pytest.raises(SecateurError, match=r"under several paths: model\.layers\.0.*draft\.layers\.0"):
        survey(stored(MODEL | second), TRANSFORMERS, PLAN)
    twice = MODEL | {"model.layers.0.feed_forward.experts.down_proj": (E, 4, 3)}
    with pytest.raises(SecateurError, match="are the same tensor of layer 0"):
        survey(stored(twice), TRANSFORMERS, PLAN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{BLOCK}.gate.weight": (E + 1, 4)}, "layer 0: its tensors hold different numbers of experts: 9 in .*, 8 in"),
        ({f"{BLOCK}.gate.weight": ()}, r"shape \(\), expected experts of 1 rows each on axis 0"),
        (
            {f"{BLOCK}.stacked": (E, 4)},
            "mlp.stacked: no rule of the naming 'transformers' covers it, though it is a part",
        ),
        ({f"{BLOCK}.gate.weight": None}, "layer 0: the model has no router tensor"),
        (
            {f"{BLOCK}.experts.{n}": None for n in ("gate_up_proj", "down_proj")},
            "layer 0: the model has no expert tensor",
        ),
        (state({"exp_avg": (E, 4, 3), "surprise": (E, 4, 3)}), r"\['exp_avg', 'surprise'\].*none of the optimizers"),
        (state({"exp_avg": (E, 4, 3), "square_avg": (E, 4, 3)}), "none of the optimizers"),
        (state({"exp_avg": (E, 4, 4)}), r"shape \(8, 4, 4\), expected \(8, 4, 3\)"),
        (state({"exp_avg": (E, 4, 3), "step": (E,)}), "expected one number"),
        (state({"exp_avg": (E, 4, 3)}, "7"), "the optimizer's state is numbered"),
        ({f"optimizer.param_groups.{BLOCK}.gate.weight.ns_steps": ()}, "updated by Muon"),
        ({f"optimizer.param_groups.{BLOCK}.gate.weight.lr": (E,)}, "expected a number"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    shapes = {name: shape for name, shape in (MODEL | changes).items() if shape is not None}
    with pytest.raises(SecateurError, match=message):
        survey(stored(shapes), TRANSFORMERS, PLAN)


@pytest.mark.parametrize("name", [f"{BLOCK}.gate.weight", f"optimizer.state.{BLOCK}.gate.weight.exp_avg"])
def test_an_expert_tensor_stored_as_opaque_bytes_is_refused(name: str) -> None:
    shapes = {key: shape for key, shape in MODEL.items() if key != name} | {f"{BLOCK}.gate.bias": (E,)}
    with pytest.raises(SecateurError, match="stored as opaque bytes"):
        survey(stored(shapes, blobs=[name]), TRANSFORMERS, PLAN)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({3: LayerPlan(experts_before=E, order=(0,))}, r"layer 3 is not a MoE layer; MoE layers are \[0\]"),
        ({0: LayerPlan(experts_before=4, order=(0,))}, "layer 0 is for 4 experts, the checkpoint has 8"),
    ],
)
def test_a_plan_of_another_model_is_refused(layers: dict[int, LayerPlan], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        survey(stored(MODEL), TRANSFORMERS, Plan(layers=layers, criterion="test"))


def test_factored_states_follow_by_their_rule_never_by_their_shape() -> None:
    """Adafactor of a (8, 8, 8) parameter: each axis could be the experts'."""
    name = f"{BLOCK}.experts.down_proj"
    shapes = MODEL | {name: (E, E, E)} | state({"row_var": (E, E, 1), "col_var": (E, 1, E), "step": ()})
    changes = survey(stored(shapes), TRANSFORMERS, PLAN).changes
    assert {key.rpartition(".")[2]: change.spec.axis.dim for key, change in changes.items() if "optimizer" in key} == {
        "row_var": 0,
        "col_var": 0,
    }
    router = f"{BLOCK}.gate.weight"
    shapes = MODEL | {router: (E, E)} | state({"row_var": (E, 1), "col_var": (1, E), "step": ()}, router)
    changes = survey(stored(shapes), TRANSFORMERS, PLAN).changes
    assert f"optimizer.state.{router}.row_var" in changes
    assert f"optimizer.state.{router}.col_var" not in changes  # a mean over all experts


def test_an_optimizer_alone_takes_the_shape_from_the_states_that_have_it() -> None:
    name = f"{BLOCK}.experts.down_proj"
    whole = state({"exp_avg": (E, 4, 3), "exp_avg_sq": (E, 4, 3), "step": ()})
    assert survey(stored(whole), TRANSFORMERS, PLAN).changes.keys() == whole.keys() - {f"optimizer.state.{name}.step"}
    factored = state({"row_var": (E, 4, 1), "col_var": (E, 1, 3), "step": ()})
    router = state({"exp_avg": (E, 4)}, f"{BLOCK}.gate.weight")
    with pytest.raises(SecateurError, match="neither the parameter nor a state of its shape"):
        survey(stored(factored | router), TRANSFORMERS, PLAN)


def test_no_two_optimizers_give_a_state_of_one_name_different_shapes() -> None:
    """Else a checkpoint, which does not name the optimizer's class, could not say which rule to use."""
    probe = (5, 7, 11)
    found: dict[str, set[object]] = {}
    for rules in OPTIMIZER_RULES.values():
        for key, rule in rules.items():
            found.setdefault(key, set()).add(rule.layout and rule.layout(probe, 0))
    assert all(len(shapes) == 1 for shapes in found.values())
    assert {"exp_avg", "exp_avg_sq", "momentum_buffer", "variance"} <= LIKE_PARAMETER_KEYS
    assert not {"step", "row_var", "exp_avg_sq_col"} & LIKE_PARAMETER_KEYS


ENGINE: dict[str, Any] = {
    "format": "secateur-names",
    "version": 1,
    "blocks": ["model.blocks.{layer}.feed_forward_moe"],
    "routers": {"router.weight": {"rows": None}, "router.score_bias": {}},
    "experts": {"experts.mlp.w1": {"rows": 5}, "experts.bias": {"dim": 1, "num_trailing": 2}},
    "counters": ["router.batch_size_per_expert"],
    "whole": ["shared_mlp.*"],
    "outside": ["train.expert_notes"],
    "optimizer": ["optim.state.{name}.{key}"],
    "settings": ["optim.param_groups.{name}.{key}"],
}


def test_another_engine_is_described_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(ENGINE))
    block = "model.blocks.4.feed_forward_moe"
    shapes = {
        f"{block}.router.weight": (E * 3,),
        f"{block}.router.score_bias": (E,),
        f"{block}.router.batch_size_per_expert": (E,),
        f"{block}.experts.mlp.w1": (E * 5, 2),
        f"{block}.experts.bias": (3, E + 2),
        f"{block}.shared_mlp.w1": (E, 2),
        "train.expert_notes": (E,),
        f"optim.state.{block}.experts.mlp.w1.exp_avg": (E * 5, 2),
    }
    plan = Plan(layers={4: LayerPlan(experts_before=E, order=(3, 4))}, criterion="test")
    changes = survey(stored(shapes), read_naming(path), plan).changes
    assert {name.removeprefix(f"{block}."): (*astuple(c.spec.axis), c.to_zero) for name, c in changes.items()} == {
        "router.weight": (0, 3, 0, False),
        "router.score_bias": (0, 1, 0, False),
        "router.batch_size_per_expert": (0, 1, 0, True),
        "experts.mlp.w1": (0, 5, 0, False),
        "experts.bias": (1, 1, 2, False),
        f"optim.state.{block}.experts.mlp.w1.exp_avg": (0, 5, 0, False),
    }
    with pytest.raises(SecateurError, match="expected experts of 5 rows each on axis 0"):
        survey(stored(shapes | {f"{block}.experts.mlp.w1": (E * 5 + 1, 2)}), read_naming(path), plan)
    with pytest.raises(SecateurError, match=r"router\.weight: axis 0 .* has 25 entries, expected 24"):
        survey(stored(shapes | {f"{block}.router.weight": (E * 3 + 1,)}), read_naming(path), plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'version' is 2, expected 1"),
        ({"blocks": ["layers.{number}.moe"]}, r"has \['number'\]"),
        ({"blocks": ["{layer}.{layer}.moe"]}, r"'\{layer\}\.\{layer\}\.moe': redefinition of group name"),
        ({"blocks": ["layers.moe"]}, r"has the placeholders \[\], expected \['layer'\]"),
        ({"optimizer": ["optim.{name}"]}, "expected .*key.*name"),
        ({"blocks": "layers.{layer}.moe"}, "'blocks' is 'layers.*', expected a list"),
        ({"experts": {"w1": {"dim": -1}}}, "'experts.w1.dim' is -1, expected a whole number of at least 0"),
        ({"experts": {"w1": {"rows": 0}}}, "'experts.w1.rows' is 0, expected a whole number above 0 or null"),
        ({"experts": {"w1": {"axis": 0}}}, "'experts.w1.axis' is unknown, expected dim, rows, num_trailing"),
        ({"experts": {"w1": 0}}, "names file .*'experts.w1' is 0, expected an object"),
        ({"experts": []}, "names file .*'experts' is .*, expected an object"),
        ({"surprise": []}, "'surprise' is unknown"),
    ],
)
def test_a_names_file_with_a_mistake_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(ENGINE | changes))
    with pytest.raises(SecateurError, match=message):
        read_naming(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "secateur-names", "version": 1}', "\x00"])
def test_what_is_no_names_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(SecateurError, match="names file"):
        read_naming(tmp_path / "engine.json")
    with pytest.raises(SecateurError, match="cannot be read"):
        read_naming(tmp_path / "missing.json")


def test_the_names_file_of_the_documents_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/engines.md").read_text(encoding="utf-8")
    (tmp_path / "olmo.json").write_text(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    naming = read_naming(tmp_path / "olmo.json")
    block = "blocks.1.feed_forward_moe"
    shapes = {f"model.{block}.router.weight": (E * 2048,), f"model.{block}.experts.mlp.w2": (E * 1024, 3)}
    shapes |= {
        f"optim.state.{block}.experts.mlp.w2.exp_avg": (E * 1024, 3),
        f"model.{block}.shared_mlp.w1.weight": (3,),
    }
    plan = Plan(layers={1: LayerPlan(experts_before=E, order=(4, 2))}, criterion="test")
    changes = survey(stored(shapes), naming, plan).changes
    assert {name: change.spec.axis.rows_per_expert for name, change in changes.items()} == {
        f"model.{block}.router.weight": 2048,
        f"model.{block}.experts.mlp.w2": 1024,
        f"optim.state.{block}.experts.mlp.w2.exp_avg": 1024,
    }


def test_the_namings_have_their_own_names() -> None:
    assert list(NAMINGS) == ["transformers", "torchtitan"]
