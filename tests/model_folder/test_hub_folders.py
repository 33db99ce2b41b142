"""Checkpoints as the hub has them, from `inspect` to a result that `verify` finds right, or to a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError
from secateur.finetuning.model import kept_files
from secateur.model_folder.checks.check import Check
from secateur.model_folder.measure.on_text import TextObservation
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.modeling_secateur import class_named
from secateur.plans import LayerPlan
from support.hub_folders import (
    gemma_4,
    glm_4_5,
    glm_two_names,
    hunyuan_a13b,
    in_hub_cache,
    kimi_k2,
    mixtral,
    modelopt,
    phi_3_5_moe,
    pruned_elsewhere,
    trainer_checkpoint,
    with_company,
    with_files,
)
from support.long_tests import long
from support.model_folders import contents, tensors_of
from support.streamed_runs import random_data

WAYS: dict[str, tuple[Callable[[Path], Path], str]] = {  # and what `inspect` says of the class
    "kimi_k2": (kimi_k2, "transformers does not know the model type 'kimi_k2'; read by its architecture, Deepseek"),
    "phimoe": (phi_3_5_moe, "transformers calls the class 'PhiMoEForCausalLM' PhimoeForCausalLM"),
    "gemma4": (gemma_4, ""),
    "glm4_moe": (glm_two_names, ""),
    "hunyuan_v1_moe": (hunyuan_a13b, ""),
}


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def pruned(source: Path, out: Path, *, tokens: int = 0, **options: Any) -> Sequence[Check]:
    """By a criterion without data; the checks, which are of bytes alone without `tokens`."""
    return secateur.prune(
        source, out, **{"keep": 5, "criterion": "random", "verify_tokens": tokens, **options}
    ).checks  # a check that fails is an error


def restored(out: Path, undo: Path, source: Path) -> bool:
    again = out.parent / "again"
    secateur.apply(out, undo, again)
    return contents(again) == contents(source)


@pytest.mark.parametrize("name", WAYS)
def test_it_is_said_how_a_published_folder_is_read(name: str, tmp_path: Path) -> None:
    make, read_as = WAYS[name]
    inspected = secateur.inspect(make(tmp_path / "source")).to_json()
    assert inspected["read_as"].startswith(read_as)
    assert bool(read_as) == bool(inspected["read_as"])
    assert (inspected["model_type"], inspected["top_k"], set(inspected["experts"].values())) == (name, 2, {8})


# Others are pruned and verified below: their classes in layers that differ, their configs where those change.
@pytest.mark.parametrize(
    "name", [name if name in ("kimi_k2", "gemma4") else pytest.param(name, marks=long) for name in WAYS]
)
def test_a_published_folder_is_observed_planned_pruned_and_verified(name: str, tmp_path: Path) -> None:
    source = WAYS[name][0](tmp_path / "source")
    TextObservation(read_model_folder(source), random_data(), tmp_path / "stats.safetensors").observe()
    secateur.plan(tmp_path / "stats.safetensors", tmp_path / "plan.json", criterion="reap", keep=5)
    secateur.apply(source, tmp_path / "plan.json", tmp_path / "out", undo=tmp_path / "undo")
    checks = secateur.verify(source, tmp_path / "out").checks
    assert [check.passed for check in checks] == [True] * len(checks), checks
    assert restored(tmp_path / "out", tmp_path / "undo", source)


def test_the_code_that_a_result_loads_by_is_the_one_of_its_source(tmp_path: Path) -> None:
    source = kimi_k2(tmp_path / "source")
    pruned(source, tmp_path / "out")
    assert config_in(tmp_path / "out") == config_in(source) | {"n_routed_experts": 5}
    for name in ("configuration_deepseek.py", "modeling_deepseek.py", "tokenization_kimi.py", "tiktoken.model"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("make", "base", "architecture"),
    [
        (kimi_k2, "deepseek_v3", "DeepseekV3"),
        pytest.param(phi_3_5_moe, "phimoe", "Phimoe", marks=pytest.mark.slow),
        pytest.param(hunyuan_a13b, "hunyuan_v1_moe", "HunYuanMoEV1", marks=pytest.mark.slow),
    ],
)
def test_layers_that_differ_are_of_the_class_that_reads_the_source(
    make: Callable[[Path], Path], base: str, architecture: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "source")
    counts = {layer: 6 - layer for layer in secateur.inspect(source).experts}
    keep = ",".join(f"{layer}:{count}" for layer, count in counts.items())
    assert all(check.passed for check in pruned(source, tmp_path / "out", tokens=8, keep=keep))
    config = config_in(tmp_path / "out")
    assert config["base_model_type"] == base
    assert config["architectures"] == [f"Pruned{architecture}ForCausalLM"]
    assert secateur.inspect(tmp_path / "out").experts == counts


def test_quantised_experts_of_an_unknown_model_type_are_compared_as_bytes(tmp_path: Path) -> None:
    source = kimi_k2(tmp_path / "source", fp8=True)
    assert secateur.inspect(source).to_json()["quantisation"] == "fp8"
    checks = pruned(source, tmp_path / "out", tokens=8)
    assert [check.passed for check in checks if "logits" in check.claim] == [None]
    assert {name.rpartition(".")[2] for name in tensors_of(tmp_path / "out")} >= {"weight", "weight_scale_inv"}


def test_what_no_class_reads_is_refused_with_that_reason(tmp_path: Path) -> None:
    source = kimi_k2(tmp_path / "source")
    config = config_in(source)
    with_files(source, config__json=config | {"architectures": ["MoonshotForCausalLM"]})
    with pytest.raises(
        SecateurError,
        match=r"'MoonshotForCausalLM' is no model class of .*, which does not know the model type either; code that",
    ):
        secateur.inspect(source)
    with_files(source, config__json=config | {"model_type": "deepseek_v3", "architectures": ["MoonshotForCausalLM"]})
    with pytest.raises(SecateurError, match=r"'MoonshotForCausalLM' is no model class of transformers [0-9.]+; code"):
        secateur.inspect(source)


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        ("MixtralForCausalLM", "MixtralForCausalLM"),
    ],
)
def test_a_class_is_found_by_its_published_name(published: str, name: str) -> None:
    assert class_named(published).__name__ == name


def test_two_names_of_one_count_change_together_and_must_agree(tmp_path: Path) -> None:
    pruned(glm_two_names(tmp_path / "source"), tmp_path / "out")
    config = config_in(tmp_path / "out")
    assert (config["n_routed_experts"], config["num_experts"]) == (5, 5)
    with pytest.raises(SecateurError, match=r"it says 16 \(num_experts\) and 8 \(n_routed_experts\) for the number"):
        secateur.inspect(glm_two_names(tmp_path / "other", 16))


def test_lists_by_layer_stay_lists(tmp_path: Path) -> None:
    source = hunyuan_a13b(tmp_path / "source")
    assert secateur.inspect(source).to_json()["shared_experts"] == 1
    pruned(source, tmp_path / "out")
    assert config_in(tmp_path / "out") == config_in(source) | {"num_experts": [5, 5, 5]}
    with_files(source, config__json=config_in(source) | {"num_experts": [8, 8, 16]})
    with pytest.raises(SecateurError, match=r"it says 8 \(num_experts\) and 16 \(num_experts\) for the number"):
        secateur.inspect(source)


def test_files_are_taken_at_their_word_where_config_json_was_not_updated(tmp_path: Path) -> None:
    source = pruned_elsewhere(tmp_path / "source")
    with pytest.raises(
        SecateurError, match=r"layer 0: 4 experts in the files, 8 by config.json; what pruned them did "
    ):
        secateur.inspect(source)
    with pytest.raises(SecateurError, match="--experts-from weights: expected config or files"):
        secateur.inspect(source, experts_from="weights")  # type: ignore[arg-type]
    assert secateur.inspect(source, experts_from="files").experts == {0: 4, 1: 4, 2: 4}
    options = {"keep": 3, "criterion": "aimer", "experts_from": "files", "undo": tmp_path / "undo"}
    assert all(check.passed for check in pruned(source, tmp_path / "out", tokens=8, **options))
    assert secateur.verify(source, tmp_path / "out", tokens=0).passed
    assert config_in(tmp_path / "out")["text_config"]["num_experts"] == 3
    assert restored(tmp_path / "out", tmp_path / "undo", source)
    planned = secateur.plan(source, criterion="aimer", keep=4, experts_from="files")  # all of them: config.json alone
    secateur.apply(source, planned, tmp_path / "right", experts_from="files")
    assert secateur.inspect(tmp_path / "right").experts == {0: 4, 1: 4, 2: 4}


@pytest.mark.slow
def test_layers_that_another_tool_cut_to_different_counts_get_a_config_of_their_own(tmp_path: Path) -> None:
    whole = kimi_k2(tmp_path / "whole")
    pruned(whole, tmp_path / "source", keep="1:6,2:4")
    with_files(tmp_path / "source", config__json=config_in(whole))
    assert secateur.inspect(tmp_path / "source", experts_from="files").experts == {1: 6, 2: 4}
    checks = pruned(tmp_path / "source", tmp_path / "out", tokens=8, keep="1:5,2:3", experts_from="files")
    assert all(check.passed for check in checks)
    assert config_in(tmp_path / "out")["moe_config"] == {"per_layer_experts_blocks": [0, 5, 3]}


@pytest.mark.parametrize(("mtp", "count"), [("whole", 8), ("prune", 5)])
def test_a_layer_for_further_tokens_stays_whole_or_is_pruned_with_the_others(
    mtp: str, count: int, tmp_path: Path
) -> None:
    source = glm_4_5(tmp_path / "source")
    checks = pruned(source, tmp_path / "out", tokens=8, criterion="aimer", mtp=mtp, undo=tmp_path / "undo")
    assert secateur.inspect(tmp_path / "out").to_json()["mtp_experts"] == {"3": count}
    assert all(check.passed for check in checks), checks
    assert restored(tmp_path / "out", tmp_path / "undo", source)


def test_a_layer_for_further_tokens_is_scored_by_its_own_weights(tmp_path: Path) -> None:
    source = glm_4_5(tmp_path / "source")
    planned = secateur.plan(source, criterion="weight_norm", keep=5, mtp="prune").plan
    tensors = tensors_of(source)
    norms = {
        expert: sum(
            float(value.double().square().sum())
            for name, value in tensors.items()
            if f".3.mlp.experts.{expert}." in name
        )
        for expert in range(8)
    }
    assert set(planned.layers[3].order) == set(sorted(norms, key=norms.__getitem__)[3:])
    assert set(secateur.plan(source, criterion="weight_norm", keep=5).plan.layers) == {1, 2}


def test_what_cannot_decide_on_layers_for_further_tokens_is_refused(tmp_path: Path) -> None:
    source = glm_4_5(tmp_path / "source")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"criterion": "reap"}, "criterion 'reap' needs statistics that are of the decoder layers alone"),
        ({"criterion": "aimer", "allocation": "global"}, "--allocation global gives layers different numbers"),
        ({"criterion": "aimer", "removed": "zero-slot"}, "transformers has no code for zero slots in them"),
        ({"criterion": "router_norm_change", "pretrained": source}, "compares the decoder layers of two models"),
    ]
    for options, message in refused:
        with pytest.raises(SecateurError, match=f"--mtp prune: .*{message}"):
            secateur.prune(source, tmp_path / "out", keep=5, mtp="prune", dry_run=True, **options)
    TextObservation(read_model_folder(source), random_data(), tmp_path / "stats.safetensors").observe()
    with pytest.raises(SecateurError, match="--mtp prune: the statistics are of the decoder layers alone"):
        secateur.plan(tmp_path / "stats.safetensors", keep=5, mtp="prune")
    with pytest.raises(SecateurError, match="--mtp drop: expected prune"):
        secateur.plan(source, keep=5, mtp="drop")  # type: ignore[arg-type]


def test_names_of_experts_in_modelopts_file_are_those_of_the_kept_ones(tmp_path: Path) -> None:
    algorithm = {"quant_algo": "NVFP4", "group_size": 16}
    source = modelopt(
        tmp_path / "source",
        exclude_modules=["lm_head", "model.layers.0.mlp*", "model.layers.1.mlp.experts.6", "*.experts.7.up_proj"],
        quantized_layers={f"model.layers.1.mlp.experts.{expert}.up_proj": algorithm for expert in (0, 3, 4, 7)},
    )
    plan = {1: (0, 2, 4, 6, 7), 2: (0, 1, 2, 3, 7)}
    layers = {layer: LayerPlan(experts_before=8, order=order) for layer, order in plan.items()}
    secateur.apply(source, secateur.Plan(layers=layers, criterion="test"), tmp_path / "out", undo=tmp_path / "undo")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    kept = {f"model.layers.1.mlp.experts.{expert}.up_proj": algorithm for expert in (0, 2, 4)}
    assert said["quantized_layers"] == kept
    assert said["exclude_modules"] == [
        "lm_head", "model.layers.0.mlp*", "model.layers.1.mlp.experts.3", "model.layers.1.mlp.experts.4.up_proj",
        "model.layers.2.mlp.experts.4.up_proj",
    ]  # fmt: skip
    assert "hf_quant_config.json" in json.loads((tmp_path / "out" / "report.json").read_text())["configs_edited"]
    assert restored(tmp_path / "out", tmp_path / "undo", source)
    other = modelopt(tmp_path / "other", exclude_modules=["experts.3.up_proj"])
    with pytest.raises(SecateurError, match=r"hf_quant_config.json: 'experts.3.up_proj' names single experts"):
        secateur.apply(other, secateur.Plan(layers=layers, criterion="test"), tmp_path / "none")


def test_a_quantised_model_of_which_config_json_says_nothing_is_known_by_its_tensors(tmp_path: Path) -> None:
    source = modelopt(tmp_path / "source", said=False)
    inspected = secateur.inspect(source).to_json()
    assert inspected["quantisation"] == (
        "by its tensors (input_scale, weight_scale), of which config.json says nothing"
    )
    checks = pruned(source, tmp_path / "out", tokens=8)
    assert ["quantised" in check.detail for check in checks if check.passed is None] == [True] * 3


@pytest.mark.parametrize("keep", [5, "0:5,1:4,2:5"])
def test_the_authors_config_has_the_new_count_or_is_left_out(keep: str | int, tmp_path: Path) -> None:
    source = mixtral(tmp_path / "source")
    pruned(source, tmp_path / "out", keep=keep)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    left_out = report["why_left_out"]
    assert left_out["consolidated.safetensors"] == "weights of the unpruned model in other forms"
    if keep == 5:
        params = json.loads((tmp_path / "out" / "params.json").read_text())
        assert params == json.loads((source / "params.json").read_text()) | {
            "moe": {"num_experts_per_tok": 2, "num_experts": 5}
        }
        assert "params.json" in report["configs_edited"]
        assert "params.json" not in left_out
    else:
        assert not (tmp_path / "out" / "params.json").exists()
        assert "no place for these" in left_out["params.json"]
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "pieces"


def test_the_state_of_a_training_run_is_left_out_with_a_line_in_the_report(tmp_path: Path) -> None:
    source = trainer_checkpoint(tmp_path / "source")
    pruned(source, tmp_path / "out", undo=tmp_path / "undo")
    left_out = json.loads((tmp_path / "out" / "report.json").read_text())["why_left_out"]
    why = "the state of a training run of the unpruned model"
    names = "latest optimizer.pt rng_state.pth rng_state_0.pth scheduler.pt trainer_state.json training_args.bin"
    assert left_out == dict.fromkeys(names.split(), why)
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert [str(name) for name in kept_files(read_model_folder(source))] == ["generation_config.json"]  # of finetune
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_what_belongs_to_other_forms_of_the_weights_is_left_out_and_all_else_copied(tmp_path: Path) -> None:
    source = with_company(tmp_path / "source")
    pruned(source, tmp_path / "out", undo=tmp_path / "undo")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["why_left_out"]) == {
        "adapter_config.json", "adapter_model.safetensors", "inference/config_big.json", "model-q4.gguf",
        "model.fp16.safetensors", "onnx/config.json", "onnx/model.onnx", "original/config.json",
        "original/dtypes.json", "original/model.safetensors", "pytorch_model.bin.index.json",
    }  # fmt: skip
    kept = {".gitattributes", "1_Pooling/config.json", "LICENSE", "chat_template.jinja", "preprocessor_config.json"}
    assert set(report["files_copied"]) == kept | {"inference/config_kernels.json"}
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/*")} == {
        "1_Pooling/config.json", "inference/config_kernels.json"
    }  # fmt: skip


@pytest.mark.slow
def test_a_snapshot_of_the_hub_cache_is_pruned_like_the_folder(tmp_path: Path) -> None:
    source = mixtral(tmp_path / "source")
    snapshot = in_hub_cache(source, tmp_path / "models--mistralai--Mixtral")
    for one, out in ((source, "plain"), (snapshot, "linked")):
        pruned(one, tmp_path / out, undo=tmp_path / f"{out} undo")
    plain, linked = contents(tmp_path / "plain"), contents(tmp_path / "linked")
    assert plain.keys() == linked.keys()
    assert {name for name in plain if plain[name] != linked[name]} <= {
        "report.json", "report.html", "README.md", "verify.json", "plan.json"
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())
    secateur.apply(tmp_path / "linked", tmp_path / "linked undo", tmp_path / "again")
    again, before = contents(tmp_path / "again"), contents(source)
    assert before.pop("consolidated.safetensors")  # in another form: not carried along
    assert again == before


def test_a_folder_of_pickled_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = with_files(tmp_path, pytorch_model__bin="weights", config__json={"model_type": "mixtral"})
    with pytest.raises(SecateurError, match=r"found pytorch_model.bin, and pickled .* save_pretrained writes safetens"):
        secateur.inspect(source)
