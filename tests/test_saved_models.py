"""A pruned model that was saved loads again: with remote code and without Secateur, with Secateur, or as stock."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from secateur import auto_classes, modeling_secateur
from secateur.families import describe_moe, logits_of
from secateur.modeling_secateur import counts_in, pruned_config_class, pruned_model_class
from secateur.plans import LayerPlan, Plan
from secateur.pretraining.presets import COMMON, PRESETS
from secateur.surgery.module import prune_model_
from support.fresh import in_fresh
from support.long_tests import ARE_RUN, long
from support.tiny_models import (
    FAMILIES,
    KINDS,
    ONE_OF_EACH_LAYOUT,
    VOCABULARY,
    random_plan,
    random_tokens,
    tiny_model,
)

WITH_LOSS = [name for name, family in FAMILIES.items() if family.balance_loss]
QUICK = ["qwen3_moe", "deepseek_v3 grouped", "gpt_oss", "dbrx"]
# what every auto class loads
AUTOS = {"qwen3_moe": "Qwen3Moe", "deepseek_v3 grouped": "DeepseekV3", "gpt_oss": "GptOss"}
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def preset_model(name: str) -> PreTrainedModel:
    model_type, _, fields = PRESETS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **COMMON | fields | SPECIAL))


def different_counts(model: PreTrainedModel) -> PreTrainedModel:
    """Prune it so that every MoE layer keeps another number of experts."""
    moe = describe_moe(model)
    layers = {
        layer: LayerPlan(experts_before=count, order=tuple(range(1, count - turn)))
        for turn, (layer, count) in enumerate(moe.counts.items())
    }
    groups_allow = moe.num_groups == 1
    prune_model_(moe, Plan(layers=layers, criterion="test") if groups_allow else random_plan(moe))
    return model.eval()


def same_counts(model: PreTrainedModel) -> PreTrainedModel:
    moe = describe_moe(model)
    prune_model_(moe, random_plan(moe, uniform=True))
    return model.eval()


ALL = {f"preset {name}": (preset_model, name, name not in ("deepseek_v3",)) for name in PRESETS} | {
    f"tiny {name}": (tiny_model, name, FAMILIES[name].balance_loss) for name in FAMILIES if name in KINDS
}

# Every layout is loaded with remote code, and one model with tied embeddings; the code for all of them is one, as is
# seen in the same process for every family (surgery/test_surgery_module.py). Loading with Secateur differs from that
# before the model class is made, and one count for all layers gives the native class: a few are enough for both.
TIED = "preset qwen3_moe"
FEW = [title for title in ALL if title.startswith("preset")] + [f"tiny {name}" for name in QUICK]
WAYS = [(title, "remote") for title in ALL] + [
    (title, mode) for title in FEW for mode in ("secateur first", "transformers first")
]
ALWAYS = {
    *((title, "remote") for title in (TIED, *(f"tiny {name}" for name in {*ONE_OF_EACH_LAYOUT, *QUICK}))),
    *((title, mode) for title in (TIED, "tiny gpt_oss") for mode in ("secateur first", "transformers first")),
}
UNIFORM = {TIED, *(f"tiny {name}" for name in QUICK)}
MODELS = {title: one for title, one in ALL.items() if ARE_RUN or (title, "remote") in ALWAYS}

WORKER = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
mode, root = sys.argv[1], Path(sys.argv[2])
if mode == "remote":
    sys.modules["secateur"] = None  # importing it fails from here on
elif mode == "secateur first":
    import secateur
import torch, transformers
from safetensors.torch import load_file
if mode == "transformers first":
    from transformers import AutoModelForCausalLM
    import secateur
from transformers import AutoModelForCausalLM

def look(folder, data, **flags):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **flags)
    model.eval()
    for tensor in model.parameters():  # they lie anywhere in a mapped file, and matrix products round by alignment
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        logits = model(input_ids=data["tokens"], use_cache=False).logits
    seen = {
        "class": type(model).__name__,
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "equal": torch.equal(logits, data["logits"]),
        "generated": model.generate(data["tokens"][:1, :4], max_new_tokens=3, min_new_tokens=3).tolist(),
    }
    return model, seen

results = {}
for folder in sorted(root.iterdir()):
    uniform = folder.name.startswith("uniform")
    if folder.name.partition(" ")[2] not in sys.argv[3:] or (uniform and mode != "remote"):
        continue
    flags = {"trust_remote_code": True} if mode == "remote" and not uniform else {}
    data = load_file(folder / "expected.safetensors")
    try:
        model, seen = look(folder, data, **flags)
        if (folder / "has_loss").exists():
            output = model(input_ids=data["tokens"], labels=data["tokens"], output_router_logits=True)
            output.loss.backward()
            layers = [p.grad.abs().sum().item() for n, p in model.named_parameters()
                      if n.endswith((".gate.weight", ".router.weight", ".router.layer.weight"))]
            seen |= {"loss": output.loss.item(), "aux": output.aux_loss.item(), "router_grads": layers}
            model.zero_grad()
        again = root.parent / "again" / mode / folder.name
        model.save_pretrained(again)
        _, seen["again"] = look(again, data, **flags)
        seen["files"] = sorted(path.name for path in again.iterdir())
        if mode == "remote" and (folder / "every_auto_class").exists():
            seen["autos"] = {}
            for auto in json.loads((folder / "config.json").read_text())["auto_map"]:
                if auto != "AutoConfig":
                    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **flags)
                    seen["autos"][auto] = [type(model).__name__, sorted(info["missing_keys"])]
    except Exception as error:
        import traceback
        seen = {"error": traceback.format_exc()[-2000:]}
    results[folder.name] = seen
print("RESULT" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a model, each with tokens and the logits it gave before it was saved."""
    root = tmp_path_factory.mktemp("saved") / "models"
    for title, (make, name, has_loss) in MODELS.items():
        for kind, prune in (("pruned", different_counts), ("uniform", same_counts)):
            if kind == "uniform" and not (title in FEW if ARE_RUN else title in UNIFORM):
                continue
            folder = root / f"{kind} {title}"
            model = prune(make(name))
            model.save_pretrained(folder)
            tokens = random_tokens(2, 12)
            save_file({"tokens": tokens, "logits": logits_of(model, tokens)}, folder / "expected.safetensors")
            if has_loss and kind == "pruned":
                (folder / "has_loss").touch()
            if title.removeprefix("tiny ") in AUTOS and kind == "pruned":
                (folder / "every_auto_class").touch()
    return root


