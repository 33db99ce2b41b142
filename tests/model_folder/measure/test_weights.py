"""Sums over the weights of a folder are those of the live model, whatever the layout, one expert at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.criteria.score import score_layers
from secateur.criteria.weights import WeightStats
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.model_folder.measure import weights as module
from secateur.model_folder.measure.weights import weight_stats
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from support.model_folders import config_of, saved, tensors_of, write
from support.tiny_models import families

# Experts of their own, transposed and interleaved, rows that share an axis, other names on the disk, a dense layer
# between, rows of a router that are no expert's, a selection bias on another axis.
QUICK = {"mixtral", "qwen3_moe", "gpt_oss", "dbrx", "granitemoe", "jamba", "inkling_text", "ernie4_5_moe"}
FORMS = [pytest.param({}, id="as saved"), pytest.param({"save_original_format": False}, id="live names")]
NEEDS = ("expert weights", "router weights")


def found_in(folder: Path) -> ModelFolder:
    return read_model_folder(folder)


def live_stats(model: PreTrainedModel) -> dict[int, WeightStats]:
    """Of the loaded model, with biases and scales told by their names."""
    moe, stats = describe_moe(model), {}
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for layer, block in moe.blocks.items():
        of = dict.fromkeys(range(block.num_experts), torch.zeros(0))
        routers = dict(of)
        for spec in block.tensors:
            is_expert = spec.name.startswith(f"{block.name}.experts.")
            if "bias" in spec.name or spec.name.endswith("per_expert_scale"):
                continue
            for expert in of:
                first = expert * spec.axis.rows_per_expert
                row = state[spec.name].detach().narrow(spec.axis.dim, first, spec.axis.rows_per_expert).flatten()
                into = of if is_expert else routers
                into[expert] = torch.cat([into[expert], row])
        stats[layer] = WeightStats.of_experts("live", torch.stack([*of.values()])) + WeightStats.of_router(
            "live", torch.stack([*routers.values()])
        )
    return stats


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", families(QUICK, QUICK))
def test_the_sums_are_those_of_the_live_model(name: str, form: dict[str, Any], tmp_path: Path) -> None:
    expected = live_stats(saved(name, tmp_path / "model", **form))
    found = found_in(tmp_path / "model")
    experts, routers = (weight_stats(found, needs) for needs in NEEDS)
    assert experts.keys() == routers.keys() == expected.keys()
    for layer, live in expected.items():
        both = experts[layer] + routers[layer]
        assert both.num_weights.tolist() == live.num_weights.tolist()
        assert not routers[layer].num_weights.any()
        for field in ("absolute_sum", "square_sum", "router_square_sum"):
            assert torch.allclose(getattr(both, field), getattr(live, field), rtol=1e-10, atol=0), field
        assert len({float(value) for value in both.absolute_sum}) > 1, "all experts alike: this could not fail"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_no_more_than_one_expert_of_one_tensor_is_read_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(name, tmp_path / "model")
    found, sizes, seen = found_in(tmp_path / "model"), [], []
    real = module._read

    def read(*args: Any) -> Tensor:
        sizes.append(real(*args))
        return sizes[-1]

    monkeypatch.setattr(module, "_read", read)
    weight_stats(found, "expert weights", on_bytes=lambda done, total: seen.append((done, total)))
    width, hidden = 24, 32
    assert max(value.numel() for value in sizes) <= 2 * width * hidden  # gate and up of one expert
    assert sum(value.nbytes for value in sizes) == seen[-1][0] == seen[-1][1]


def test_each_worker_is_one_thread_of_torch_and_the_others_stay_as_they_are() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with module._workers() as pool:
            assert {*pool.map(lambda _: torch.get_num_threads(), range(8))} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def qwen(folder: Path, change: Any = lambda tensors: None) -> ModelFolder:
    """A tiny Qwen3-MoE with plain numbers in it."""
    saved("qwen3_moe", folder / "made")
    tensors = tensors_of(folder / "made")
    change(tensors)
    return found_in(write(folder / "model", config_of("qwen3_moe"), tensors))


def test_scores_of_a_folder_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = torch.ones_like(tensors[name])
        first = "model.layers.1.mlp.experts.0."
        tensors[f"{first}up_proj.weight"] *= 3  # one third 3, the rest 1: mean 5/3, mean square 11/3
        tensors["model.layers.1.mlp.experts.1.up_proj.weight"].zero_()
        tensors["model.layers.1.mlp.gate.weight"][2] = torch.tensor([3.0, 4.0] + [0.0] * 30)

    found = qwen(tmp_path, change)
    counts = dict.fromkeys(range(3), 8)
    weights = weight_stats(found, "expert weights")
    aimer = score_layers("aimer", counts, weights=weights)[1].tolist()
    assert aimer[:3] == pytest.approx([-5 / 3 / math.sqrt(11 / 3), -math.sqrt(2 / 3), -1.0])
    norm = score_layers("weight_norm", counts, weights=weights)[1].tolist()
    size = 24 * 32
    assert norm[:3] == pytest.approx([math.sqrt(11 * size), math.sqrt(2 * size), math.sqrt(3 * size)])
    rows = score_layers("router_row_norm", counts, weights=weight_stats(found, "router weights"))[1].tolist()
    assert rows[2] == pytest.approx(5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    found = qwen(tmp_path, change)
    stats = weight_stats(found, "expert weights")[2]
    name = "model.layers.2.mlp.experts.5."
    mine = [value for key, value in tensors_of(tmp_path / "model").items() if key.startswith(name)]
    assert float(stats.square_sum[5]) == pytest.approx(
        sum(float(one.double().square().sum()) for one in mine), rel=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "title"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.int32, "I32")]
)
def test_quantised_experts_are_refused_by_name_and_their_routers_still_read(
    dtype: torch.dtype, title: str, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    found = qwen(tmp_path, change)
    with pytest.raises(
        SecateurError, match=rf"{name} has type {title}.*do without them: .*reap, router_row_norm, .*random"
    ):
        weight_stats(found, "expert weights")
    assert weight_stats(found, "router weights").keys() == {0, 1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(value: float, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.7.gate_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 4] = value

    with pytest.raises(SecateurError, match=f"{name} has entries that are not finite"):
        weight_stats(qwen(tmp_path, change), "expert weights")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    found = qwen(tmp_path)
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SecateurError, match="has become shorter while it was read"):
        weight_stats(found, "expert weights")
