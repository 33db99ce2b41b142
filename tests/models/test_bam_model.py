"""BAM as a transformers model: parameter counts of the paper, cache, masks, kernels, saving and loading, bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.models.bam import BamConfig, BamForCausalLM, BamModel
from secateur.models.bam.flops import cache_bytes_per_token, flops_per_token
from support.tiny_bam import COMMON, every_kind, random_ids, tiny_bam

ROOT = Path(__file__).parents[2]
SIZES: dict[str, dict[str, Any]] = {
    "590M": {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "2B": {
        "hidden_size": 2304,
        "num_hidden_layers": 18,
        "num_attention_heads": 18,
        "num_key_value_heads": 6,
        "intermediate_size": 9216,
        "tie_word_embeddings": True,
    },
    # not the paper's: of a byte model that two cores can train
    "bytes": {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
}
BTX = {"num_attention_experts": 1}
# Printed in the paper; 2B with shared keys and values and the BTX rows of 5, 7 and 8 experts by its formula.
COUNTS = [
    ("590M", BTX, 700_480_512),
    ("590M", {}, 776_002_560),
    ("590M", {"kv_experts": False}, 738_253_824),
    ("590M", BTX | {"num_experts": 5}, 738_235_392),
    ("590M", BTX | {"num_experts": 6}, 775_990_272),
    ("590M", BTX | {"num_experts": 7}, 813_745_152),
    ("590M", BTX | {"num_experts": 8}, 851_500_032),
    ("2B", BTX, 5_431_309_056),
    ("2B", {}, 6_195_886_848),
    ("2B", {"kv_experts": False}, 6_004_783_872),
    ("bytes", BTX, 1_903_232),
    ("bytes", {}, 2_691_712),
    ("bytes", {"kv_experts": False}, 2_298_496),
    ("bytes", BTX | {"num_experts": 6}, 2_690_688),
]
DENSE = {"590M": 587_209_728, "2B": 1_991_289_600, "bytes": 721_536}


def number_of_parameters(size: str, **fields: Any) -> int:
    with torch.device("meta"):
        model = BamForCausalLM(BamConfig(**SIZES[size] | fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "fields", "count"), COUNTS)
def test_the_paper_s_models_have_its_numbers_of_parameters(size: str, fields: dict[str, Any], count: int) -> None:
    assert number_of_parameters(size, **fields) == count


@pytest.mark.parametrize("size", SIZES)
def test_one_expert_of_each_kind_is_the_dense_model_and_an_ffn_router_of_one_row(size: str) -> None:
    rows = SIZES[size]["hidden_size"] * SIZES[size]["num_hidden_layers"]
    assert number_of_parameters(size, num_experts=1) == DENSE[size] + rows


def test_operations_and_cache_are_those_of_the_paper() -> None:
    mixture, mixed = BamConfig(), flops_per_token(BamConfig(), context=256)
    del mixed["head"]
    assert {part: number / 6 for part, number in mixed.items()} == {
        "attention": 35_651_584,
        "attention_router": 8_192,
        "experts": 12_582_912,
        "router": 8_192,
    }
    btx = flops_per_token(BamConfig(**BTX), context=256)
    assert sum(btx.values()) - btx["head"] == 6 * 21_504_000
    three = flops_per_token(BamConfig(**BTX, num_experts=6, num_experts_per_tok=3), context=256)
    assert sum(three.values()) - three["head"] == 6 * 46_673_920
    assert btx["head"] == 2 * 1024 * 256_000
    shared = flops_per_token(BamConfig(kv_experts=False), context=256)
    assert mixed["attention"] - shared["attention"] == 6 * 3 * 4 * 1024**2
    assert (cache_bytes_per_token(mixture), cache_bytes_per_token(BamConfig(kv_experts=False))) == (98_304, 24_576)
    larger = [BamConfig(**SIZES["2B"], kv_experts=own) for own in (True, False)]
    assert [cache_bytes_per_token(config) for config in larger] == [221_184, 55_296]


@pytest.mark.parametrize("fields", [{}, {"kv_experts": False}, {"num_attention_experts": 1}], ids=str)
@pytest.mark.parametrize("kind", ["own keys", "sparse"])
def test_operations_are_those_that_torch_counts(kind: str, fields: dict[str, Any]) -> None:
    model, ids = tiny_bam(kind, **fields | {"attention_top_k": None}), random_ids(2, 6)
    model.set_attn_implementation("eager")  # it computes all pairs of tokens: the average context is the whole row
    with FlopCounterMode(display=False) as counter:
        logits_of(model, ids)
    assert counter.get_total_flops() == 12 * sum(flops_per_token(model.config, context=2 * 6).values())


def test_the_cache_holds_as_many_bytes_as_is_said() -> None:
    for kind in ("own keys", "shared keys"):
        model = tiny_bam(kind)
        layers = model(random_ids(1, 7), use_cache=True).past_key_values.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert held == 7 * cache_bytes_per_token(model.config, bytes_per_number=8)


@every_kind
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cached_decode_is_the_whole_forward(kind: str, static: bool) -> None:
    model, ids = tiny_bam(kind), random_ids(2, 9)
    past = StaticCache(config=model.config, max_cache_len=12) if static else None
    found = []
    with torch.no_grad():
        for part in ids.split([4, 1, 2, 1, 1], dim=1):
            output = model(part, past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), logits_of(model, ids), rtol=1e-11, atol=1e-12)


@every_kind
def test_generation_with_either_cache_is_the_greedy_choice_of_whole_forwards(kind: str) -> None:
    model, ids = tiny_bam(kind), random_ids(2, 4)
    expected = ids
    for _ in range(4):
        expected = torch.cat((expected, logits_of(model, expected)[:, -1:].argmax(-1)), dim=1)
    for cache in (None, "static"):
        found = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        assert torch.equal(found, expected)


@every_kind
def test_a_token_does_not_see_those_after_it(kind: str) -> None:
    model = tiny_bam(kind)
    embedded = model.model.embed_tokens(random_ids(2, 8)).detach()
    changed = embedded.clone()
    changed[:, 5] += torch.randn(2, embedded.shape[-1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (model(inputs_embeds=one).logits for one in (embedded, changed))
    # other tokens go to its experts, and products of other sizes round otherwise
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-11, atol=1e-12)
    assert ((before - after).abs().amax(-1)[:, 5:] > 1e-3).all()


@every_kind
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    model, ids = tiny_bam(kind), random_ids(1, 6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = (padded > 0).long()
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(found, logits_of(model, ids), rtol=1e-11, atol=1e-12)


@every_kind
def test_all_kernels_compute_the_same(kind: str) -> None:
    model, ids = tiny_bam(kind, dtype=torch.float32), random_ids(2, 9)
    expected = logits_of(model, ids)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "grouped_mm")
    for attention, experts in (("eager", "grouped_mm"), ("sdpa", "eager"), ("sdpa", "batched_mm")):
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_in_bfloat16_it_is_the_same_model_up_to_rounding(kind: str) -> None:
    ids = random_ids(2, 9)
    fields = {"intermediate_size": 16}  # torch's grouped product takes rows of a multiple of 16 bytes
    wide, narrow = (tiny_bam(kind, dtype=dtype, **fields).train() for dtype in (torch.float32, torch.bfloat16))
    for model in (wide, narrow):
        model(ids, labels=ids).loss.backward()
    found, expected = (logits_of(model, ids).float() for model in (narrow, wide))
    assert logits_of(narrow, ids).dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in narrow.parameters())


@every_kind
def test_attention_weights_are_in_the_order_of_the_experts(kind: str) -> None:
    model, ids = tiny_bam(kind), random_ids(2, 7)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions[0].unflatten(1, (3, 4))
    layer = model.model.layers[0].self_attn
    with torch.no_grad():  # other queries of expert 1 change its weights alone
        rows = layer.q_proj.weight.unflatten(0, (3, -1))
        rows[1] = torch.randn_like(rows[1])
    differ = (model(ids, output_attentions=True).attentions[0].unflatten(1, (3, 4)) - weights).abs().amax((0, 2, 3, 4))
    assert differ[1] > 1e-3
    assert differ[[0, 2]].max() == 0


@every_kind
def test_a_saved_model_loads_by_the_auto_classes_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, ids = tiny_bam(kind, dtype=torch.float32), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (type(again), type(AutoModel.from_pretrained(tmp_path))) == (BamForCausalLM, BamModel)
    assert not any(info.values())
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    mine, others = model.state_dict(), again.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids))
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    routers = {name for name in stored if name.endswith(("self_attn.router.weight", "mlp.gate.weight"))}
    assert len(routers) == 4


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.router.weight"])
def test_a_missing_router_is_an_error_that_names_it(lost: str, tmp_path: Path) -> None:
    tiny_bam("own keys", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(SecateurError, match=rf"{lost.removeprefix('model.')} missing, expected every router"):
            auto.from_pretrained(tmp_path)


def test_routers_are_drawn_with_their_own_spread() -> None:
    for std in (0.0, 0.01, 1.0):
        torch.manual_seed(0)
        layer = BamForCausalLM(BamConfig(**COMMON | {"hidden_size": 256}, router_init_std=std)).model.layers[0]
        for router in (layer.mlp.gate, layer.self_attn.router):
            assert router.weight.std().item() == pytest.approx(std, rel=0.1)


WRONG: dict[str, dict[str, Any]] = {
    "block is 'serial', expected one of": {"block": "serial"},
    "num_experts is 0, expected a whole number above 0": {"num_experts": 0},
    "num_attention_experts is 2.5, expected a whole number": {"num_attention_experts": 2.5},
    "num_attention_experts is 5000, expected at most 4096": {"num_attention_experts": 5000},
    "num_experts_per_tok is 5, expected at most 4": {"num_experts_per_tok": 5},
    "attention_top_k is 4, expected at most 3": {"attention_top_k": 4, "num_attention_experts": 3},
    "attention_top_k is 0, expected a whole number": {"attention_top_k": 0},
    "4 attention heads, expected a multiple of the 3": {"num_key_value_heads": 3},
    "router_init_std is -1, expected a number of at least 0": {"router_init_std": -1},
    "router_z_loss_coef is inf, expected a number": {"router_z_loss_coef": float("inf")},
    "kv_experts is 1, expected true or false": {"kv_experts": 1},
    "logit_scale is 'x', expected a number": {"logit_scale": "x"},
    "an RMS norm has no bias": {"norm_type": "rms", "norm_bias": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_config_that_no_model_can_have_is_refused(message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        BamConfig(**COMMON | WRONG[message])


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/bam.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/bam.md", "exec"), names)
    assert type(AutoModelForCausalLM.from_pretrained("mixture")) is BamForCausalLM
    assert names["output"].load_balance_loss > 1


def test_ids_and_embeddings_at_once_are_refused() -> None:
    model, ids = tiny_bam("own keys"), random_ids(1, 3)
    embedded: Tensor = model.model.embed_tokens(ids)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(SecateurError, match="either input_ids or inputs_embeds"):
            model(**inputs)
