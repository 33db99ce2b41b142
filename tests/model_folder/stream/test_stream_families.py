"""Layer by layer, every family gives bit for bit what the whole model gives; what cannot, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import Qwen3_5MoeForConditionalGeneration as Nested

from secateur.data.calibration import Calibration
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.model_folder.measure.on_text import Activations, TextObservation
from secateur.model_folder.read.load import load
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import DiskStates, MemoryStates, States
from secateur.stats import RouterStats
from support.hub_folders import gemma_4_text
from support.long_tests import long
from support.model_folders import loaded, saved
from support.odd_folders import llama4
from support.streamed_runs import LENGTHS, RAGGED, found_in, random_data, vivid, whole_run
from support.tiny_models import families, random_plan, tiny_config

QUICK = {"mixtral", "deepseek_v3 grouped", "gpt_oss"}  # experts of their own on the disk; groups, a bias; stacked
# One of each kind of decoder layers, by what they are handed and hand on: full attention, latent, with windows in turn,
# blocks of another name, linear, Mamba, one mixer a layer, convolutions, lightning, heads of two sizes, attention of
# its own, an indexer. The layers of others are like these, or like two of them.
LAYERS = {
    "mixtral", "deepseek_v3 grouped", "gpt_oss", "dbrx", "qwen3_next", "jamba", "nemotron_h", "lfm2_moe", "minimax",
    "gemma4_text", "inkling_text", "deepseek_v32",
}  # fmt: skip


def streamed_run(
    folder: Path, data: Calibration, tmp_path: Path, where: Activations = "memory"
) -> tuple[RouterStats, list[Tensor]]:
    stats = TextObservation(found_in(folder), data, tmp_path / "stats", batch_size=2, activations=where).observe().stats
    model, batches = StreamedModel(found_in(folder)), data.batches(2)
    states: States = MemoryStates() if where == "memory" else DiskStates(tmp_path / "states")
    logits: list[Tensor] = []
    model.run_layers(batches, states)
    model.run_head(batches, states, use=lambda index, batch, found: logits.append(found))
    assert all(tensor.is_meta for tensor in [*model.model.parameters(), *model.model.buffers()])
    return stats, logits


def assert_same(found: tuple[RouterStats, list[Tensor]], expected: tuple[RouterStats, list[Tensor]]) -> None:
    for layer, one in expected[0].layers.items():
        assert found[0].layers[layer].to_json() == one.to_json(), layer
    assert found[0].digest() == expected[0].digest()
    assert len(found[1]) == len(expected[1])
    assert all(torch.equal(left, right) for left, right in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("name", families(LAYERS, QUICK))
def test_a_streamed_model_gives_the_bits_of_the_whole_one(name: str, tmp_path: Path) -> None:
    check_bits(name, RAGGED, tmp_path)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_it_does_so_without_padding(name: str, tmp_path: Path) -> None:
    check_bits(name, LENGTHS, tmp_path)


def check_bits(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    vivid(name, tmp_path / "model")
    data = random_data(lengths)
    expected = whole_run(loaded(tmp_path / "model"), data.batches(2))
    assert all(len(set(loads)) > 1 for loads in expected[0].loads().values())
    assert_same(streamed_run(tmp_path / "model", data, tmp_path), expected)


# Both types, and beside attention what keeps some of its numbers wide: linear attention, and Mamba.
NARROW = {
    ("mixtral", torch.bfloat16), ("mixtral", torch.float16), ("qwen3_next", torch.bfloat16), ("jamba", torch.bfloat16),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in NARROW else long)
        for name in ("mixtral", "deepseek_v3 grouped", "qwen3_next", "jamba", "granitemoehybrid")
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_it_does_so_in_narrow_types(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, tmp_path / "wide").to(dtype).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    data = random_data()
    expected = whole_run(loaded(tmp_path / "model"), data.batches(2))
    assert expected[1][0].dtype == dtype
    assert_same(streamed_run(tmp_path / "model", data, tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", pytest.param("phimoe", marks=long)])
def test_it_does_so_with_the_names_of_the_live_model(name: str, tmp_path: Path) -> None:
    vivid(name, tmp_path / "model", save_original_format=False)
    data = random_data()
    assert_same(
        streamed_run(tmp_path / "model", data, tmp_path), whole_run(loaded(tmp_path / "model"), data.batches(2))
    )


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    data = random_data()
    assert_same(
        streamed_run(tmp_path / "model", data, tmp_path), whole_run(loaded(tmp_path / "model"), data.batches(2))
    )
    sizes = StreamedModel(found_in(tmp_path / "model")).part_bytes()
    assert sizes["head"] == 0


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])  # the second has an infinity in its config.json
def test_a_pruned_model_with_different_counts_is_streamed(name: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(name, tmp_path / "source"))
    apply_to_model(tmp_path / "source", random_plan(moe), tmp_path / "model")
    data = random_data()
    expected = whole_run(loaded(tmp_path / "model"), data.batches(2))
    assert len({one.num_experts for one in expected[0].layers.values()}) > 1
    assert_same(streamed_run(tmp_path / "model", data, tmp_path), expected)


def test_a_text_model_inside_another_is_streamed_without_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = tiny_config("qwen3_5_moe_text").to_dict()
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    Nested(AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision)).save_pretrained(
        tmp_path / "model", max_shard_size="60KB"
    )
    found, data = found_in(tmp_path / "model"), random_data()
    whole, _ = load(tmp_path / "model", found)
    expected = whole_run(whole.eval(), data.batches(2), text=whole.model.language_model)
    assert_same(streamed_run(tmp_path / "model", data, tmp_path), expected)
    assert sum(StreamedModel(found).part_bytes().values()) < found.files.num_bytes


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_keys_and_values_that_layers_share_go_along(where: Activations, tmp_path: Path) -> None:
    gemma_4_text(tmp_path / "model", num_kv_shared_layers=1, hidden_size_per_layer_input=8)
    data = random_data()
    expected = whole_run(loaded(tmp_path / "model"), data.batches(2))
    assert_same(streamed_run(tmp_path / "model", data, tmp_path, where), expected)


def test_llama4_is_refused_with_the_reason_but_can_be_streamed(tmp_path: Path) -> None:
    llama4(False).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    data = random_data()
    with pytest.raises(SecateurError, match="'llama4_text' cannot be observed: its experts run on every token"):
        TextObservation(found_in(tmp_path / "model"), data, tmp_path / "stats")
    model, batches, states = StreamedModel(found_in(tmp_path / "model")), data.batches(2), MemoryStates()
    logits: list[Tensor] = []
    model.run_layers(batches, states)
    model.run_head(batches, states, use=lambda index, batch, found: logits.append(found))
    whole: PreTrainedModel = loaded(tmp_path / "model")
    with torch.no_grad():
        expected = [whole(input_ids=batch.input_ids, use_cache=False).logits for batch in batches]
    assert all(torch.equal(left, right) for left, right in zip(logits, expected, strict=True))


def test_layers_that_hand_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = tiny_config("deepseek_v32").to_dict()
    for name in ("model_type", "architectures", "mlp_layer_types", "layer_types", "indexer_types"):
        fields.pop(name, None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm_moe_dsa", **fields))
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    run = TextObservation(found_in(tmp_path / "model"), random_data(), tmp_path / "stats")
    with pytest.raises(SecateurError, match=r"glm_moe_dsa.*decoder layer 0 also returns Tensor; layers of this model"):
        run.observe()
    assert not (tmp_path / "stats").exists()
