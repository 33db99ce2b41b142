"""A folder whose layers differ loads with every auto class that loads its source, and its card names one that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from secateur.files.json import read_object
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.surgery.config_json import loading_lines
from support.model_folders import plan_of, run_card
from support.tiny_models import COMMON, MLA, NARROW, random_tokens, tiny_config

# model type -> (auto class of the source, all auto classes that transformers has for it)
SOURCES: dict[str, tuple[str, set[str]]] = {
    "mixtral": (
        "AutoModelForCausalLM",
        {
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
            "AutoModelForQuestionAnswering",
        },
    ),
    "mistral4": (
        "AutoModelForImageTextToText",
        {
            "AutoModel",
            "AutoModelForImageTextToText",
            "AutoModelForMultimodalLM",
            "AutoModelForPreTraining",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
        },
    ),
    "openai_privacy_filter": ("AutoModelForTokenClassification", {"AutoModel", "AutoModelForTokenClassification"}),
}
FIELDS: dict[str, dict[str, Any]] = {
    "mistral4": NARROW | MLA | {"n_routed_experts": 8, "first_k_dense_replace": 0, "head_dim": 16},
    "openai_privacy_filter": {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 8, "sliding_window": 4},
}
PLAN = plan_of((0, [0, 2, 3]), (1, [1, 2, 5, 7]))
HEADS = {"score", "qa_outputs"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model type a folder with `source` and `out`."""
    made = {}
    for model_type, (loader, _) in SOURCES.items():
        root = tmp_path_factory.mktemp(model_type)
        fields = COMMON | {"num_experts_per_tok": 2} | FIELDS.get(model_type, {})
        config = tiny_config("mixtral") if model_type == "mixtral" else AutoConfig.for_model(model_type, **fields)
        torch.manual_seed(0)
        getattr(modeling_auto, loader).from_config(config).save_pretrained(root / "source")
        apply_to_model(root / "source", PLAN, root / "out")
        made[model_type] = root
    return made


def load(loader: str, folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """(the model, modules that are newly initialised)."""
    model, info = getattr(modeling_auto, loader).from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    return model.eval(), {name.split(".")[0] for name in info["missing_keys"]}


@pytest.mark.parametrize(
    ("model_type", "loader"), [(name, loader) for name, (_, all_) in SOURCES.items() for loader in sorted(all_)]
)
def test_each_auto_class_of_the_source_loads_the_result_with_the_same_new_heads(
    model_type: str, loader: str, made: dict[str, Path]
) -> None:
    source, new_of_source = load(loader, made[model_type] / "source")
    result, new = load(loader, made[model_type] / "out")
    assert type(result).__name__ == f"Pruned{type(source).__name__}"
    assert new == new_of_source
    assert new <= HEADS
    assert result.config.num_hidden_layers == 3
    whole, _ = load(SOURCES[model_type][0], made[model_type] / "out")
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        hidden = [
            (model if loader == "AutoModel" and model is result else model.base_model)(tokens, use_cache=False)[0]
            for model in (result, whole)
        ]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("model_type", SOURCES)
def test_config_json_names_the_auto_classes_that_transformers_has_for_the_source(
    model_type: str, made: dict[str, Path]
) -> None:
    config = read_object(made[model_type] / "out/config.json")
    assert config["auto_map"].keys() == {"AutoConfig"} | SOURCES[model_type][1]
    assert set(config["architectures"]) == {
        made_class.removeprefix("modeling_secateur.")
        for loader, made_class in config["auto_map"].items()
        if loader == SOURCES[model_type][0]
    }


@pytest.mark.parametrize("model_type", SOURCES)
def test_the_card_has_the_line_that_loads_it_and_verify_passes(model_type: str, made: dict[str, Path]) -> None:
    loader, _ = SOURCES[model_type]
    card = (made[model_type] / "out/README.md").read_text()
    assert f"model = {loader}.from_pretrained(folder, trust_remote_code=True)\n" in card
    found = run_card(made[model_type] / "out")
    assert type(found).__name__ == read_object(made[model_type] / "out/config.json")["architectures"][0]
    checks = verify_model(made[model_type] / "source", made[model_type] / "out", num_tokens=6)
    assert all(check.passed is not False for check in checks), checks


def test_a_uniform_folder_of_a_class_that_no_auto_class_makes_is_loaded_by_the_class_itself() -> None:
    assert loading_lines({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})[-1] == (
        "model = AutoModelForCausalLM.from_pretrained(folder)"
    )
    assert loading_lines({"model_type": "mixtral", "architectures": ["MixtralPreTrainedModel"]})[-1] == (
        "model = MixtralPreTrainedModel.from_pretrained(folder)"
    )
    assert loading_lines({"model_type": "vmoe", "architectures": ["VMoEForImageClassification"]}) == (
        "import secateur  # tells transformers of this model class",
        "from transformers import AutoModelForImageClassification",
        "",
        "model = AutoModelForImageClassification.from_pretrained(folder)",
    )
