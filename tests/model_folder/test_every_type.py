"""Every model type of transformers whose classes hold experts goes through the chain, or is refused with a reason."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import model_type_to_module_name
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from secateur.data.batch import Batch
from secateur.data.calibration import Calibration
from secateur.errors import SecateurError
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.evaluation.on_text import evaluate_text
from secateur.model_folder.measure.on_text import TextObservation
from secateur.model_folder.read.config import REFUSED, read_config
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.plans import LayerPlan, Plan
from support.long_tests import long
from support.model_folders import saved
from support.small_configs import VOCABULARY, small_config
from support.tiny_models import FAMILIES

# Classes of experts in the modeling files, by name.
EXPERTS = re.compile(r"^class \w*?(?:Experts?|SparseMoeBlock|MoE|CDMoE|SparseMLP|MoeMLP)\(nn\.Module\)", re.MULTILINE)
# What a folder of a model can be loaded with; types that only `AutoModel` knows are parts of others.
LOADERS = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
    "AutoBackbone",
)
ENCODER_DECODERS = {"nllb-moe", "switch_transformers"}
# Types beside those of FAMILIES that go through the whole chain here; with all layers' own counts, or one for all where
# the experts are in a text model inside another.
CHAIN = [
    "aria",
    "axk2",
    "beam",
    "dots3_note",
    "dots3_note_text",
    "flint",
    "glm_moe_dsa",
    "granitemoe_swa",
    "hy_v4",
    "inkling2_text",
    "inkling_mm_model",
    "kolibri1",
    "minimax_m3_vl_text",
    "openai_privacy_filter",
    "qwen3_omni_moe_thinker",
]
# Router, experts and decoder layers of these inherit all three from those of one that is tried (axk2, flint,
# glm_moe_dsa, granitemoe_swa), or are those of a text model that is tried alone or inside another. What they compute is
# a long test; that they are understood, and pruned to the byte, is always shown.
LIKE_ANOTHER = {"axk2", "flint", "glm_moe_dsa", "granitemoe_swa", "dots3_note_text", "aria", "inkling_mm_model"}
# Layers of these hand on more than hidden states, so `observe` refuses them; criteria without data work.
NOT_OBSERVED = {"glm_moe_dsa", "hy_v4"}
# Whose experts are found in the model of full size by its config; no small one goes through the chain here.
FOUND = [
    "glm4v_moe",
    "glm5_next",
    "inkling2",
    "kimi_linear",
    "llama4",
    "minimax_m3_vl",
    "mistral4",
    "mistral_large4",
    "muse_spark",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "step3p7",
    "unlimited_ocr",
]
UNTRIED = {"deepseek_ocr2", "qwen4_exp", "qwen4_exp_text"}  # transformers cannot build the defaults of their configs
OTHERS = {"gemma4", "gemma4_text", "llama4_text"}  # have tests of their own


def types_with_experts() -> set[str]:
    """By the source of the installed transformers, of the types that a folder can be of."""
    models = Path(transformers.__file__).parent / "models"
    with_experts = {
        model_type
        for model_type in CONFIG_MAPPING_NAMES
        for file in (models / model_type_to_module_name(model_type)).glob("modeling_*.py")
        if EXPERTS.search(file.read_text(encoding="utf-8"))
    }
    loaded = {name for loader in LOADERS for name in getattr(modeling_auto, loader)._model_mapping._model_mapping}
    return with_experts & loaded


def test_every_type_with_experts_is_tried_or_refused_by_name() -> None:
    found = types_with_experts()
    assert len(found) > 70
    tried = {family.model_type for family in FAMILIES.values()} | {*CHAIN, *FOUND}
    assert found - tried - ENCODER_DECODERS - OTHERS - UNTRIED - REFUSED.keys() == set()
    assert set(CHAIN) | set(FOUND) <= found
    assert not tried & REFUSED.keys()


@pytest.mark.parametrize("model_type", sorted(ENCODER_DECODERS))
def test_encoder_decoders_are_not_supported_and_it_says_so(model_type: str) -> None:
    config = small_config(model_type)
    (name,) = [modeling_auto.AutoModelForSeq2SeqLM._model_mapping[type(config)].__name__]
    with pytest.raises(SecateurError, match="not supported: it is an encoder-decoder model"):
        read_config(config.to_dict() | {"architectures": [name]})


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_type_is_said_to_be_not_supported_with_its_reason(model_type: str) -> None:
    with pytest.raises(SecateurError, match=f"'{model_type}' is not supported: {re.escape(REFUSED[model_type])}"):
        read_config({"model_type": model_type, "architectures": ["Any"], "num_experts": 4})


def save(model_type: str, folder: Path) -> None:
    config = small_config(model_type)
    loader = next(
        getattr(modeling_auto, name) for name in LOADERS if type(config) in getattr(modeling_auto, name)._model_mapping
    )
    torch.manual_seed(0)
    loader.from_config(config).eval().save_pretrained(folder)


def observe(folder: ModelFolder, out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY - 16, (4, 12), generator=generator, dtype=torch.int32)
    data = Calibration(sequences=tuple(tokens), packed=True, domains={"any": 4}, about={})
    found = TextObservation(folder, data, out, batch_size=2).observe()
    top_k = folder.config.top_k
    assert all(sum(loads) == 48 * top_k for loads in found.stats.loads().values())


def plan_for(folder: ModelFolder) -> Plan:
    """Fewer experts, another number in every second layer where layers may differ."""
    chosen = random.Random(0)
    layers = {}
    for turn, (layer, count) in enumerate(folder.counts.items()):
        kept = count - 2 - (0 if folder.config.is_nested else turn % 2)
        layers[layer] = LayerPlan(experts_before=count, order=tuple(sorted(chosen.sample(range(count), kept))))
    return Plan(layers=layers, criterion="test")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [pytest.param(one, marks=long if one in LIKE_ANOTHER else []) for one in CHAIN])
def test_the_chain_ends_in_what_the_barred_source_computes(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path / "source")
    folder = read_model_folder(tmp_path / "source")
    if model_type in NOT_OBSERVED:
        with pytest.raises(SecateurError, match="layers of this model exchange more than hidden states"):
            observe(folder, tmp_path / "stats")
    else:
        observe(folder, tmp_path / "stats")
    apply_to_model(tmp_path / "source", plan_for(folder), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=10)
    assert all(check.passed is not False for check in checks), checks
    assert any(check.detail.endswith("bit for bit") for check in checks), checks


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(LIKE_ANOTHER))
def test_one_that_is_like_another_is_understood_and_keeps_every_byte_of_kept_experts(
    model_type: str, tmp_path: Path
) -> None:
    save(model_type, tmp_path / "source")
    plan = plan_for(read_model_folder(tmp_path / "source"))
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=0)
    assert all(check.passed is not False for check in checks), checks
    assert read_model_folder(tmp_path / "out").counts == {
        layer: one.experts_after for layer, one in plan.layers.items()
    }


@long
@pytest.mark.slow
@pytest.mark.parametrize("model_type", FOUND)
def test_the_experts_of_the_model_of_full_size_are_found_by_its_config(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    makers = [getattr(modeling_auto, name)._model_mapping.get(type(config), None) for name in LOADERS]
    made = next(maker for maker in makers if maker is not None and maker.config_class is type(config))
    found = read_config(config.to_dict() | {"architectures": [made.__name__]})
    assert found.count >= found.top_k >= 1
    assert all(layout.layers for layout in found.layouts)


@pytest.mark.parametrize("run", ["observe", "eval"])
def test_a_forward_that_fails_ends_in_one_line_that_names_the_model(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path / "source")
    folder = read_model_folder(tmp_path / "source")

    def forward(*_: object, **__: object) -> None:
        raise AttributeError("no attribute\n'vision_start_token_id'")

    monkeypatch.setattr(transformers.MixtralModel, "forward", forward)
    batch = Batch(input_ids=torch.tensor([[1, 2, 3]]))
    data = Calibration(sequences=tuple(batch.input_ids), packed=True, domains={"any": 1}, about={})
    steps = {
        "observe": lambda: TextObservation(folder, data, tmp_path / "stats").observe(),
        "eval": lambda: evaluate_text([tmp_path / "source"], [batch], ["any"]),
    }
    with pytest.raises(SecateurError) as error:
        steps[run]()
    assert str(error.value) == (
        f"{tmp_path / 'source'} (mixtral): the model, as its config.json and weights are, cannot be run on this "
        "(AttributeError: no attribute 'vision_start_token_id')"
    )
    assert not (tmp_path / "stats").exists()
