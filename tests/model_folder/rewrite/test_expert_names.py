"""Names and patterns by which a quantisation speaks of single experts, before and after a pruning."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.rewrite import expert_names
from secateur.model_folder.rewrite.config_json import edited_config
from secateur.model_folder.rewrite.expert_names import ExpertNames, renamed
from secateur.model_folder.rewrite.patterns import matcher
from secateur.plans import Plan
from support.model_folders import config_of, plan_of, write
from support.odd_folders import deepseek, on_disk, qwen3_5

ONE, TWO = [0, 3, 4, 6], [1, 2, 3, 7]  # experts that layers 1 and 2 keep, of 8
STEM = "model.layers.{}.mlp.experts.{}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, Plan]:
    folder = read_model_folder(write(tmp_path_factory.mktemp("names") / "source", *deepseek()))
    return folder, plan_of((1, ONE), (2, TWO)).filled(folder.all_counts)


def every(layers: dict[int, list[int]], *tails: str) -> list[str]:
    return [f"{STEM.format(layer, expert)}.{tail}" for layer in layers for expert in layers[layer] for tail in tails]


PROJECTIONS = ("down_proj", "gate_proj", "up_proj")
NOW: dict[str, list[str]] = {
    "Linear": ["Linear"],
    "lm_head": ["lm_head"],
    "model.layers.1.mlp.gate": ["model.layers.1.mlp.gate"],
    "model.layers.0.mlp.down_proj": ["model.layers.0.mlp.down_proj"],
    STEM.format(1, 3): [STEM.format(1, 1)],
    STEM.format(2, 7) + ".up_proj": [STEM.format(2, 3) + ".up_proj"],
    STEM.format(2, 7) + ".up_proj.weight": [STEM.format(2, 3) + ".up_proj.weight"],
    "language_model." + STEM.format(2, 7): ["language_model." + STEM.format(2, 3)],  # as another engine calls it
    STEM.format(1, 1): [],
    STEM.format(9, 3): [STEM.format(9, 3)],  # a layer that the model does not have
    r"re:.*mlp\.experts\.[0-9]+\.up_proj": [r"re:.*mlp\.experts\.[0-9]+\.up_proj"],
    "re:.*self_attn.*": ["re:.*self_attn.*"],
    "model.layers.*.mlp.experts.*.down_proj": ["model.layers.*.mlp.experts.*.down_proj"],
    r"re:.*experts\.3\..*": every({1: [1], 2: [2]}, *PROJECTIONS),
    r"re:.*experts\.(0|7)\.up_proj": [*every({1: [0]}, "up_proj"), *every({2: [3]}, "up_proj")],
    r"re:.*layers\.1\..*experts\.[5-9]\.up_proj$": every({1: [3]}, "up_proj"),
    r"re:.*mlp\.experts\.(?!0\.).*up_proj": every({1: [1, 2, 3], 2: [0, 1, 2, 3]}, "up_proj"),
    "*.experts.5*": [],
    "*.experts.[67].gate_proj": [*every({1: [3]}, "gate_proj"), *every({2: [3]}, "gate_proj")],
    r"re:.*(layers\.1\..*experts\.3\.up_proj|kv_b_proj)": [
        *every({1: [1]}, "up_proj"), *(f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(3)),
    ],
    r"-:.*experts\.1\.up_proj": [r"-:model\.layers\.2\.mlp\.experts\.0\.up_proj$"],
}  # fmt: skip


@pytest.mark.parametrize("text", NOW)
def test_an_entry_speaks_of_the_same_experts_as_before(text: str, found: tuple[ModelFolder, Plan]) -> None:
    assert ExpertNames(*found).now(text) == NOW[text]


def test_what_an_entry_matches_afterwards_is_what_it_matched_of_the_kept_experts(
    found: tuple[ModelFolder, Plan],
) -> None:
    def matched(entries: list[str], name: str) -> bool:
        """By the rules of compressed-tensors and ModelOpt, written down anew."""
        return any(
            re.match(one[3:], name) is not None
            if one.startswith("re:")
            else one == name or fnmatch.fnmatchcase(name, one)
            for one in entries
        )

    names = ExpertNames(*found)
    for text in (one for one in NOW if not one.startswith("-:")):
        for layer, order in ((1, ONE), (2, TWO)):
            for new, old in enumerate(order):
                for tail in PROJECTIONS:
                    before, after = (f"{STEM.format(layer, expert)}.{tail}" for expert in (old, new))
                    assert matched(names.now(text), after) == matched([text], before), (text, before, after)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts.3.up_proj", "'experts.3.up_proj' names single experts, whose numbers change, and no rule"),
        (r"re:.*vision.*experts\.3\..*", "sounds like single experts, but matches none of this model"),
        (r"re:((a+)+b)*experts\.3", "a regular expression whose search may take too long; it names single experts"),
        (r"re:.*.*.*.*.*.*.*experts\.3", "a regular expression whose search may take too long"),
        (r"re:experts\.3(", "no regular expression"),
        (r"re:experts\.3" + "x" * 3000, "a pattern of 3010 letters, expected at most 2000"),
    ],
)
def test_what_no_rule_can_say_is_refused_by_name(text: str, message: str, found: tuple[ModelFolder, Plan]) -> None:
    with pytest.raises(SecateurError, match=re.escape(message)):
        ExpertNames(*found).now(text)


def test_patterns_that_take_long_are_left_alone_where_they_name_no_expert(found: tuple[ModelFolder, Plan]) -> None:
    assert ExpertNames(*found).now("re:(a+)+$") == ["re:(a+)+$"]
    assert matcher(r"re:(?:model\.)?layers\.[0-9]+\.(mlp|self_attn)\..*proj", 60)("layers.12.mlp.up_proj")


def test_all_patterns_of_a_file_together_take_a_bounded_time(
    found: tuple[ModelFolder, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_names, "SECONDS", 0)
    with pytest.raises(SecateurError, match=r"a pattern whose search takes more than 0 s; it names single experts"):
        ExpertNames(*found).now(r"re:.*experts\.3\..*")


def test_settings_of_every_tool_are_rewritten_where_they_list_names(found: tuple[ModelFolder, Plan]) -> None:
    folder, plan = found
    before: dict[str, Any] = {
        "config_groups": {"group_0": {"targets": ["Linear", STEM.format(1, 3)], "weights": {"num_bits": 4}}},
        "dynamic": {r"-:.*experts\.1\.up_proj": {}, r"+:.*experts\..*": {"bits": 8}},
        "extra_config": {f"{STEM.format(1, 6)}.up_proj": {"bits": 16}, f"{STEM.format(1, 5)}.up_proj": {"bits": 8}},
        "modules_in_block_to_quantize": [["self_attn.o_proj"], [f"mlp.experts.{one}.up_proj" for one in range(8)]],
        "ignore": None,
    }
    after = renamed(before, ExpertNames(folder, plan), "here")
    assert after == {
        "config_groups": {"group_0": {"targets": ["Linear", STEM.format(1, 1)], "weights": {"num_bits": 4}}},
        "dynamic": {r"-:model\.layers\.2\.mlp\.experts\.0\.up_proj$": {}, r"+:.*experts\..*": {"bits": 8}},
        "extra_config": {f"{STEM.format(1, 3)}.up_proj": {"bits": 16}},
        "modules_in_block_to_quantize": [["self_attn.o_proj"], [f"mlp.experts.{one}.up_proj" for one in range(4)]],
        "ignore": None,
    }
    refused: list[tuple[Any, str]] = [
        ({"x": {"block": ["mlp.experts.3.up_proj"]}}, "here: 'mlp.experts.3.up_proj' names one expert in every layer"),
        ({"only": STEM.format(1, 3)}, "names single experts, and only takes one name"),
        ({f"{STEM.format(1, 3)}.up_proj": 1, r"re:.*experts\.3.*": 2}, "and another entry both speak of"),
    ]
    for value, message in refused:
        with pytest.raises(SecateurError, match=message):
            renamed(value, ExpertNames(folder, plan), "here")


def test_settings_in_the_config_of_a_text_model_are_rewritten_too(tmp_path: Path) -> None:
    source = qwen3_5(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    stem = "model.language_model.layers.1.mlp.experts"
    config["text_config"]["quantization_config"] = {"quant_method": "test", "ignore": [f"{stem}.3.up_proj"]}
    (source / "config.json").write_text(json.dumps(config))
    folder = read_model_folder(source)
    assert folder.files.quantisation == "test"
    plan = plan_of(*((layer, ONE) for layer in range(3))).filled(folder.all_counts)
    settings = edited_config(folder, plan, None)["text_config"]["quantization_config"]
    assert settings == {"quant_method": "test", "ignore": [f"{stem}.1.up_proj"]}


def test_experts_in_one_tensor_have_no_numbers_that_a_rule_could_change(tmp_path: Path) -> None:
    listed = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts.3"]}
    folder = read_model_folder(
        write(tmp_path / "source", config_of("gpt_oss", quantization_config=listed), on_disk("gpt_oss"))
    )
    with pytest.raises(SecateurError, match=r"config.json: quantization_config: .*names single experts"):
        edited_config(folder, plan_of((1, ONE)).filled(folder.all_counts), None)