@pytest.fixture(scope="module")
def loaded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter says of every folder, per way of loading it."""
    cache = tmp_path_factory.mktemp("hf")
    environment = {"HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    found = {}
    for mode in ("remote", "secateur first", "transformers first"):
        asked = [title for title, way in WAYS if way == mode and (ARE_RUN or (title, way) in ALWAYS)]
        said = in_fresh(WORKER, mode, saved, *asked, environment=environment)
        found[mode] = json.loads(said.rpartition("RESULT")[2])
    return found


def check_loaded(seen: dict[str, Any], class_name: str) -> None:
    assert "error" not in seen, seen["error"]
    for one in (seen, seen["again"]):
        assert one["problems"] == {}
        assert one["equal"]
        assert one["class"] == class_name
        assert len(one["generated"][0]) == 7
    assert seen["again"]["generated"] == seen["generated"]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("title", "mode"), [pytest.param(*way, marks=[] if way in ALWAYS else long) for way in WAYS])
def test_layers_that_differ_load_bit_equal_generate_train_and_save_again(
    title: str, mode: str, loaded: dict[str, Any], saved: Path
) -> None:
    seen = loaded[mode][f"pruned {title}"]
    config = json.loads((saved / f"pruned {title}" / "config.json").read_text())
    check_loaded(seen, config["architectures"][0])
    assert seen["class"].startswith("Pruned")
    assert "modeling_secateur.py" in seen["files"]
    if ALL[title][2]:
        assert seen["aux"] > 0
        assert all(grad > 0 for grad in seen["router_grads"])
        assert len(seen["router_grads"]) == sum(map(bool, config["moe_config"]["per_layer_experts_blocks"]))


@pytest.mark.process
@pytest.mark.slow
def test_without_secateur_every_auto_class_of_the_source_loads_it_and_makes_the_head_that_is_missing(
    loaded: dict[str, Any],
) -> None:
    for title, name in AUTOS.items():
        tasks = {"CausalLM": [], "SequenceClassification": ["score.weight"]}
        tasks["TokenClassification"] = ["score.bias", "score.weight"]
        expected = {f"AutoModelFor{task}": [f"Pruned{name}For{task}", new] for task, new in tasks.items()}
        found = loaded["remote"][f"pruned tiny {title}"]["autos"]
        # transformers names the model in this class otherwise, so all of it is new there, of the source too
        architecture, missing = found.pop("AutoModelForQuestionAnswering", ("", []))
        assert (architecture, "qa_outputs.weight" in missing) in (
            ("", False),
            (f"Pruned{name}ForQuestionAnswering", True),
        )
        assert found == expected | {"AutoModel": [f"Pruned{name}Model", []]}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("title", [pytest.param(one, marks=[] if one in UNIFORM else long) for one in FEW])
def test_layers_that_agree_load_in_stock_transformers_with_neither_flag_nor_secateur(
    title: str, loaded: dict[str, Any], saved: Path
) -> None:
    config = json.loads((saved / f"uniform {title}" / "config.json").read_text())
    check_loaded(loaded["remote"][f"uniform {title}"], config["architectures"][0])
    assert {"auto_map", "moe_config", "base_model_type"} & config.keys() == set()
    assert not any("secateur" in path.name for path in (saved / f"uniform {title}").iterdir())


@pytest.mark.parametrize("name", QUICK)
def test_a_saved_model_loads_bit_equal_where_secateur_is_imported(name: str, tmp_path: Path) -> None:
    model = different_counts(tiny_model(name))
    tokens = random_tokens(2, 12)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(model)
    mine, other = model.state_dict(), again.state_dict()
    assert mine.keys() == other.keys()
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []
    again.load_state_dict({key: value.clone() for key, value in other.items()}, assign=True)  # see WORKER
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("name", QUICK)
def test_config_json_holds_the_count_of_every_layer_and_the_code(name: str, tmp_path: Path) -> None:
    model = different_counts(tiny_model(name))
    counts = describe_moe(model).counts
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    blocks = [counts.get(layer, 0) for layer in range(model.config.num_hidden_layers)]
    assert config["moe_config"] == {"per_layer_experts_blocks": blocks}
    assert (0 in blocks) == (name == "deepseek_v3 grouped")
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_secateur.Pruned")
    assert config["model_type"] == "secateur_moe"
    assert config["base_model_type"] == FAMILIES[name].model_type
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["modeling_secateur.py"]


WRONG_CONFIGS: dict[str, tuple[str, Any]] = {
    "expected 3 whole numbers >= 0, found None": ("moe_config", None),
    r"expected 3 whole numbers >= 0, found \[6, 5\]": ("moe_config", {"per_layer_experts_blocks": [6, 5]}),
    r"found \[6, -5, 4\]": ("moe_config", {"per_layer_experts_blocks": [6, -5, 4]}),
    r"found \[6, 5.0, 4\]": ("moe_config", {"per_layer_experts_blocks": [6, 5.0, 4]}),
    "expected the largest of per_layer_experts_blocks": ("moe_config", {"per_layer_experts_blocks": [7, 5, 4]}),
    "has an expert axis but .* has no experts there": ("moe_config", {"per_layer_experts_blocks": [6, 0, 4]}),
    "base_model_type 'no_such' is not a model type": ("base_model_type", "no_such"),
    "base_model_type 'None' is not a model type": ("base_model_type", None),
    "has no class 'PrunedNoSuch'": ("architectures", ["PrunedNoSuch"]),
    "has no class 'None'": ("architectures", None),
}


@pytest.mark.parametrize("message", WRONG_CONFIGS)
def test_a_config_json_that_does_not_fit_is_refused_with_the_reason(message: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers = {layer: LayerPlan(experts_before=8, order=tuple(range(6 - layer))) for layer in range(3)}
    prune_model_(describe_moe(model), Plan(layers=layers, criterion="test"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    key, value = WRONG_CONFIGS[message]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_pruned_class_chooses_the_same_kernels_as_its_native_class(monkeypatch: pytest.MonkeyPatch) -> None:
    native = MixtralForCausalLM
    for kind in ("attn", "experts"):  # transformers keeps its answer on the class; forget it, as in a new process
        monkeypatch.delattr(native, f"_can_set_{kind}_implementation_cached_value", raising=False)
    pruned = pruned_model_class(native)
    assert pruned._can_set_experts_implementation()
    assert pruned._can_set_attn_implementation()


def test_a_list_of_counts_that_the_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    model = different_counts(tiny_model("mixtral"))
    blocks = list(counts_in(model.config).values())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    wrong = [blocks[0], blocks[1] - 1, *blocks[2:]]
    config = json.loads(path.read_text()) | {"moe_config": {"per_layer_experts_blocks": wrong}}
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size|shape|experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def by_hand(router_logits: tuple[Tensor, ...], top_k: int, mask: Tensor | None = None) -> Tensor:
    """Mean over layers of E * sum_i f_i * P_i (Switch Transformers, arXiv 2101.03961, eq. 4 to 6, with top-k)."""
    losses = []
    for logits in router_logits:
        logits = logits.reshape(-1, logits.shape[-1])
        keep = torch.ones(len(logits)) if mask is None else mask.flatten().float()
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(logits).scatter(1, probabilities.topk(top_k).indices, 1.0)
        share = (chosen * keep[:, None]).sum(0) / keep.sum()
        mean = (probabilities * keep[:, None]).sum(0) / keep.sum()
        losses.append(logits.shape[-1] * (share * mean).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_balance_loss_of_layers_that_differ_is_the_mean_of_their_own_losses(name: str) -> None:
    model = different_counts(tiny_model(name))
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        plain = model(input_ids=tokens, labels=tokens)
        output = model(input_ids=tokens, labels=tokens, output_router_logits=True)
    counts = list(describe_moe(model).counts.values())
    assert [logits.shape[-1] for logits in output.router_logits] == counts
    torch.testing.assert_close(output.aux_loss, by_hand(output.router_logits, 2))
    torch.testing.assert_close(output.loss, plain.loss + model.router_aux_loss_coef * output.aux_loss)
    assert output.aux_loss > 0


def test_padding_has_no_part_in_the_balance_loss() -> None:
    model = different_counts(tiny_model("mixtral"))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    output = model(input_ids=random_tokens(2, 12), attention_mask=mask, output_router_logits=True)
    expected = by_hand(output.router_logits, 2, mask)
    torch.testing.assert_close(output.aux_loss, expected)
    assert not torch.allclose(output.aux_loss, by_hand(output.router_logits, 2))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_with_one_layer_the_balance_loss_is_that_of_transformers(name: str) -> None:
    native = tiny_model(name, num_hidden_layers=1, layer_types=["full_attention"])
    config = copy.deepcopy(native.config)
    config.__class__ = pruned_config_class(type(config))
    config.moe_config = {"per_layer_experts_blocks": [8]}
    pruned = pruned_model_class(type(native))(config)
    pruned.load_state_dict(native.state_dict())
    tokens = random_tokens(2, 12)
    mine, stock = (model(input_ids=tokens, labels=tokens, output_router_logits=True) for model in (pruned, native))
    torch.testing.assert_close(mine.aux_loss, stock.aux_loss)
    torch.testing.assert_close(mine.loss, stock.loss)


def test_the_balance_loss_can_be_asked_for_in_the_config_and_as_a_tuple() -> None:
    model = different_counts(tiny_model("qwen3_moe"))
    tokens = random_tokens(2, 12)
    asked = model(input_ids=tokens, labels=tokens, output_router_logits=True)
    model.config.output_router_logits = True
    by_config = model(input_ids=tokens, labels=tokens)
    assert torch.equal(by_config.loss, asked.loss)
    as_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], asked.loss)
    off = model(input_ids=tokens, labels=tokens, output_router_logits=False)
    assert off.router_logits is None
    assert off.loss < asked.loss


def test_asking_for_the_balance_loss_leaves_no_hook() -> None:
    model = different_counts(tiny_model("mixtral"))
    model(input_ids=random_tokens(1, 4), output_router_logits=True)
    assert not model.model._forward_pre_hooks
    assert model(input_ids=random_tokens(1, 4)).router_logits is None


def test_the_auto_classes_know_the_model_type_that_pruned_configs_have() -> None:
    assert (
        auto_classes.MODEL_TYPE == modeling_secateur.MODEL_TYPE
    )  # the latter stands alone, and neither loads the other
