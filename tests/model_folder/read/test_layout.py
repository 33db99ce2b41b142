"""Where the experts of a folder are: quantised, nested and MTP layers included; what no rule covers is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.read.config import REFUSED, read_config
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.config_json import edited_config
from support.claims import detail, fallen, not_checked
from support.long_tests import long
from support.model_folders import config_of, gathered, plan_of, same_bytes, tensors_of, write
from support.odd_folders import deepseek, llama4, on_disk, qwen3_5, with_mtp
from support.tiny_models import NUM_EXPERTS, TOP_K

PER_EXPERT = r".*layers\.(\d+)\..*experts\."
ROUTERS = ("gate.weight", "e_score_correction_bias")
PLAN = plan_of((1, [0, 2, 3, 7]), (2, [1, 2, 5, 6]))

# What quantised forms put in the place of an expert's `weight`: name -> dtype, shape
FP8 = {"weight": (torch.float8_e4m3fn, (24, 32)), "weight_scale_inv": (torch.float32, (1, 1))}
GPTQ = {
    "qweight": (torch.int32, (4, 24)),
    "qzeros": (torch.int32, (1, 3)),
    "scales": (torch.float16, (1, 24)),
    "g_idx": (torch.int32, (32,)),
}
AWQ = {"qweight": (torch.int32, (32, 3)), "qzeros": (torch.int32, (1, 3)), "scales": (torch.float16, (1, 24))}
PACKED = {
    "weight_packed": (torch.int32, (24, 4)),
    "weight_scale": (torch.bfloat16, (24, 1)),
    "weight_shape": (torch.int64, (2,)),
    "input_scale": (torch.float32, ()),
}
NVFP4 = {
    "weight": (torch.uint8, (24, 16)),
    "weight_scale": (torch.float8_e4m3fn, (24, 2)),
    "weight_scale_2": (torch.float32, ()),
}


def random(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 255, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def found(folder: Path) -> ModelFolder:
    return read_model_folder(folder)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        found(folder)


@pytest.mark.parametrize("form", [FP8, GPTQ, AWQ, PACKED, NVFP4], ids=["fp8", "gptq", "awq", "packed", "nvfp4"])
def test_quantised_tensors_of_every_expert_are_carried_along_byte_for_byte(form: Any, tmp_path: Path) -> None:
    config, tensors = deepseek(quantization_config={"quant_method": "test", "ignore": ["lm_head"]})
    quantised = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and "mlp" in module:  # the experts', the shared experts' and the dense ones
            quantised |= {f"{module}.{end}": random(*about) for end, about in form.items()}
        else:
            quantised[name] = value
    write(tmp_path / "source", config, quantised, num_files=3)
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(quantised, PLAN, PER_EXPERT, ROUTERS))
    checks = verify_model(tmp_path / "source", tmp_path / "out")
    assert (fallen(checks), not_checked(checks)) == (set(), {"loads", "logits", "speaks"})
    assert "quantised" in detail(checks, "loads")


def test_mxfp4_blocks_and_scales_follow_the_experts(tmp_path: Path) -> None:
    tensors = on_disk("gpt_oss")
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = tensors.pop(name).shape[2]
            tensors[f"{name}_blocks"] = random(torch.uint8, (NUM_EXPERTS, rows, 2, 16))
            tensors[f"{name}_scales"] = random(torch.uint8, (NUM_EXPERTS, rows, 2))
    config = config_of("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    write(tmp_path / "source", config, tensors)
    plan = plan_of(*((layer, [6, 1, 3]) for layer in range(3)))
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    rows_of = ("router.weight", "router.bias", "_blocks", "_scales", "_bias")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(tensors, plan, "never", rows_of))


@pytest.mark.parametrize(
    "nested", [pytest.param(False, id="text"), pytest.param(True, id="inside another model", marks=pytest.mark.slow)]
)
def test_llama4_is_pruned_and_passes_the_oracle(nested: bool, tmp_path: Path) -> None:
    llama4(nested).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert found(tmp_path / "source").counts == {1: 8, 3: 8}
    apply_to_model(tmp_path / "source", plan_of((1, [0, 3, 5]), (3, [2, 6, 7])), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=16)
    assert {check.passed for check in checks} == {True}, checks
    apply_to_model(tmp_path / "source", plan_of((1, [5, 3, 0]), (3, [2, 6, 7])), tmp_path / "other order")
    checks = verify_model(tmp_path / "source", tmp_path / "other order", num_tokens=16)
    assert {check.passed for check in checks} == {True}, checks


def test_experts_in_a_nested_text_model_are_pruned_with_one_count_only(tmp_path: Path) -> None:
    source = qwen3_5(tmp_path / "source")
    assert found(source).config.is_nested
    plan = plan_of(*((layer, [0, 3, 5]) for layer in range(3)))
    apply_to_model(source, plan, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after["text_config"]["num_experts"] == 3
    before["text_config"]["num_experts"] = 3
    assert after == before
    checks = verify_model(source, tmp_path / "out", num_tokens=8)
    assert {check.passed for check in checks} == {True}, checks
    with pytest.raises(SecateurError, match=r"can only have one count for all layers; the plan leaves \[3, 8\]"):
        apply_to_model(source, plan_of((0, [0, 3, 5])), tmp_path / "other")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_layers_under_another_path_are_found(prefix: str, tmp_path: Path) -> None:
    config, tensors = deepseek()
    renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    write(tmp_path / "source", config, renamed)
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(renamed, PLAN, PER_EXPERT, ROUTERS))


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.3.",
        pytest.param("mtp.layers.0.", marks=pytest.mark.slow),
        pytest.param("model.mtp.layers.0.", marks=long),
    ],
)
def test_layers_for_further_tokens_have_counts_of_their_own(prefix: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", *with_mtp(prefix))
    assert (found(source).counts, found(source).mtp_counts) == ({1: 8, 2: 8}, {3: 8})
    with pytest.raises(SecateurError, match=r"layer 3 .*would keep 8 experts, but config.json would say 4.*--mtp"):
        apply_to_model(source, PLAN, tmp_path / "none")
    with pytest.raises(SecateurError, match=r"layer 3 .* would keep 5 experts, but config.json would say 4"):
        apply_to_model(source, plan_of((1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 4])), tmp_path / "none")
    with pytest.raises(SecateurError, match=r"the plan names the layers \[3\] itself"):
        apply_to_model(source, plan_of((3, [0, 1, 2, 3])), tmp_path / "none", mtp="drop")
    with pytest.raises(SecateurError, match="--mtp both: expected whole or drop"):
        apply_to_model(source, PLAN, tmp_path / "none", mtp="both")

    tensors, begins = tensors_of(source), prefix[: -len(".")]
    main = gathered({name: value for name, value in tensors.items() if begins not in name}, PLAN, PER_EXPERT, ROUTERS)
    theirs = {name: value for name, value in tensors.items() if begins in name}

    apply_to_model(source, PLAN, tmp_path / "whole", mtp="whole")
    assert same_bytes(tensors_of(tmp_path / "whole"), main | theirs)
    apply_to_model(source, PLAN, tmp_path / "drop", mtp="drop", undo=tmp_path / "undo")
    assert same_bytes(tensors_of(tmp_path / "drop"), main)
    assert json.loads((tmp_path / "drop/config.json").read_text())["num_nextn_predict_layers"] == 0
    both = plan_of((1, [0, 2, 3, 7]), (2, [1, 2, 5, 6]), (3, [0, 1, 6, 7]))
    apply_to_model(source, both, tmp_path / "both")
    mtp_plan = plan_of((int(re.findall(r"\d+", prefix)[0]), [0, 1, 6, 7]))
    expected = main | gathered(theirs, mtp_plan, PER_EXPERT, ROUTERS)
    assert same_bytes(tensors_of(tmp_path / "both"), expected)
    for folder in ("whole", "drop", "both"):
        checks = verify_model(source, tmp_path / folder, num_tokens=0)
        assert fallen(checks) == set(), checks
        assert found(tmp_path / folder).counts == {1: 4, 2: 4}


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"])
def test_config_json_says_0_layers_for_further_tokens_once_they_are_dropped(key: str, tmp_path: Path) -> None:
    source = found(write(tmp_path / "source", *with_mtp("model.layers.3.")))
    for outer, inner in ((1, None), (None, 1), (1, 1)):
        config = {**source.files.config, key: outer, "text_config": {key: inner, "others": 1}}
        folder = replace(source, files=replace(source.files, config=config))
        for mtp, number in (("drop", 0), ("whole", 1)):
            after = edited_config(folder, PLAN.filled(folder.all_counts), mtp)
            assert after[key] == (outer and number)
            assert after["text_config"] == {key: inner and number, "others": 1}


def test_a_layer_for_further_tokens_without_its_router_is_refused(tmp_path: Path) -> None:
    config, tensors = with_mtp("mtp.layers.0.")
    write(tmp_path / "source", config, edited(tensors, r"^mtp.*mlp\.gate\.weight", None))
    refused(tmp_path / "source", r"layer 3 \(multi-token prediction\) has .*, unlike the other layers")


def test_layers_of_another_part_of_the_model_are_not_taken_for_those_of_further_tokens(tmp_path: Path) -> None:
    config, tensors = with_mtp("model.layers.3.")
    vision = {f"vision.layers.{n}.mlp.fc1.weight": torch.rand(4, 4) for n in range(6)}
    write(tmp_path / "source", config, tensors | vision)
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out", mtp="drop")
    assert {
        name: value for name, value in tensors_of(tmp_path / "out").items() if "vision" in name
    }.keys() == vision.keys()
    assert not [name for name in tensors_of(tmp_path / "out") if "model.layers.3." in name]


def test_numbers_with_gaps_are_places_as_transformers_reads_them(tmp_path: Path) -> None:
    config, tensors = deepseek()
    gaps = [0, 1, 3, 4, 7, 8, 20, 100]
    spread = {re.sub(r"experts\.(\d)\.", lambda m: f"experts.{gaps[int(m[1])]}.", name): value
              for name, value in tensors.items()}  # fmt: skip
    write(tmp_path / "source", config, spread)
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(tensors, PLAN, PER_EXPERT, ROUTERS))


def edited(tensors: dict[str, Tensor], pattern: str, new: str | None) -> dict[str, Tensor]:
    """Without the names that match, or with `new` in place of the match."""
    kept = {name: value for name, value in tensors.items() if not re.search(pattern, name)}
    moved = (
        {re.sub(pattern, new, name): value for name, value in tensors.items() if re.search(pattern, name)}
        if new
        else {}
    )
    assert len(kept) < len(tensors)
    return kept | moved


@pytest.mark.parametrize(
    ("pattern", "new", "message"),
    [
        (r"layers\.1\.mlp\.experts\.3\.", None, "layer 1: 7 experts in the files, 8 by config.json"),
        (r"layers\.1\.mlp\.experts\.3\.up_proj", None, "mlp.experts.3 has no up_proj.weight, which other experts have"),
        (r"layers\.1\.mlp\.gate\.weight", None, r"layer 1: missing are tensors of \['mlp.gate.weight'\]"),
        (r"layers\.1\.mlp\.(experts|gate)\..*", None, "layer 1: no experts in the files, 8 by config.json"),
        (
            r"(layers\.1\.mlp\.)gate\.weight",
            r"\1router.weight",
            r"router.weight: 1 names sound like.*in \S+\.safetensors",
        ),
        (r"layers\.1\.mlp\.experts\.3\.", "layers.0.mlp.experts.3.", "layer 0: missing are tensors of"),
        (r"layers\.2\.(mlp\.(experts|gate))", r"blocks.2.\1", "model.blocks.2.mlp.* names sound like"),
        (r"^model\.layers\.2\.mlp", "other.layers.2.mlp", "MoE layers under several paths: model.* other"),
        (r"experts\.(\d)\.", r"specialists.\1.", "no tensor has a name that experts of this family have"),
        (r"experts\.1\.", "experts.01.", "mlp.experts.01.down_proj.weight, .* names sound like those of experts"),
        (r"layers\.2\.mlp", "layers.1.ffn", "names sound like those of experts"),
    ],
)
def test_names_that_no_rule_covers_are_refused(pattern: str, new: str | None, message: str, tmp_path: Path) -> None:
    config, tensors = deepseek()
    write(tmp_path / "source", config, edited(tensors, pattern, new))
    refused(tmp_path / "source", message)


def test_two_layouts_at_once_are_refused(tmp_path: Path) -> None:
    config, tensors = deepseek()
    live = {f"model.layers.2.mlp.experts.{name}": torch.rand(8, 4, 4) for name in ("gate_up_proj", "down_proj")}
    write(tmp_path / "source", config, tensors | live)
    refused(tmp_path / "source", "two layouts at once: .*as transformers saves it.*live names")


def test_a_tensor_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    config, tensors = deepseek()
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    write(tmp_path / "source", config, tensors | {name: torch.rand(9)})
    refused(tmp_path / "source", f"{name}: axis 0 .* has 9 entries, expected 8")


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_without_a_rule_are_refused_by_name_with_the_reason(model_type: str) -> None:
    with pytest.raises(SecateurError, match=f"'{model_type}' is not supported: {re.escape(REFUSED[model_type])}"):
        read_config({"model_type": model_type, "architectures": ["X"], "num_experts": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": None, "num_local_experts": None}, "it has no count of routed experts"),
        ({"n_routed_experts": 6}, "layer 1: 8 experts in the files, 6 by config.json"),
        ({"n_routed_experts": "8", "num_local_experts": "8"}, "it has no count of routed experts"),
        ({"model_type": 3}, "model_type is 3, expected a name"),
        ({"architectures": None}, "architectures is None, expected one class"),
        ({"architectures": ["DeepseekV3ForCausalLM"] * 2}, "expected one class"),
        ({"architectures": ["NoSuchModel"]}, "'NoSuchModel' is no model class of transformers"),
        ({"architectures": ["AutoModel"]}, "'AutoModel' is no model class of transformers"),
        ({"num_experts_per_tok": 0}, "does not say how many experts a token goes to"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, expected at most 256, as the tensors are of 3",
        ),
        ({"num_hidden_layers": 4, "mlp_layer_types": None}, "layer 3: no experts in the files, 8 by config.json"),
        ({"hidden_size": "wide"}, "transformers cannot build this 'deepseek_v3'"),
    ],
)
def test_a_config_that_says_too_little_or_something_else_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, tensors = deepseek()
    config = {key: value for key, value in (config | change).items() if value is not None or key not in change}
    if change.get("architectures", 0) is None:
        config["architectures"] = None
    write(tmp_path / "source", config, tensors)
    refused(tmp_path / "source", message)


def test_top_k_may_be_a_list_and_the_most_of_it_is_kept() -> None:
    config = config_of("hunyuan_v1_moe")
    assert read_config(config).min_experts == TOP_K
    assert read_config(config | {"moe_topk": [2, 4, 2]}).min_experts == 4
