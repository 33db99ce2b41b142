"""Checkpoints with torchtitan's names and layout: model flat at the top, everything else under its own key.

The modules are ours; what they are called is torchtitan's (docs/engines.md says of which versions).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.plans import LayerPlan, Plan
from secateur.training_checkpoint.apply import apply_to_checkpoint
from secateur.training_checkpoint.metadata import read_dcp
from secateur.training_checkpoint.rows import read_bytes
from support.dcp_checkpoints import NUM_EXPERTS, load, save, tensors_of

WIDTH, INNER = 6, 5
PLAN = Plan(
    layers={
        1: LayerPlan(experts_before=NUM_EXPERTS, order=(6, 1)),
        2: LayerPlan(experts_before=NUM_EXPERTS, order=(7, 6, 5, 4, 3, 2, 1, 0)),
        3: LayerPlan(experts_before=NUM_EXPERTS, order=(0, 2, 3, 4, 7)),
    },
    criterion="test",
)
CURRENT = {"experts": "routed_experts.inner_experts", "w1": "w1_EFD", "w2": "w2_EDF", "w3": "w3_EFD", "end": "_E"}
RELEASED = {"experts": "experts", "w1": "w1", "w2": "w2", "w3": "w3", "end": ""}
generations = pytest.mark.parametrize("words", [CURRENT, RELEASED], ids=["current", "0.2.2"])


def module(**parts: nn.Module | nn.Parameter) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        owner = made
        *path, last = name.split("__")
        for piece in path:
            if not hasattr(owner, piece):
                setattr(owner, piece, nn.Module())
            owner = getattr(owner, piece)
        setattr(owner, last, part)
    return made


def moe(words: dict[str, str], num_experts: int) -> nn.Module:
    where = words["experts"].replace(".", "__")
    shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
    parts: dict[str, Any] = {
        f"{where}__{words[name]}": nn.Parameter(torch.randn(num_experts, *shape)) for name, shape in shapes.items()
    }
    block = module(**parts, router__gate=nn.Linear(WIDTH, num_experts, bias=False))
    block.shared_experts = module(w1=nn.Linear(WIDTH, INNER, bias=False), w2=nn.Linear(INNER, WIDTH, bias=False))
    block.register_buffer(f"expert_bias{words['end']}", torch.randn(num_experts))
    block.register_buffer(f"tokens_per_expert{words['end']}", torch.arange(1.0, num_experts + 1))
    return block


def build(words: dict[str, str], counts: tuple[int, int, int] = (NUM_EXPERTS,) * 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.tok_embeddings = nn.Embedding(11, WIDTH)
    dense = module(feed_forward__w1=nn.Linear(WIDTH, INNER, bias=False))
    model.layers = nn.ModuleDict({"0": dense, **{str(1 + i): module(moe=moe(words, n)) for i, n in enumerate(counts)}})
    return model


def stepped(model: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    return optimizer


def give_gradients(model: nn.Module, seed: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))


def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer state under `state.NAME.KEY` and `param_groups.NAME.KEY`."""
    found: dict[str, Any] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found |= {f"state.{names[parameter]}.{key}": value for key, value in optimizer.state[parameter].items()}
            found |= {
                f"param_groups.{names[parameter]}.{key}": value for key, value in group.items() if key != "params"
            }
    return found


def write(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    everything = {
        **model.state_dict(),
        "optimizer": flat(model, optimizer),
        "lr_scheduler": {"last_epoch": 2},
        "dataloader": {"dp_rank_0": b"\x80\x04opaque", "world_size": 1},
        "train_state": {"step": torch.tensor(2), "log": io.BytesIO(b"any object")},
    }
    return save(everything, folder)


def rows(name: str, value: Tensor) -> Tensor:
    layer, _, part = name.partition("layers.")[2].partition(".")
    if not layer or int(layer) not in PLAN.layers or "moe." not in part or "shared" in part or not value.dim():
        return value
    return value[list(PLAN.layers[int(layer)].order)]


@generations
def test_every_tensor_is_the_rows_of_the_source_and_every_other_entry_the_same_bytes(
    tmp_path: Path, words: dict[str, str]
) -> None:
    model = build(words)
    source = write(model, stepped(model), tmp_path / "source")
    report = apply_to_checkpoint(source, PLAN, tmp_path / "out", expert_parallel=1)

    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        counter = "tokens_per_expert" in name
        expected = torch.zeros_like(rows(name, value)) if counter else rows(name, value)
        assert torch.equal(expected, after[name]), name
    old, new = read_dcp(source), read_dcp(tmp_path / "out")
    assert (
        old.blobs.keys() == new.blobs.keys() >= {"dataloader.dp_rank_0", "train_state.log", "lr_scheduler.last_epoch"}
    )
    for name, blob in old.blobs.items():
        assert read_bytes(blob) == read_bytes(new.blobs[name]), name
    assert old.paths == new.paths
    # 3 layers: router, bias, counter and 3 expert tensors; two moments of all but the buffers
    assert report["checkpoints"][0]["tensors_changed"] == 3 * (6 + 2 * 4)  # type: ignore[index,call-overload]
    assert report["checkpoints"][0]["counters_reset"] == 3  # type: ignore[index,call-overload]


@generations
def test_training_goes_on_with_other_counts_in_every_layer_as_if_pruned_in_memory(
    tmp_path: Path, words: dict[str, str]
) -> None:
    model = build(words)
    optimizer = stepped(model)
    apply_to_checkpoint(write(model, optimizer, tmp_path / "source"), PLAN, tmp_path / "out")

    small = build(words, counts=(2, 8, 5))
    small_optimizer = stepped(small)
    state = {**small.state_dict(), "optimizer": flat(small, small_optimizer)}
    load(state, tmp_path / "out")  # in place
    for one, other in ((model, optimizer), (small, small_optimizer)):
        give_gradients(one, seed=7)
        if one is small:
            for (name, mine), theirs in zip(small.named_parameters(), model.parameters(), strict=True):
                assert theirs.grad is not None
                mine.grad = rows(name, theirs.grad)
        other.step()
    for name, value in model.named_parameters():
        assert torch.equal(rows(name, value), small.get_parameter(name)), name


def test_a_layer_without_any_change_keeps_its_counters(tmp_path: Path) -> None:
    model = build(CURRENT)
    source = write(model, stepped(model), tmp_path / "source")
    same = LayerPlan(experts_before=NUM_EXPERTS, order=tuple(range(NUM_EXPERTS)))
    report = apply_to_checkpoint(source, Plan(layers={1: same}, criterion="none"), tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report["bytes_before"] == report["bytes_after"]


def test_counts_that_the_restart_cannot_shard_are_refused(tmp_path: Path) -> None:
    model = build(CURRENT)
    source = write(model, stepped(model), tmp_path / "source")
    with pytest.raises(SecateurError, match="layer 3: 5 experts after the plan, expected a multiple of 2"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out", expert_parallel=2)
    assert not (tmp_path / "out").exists()
