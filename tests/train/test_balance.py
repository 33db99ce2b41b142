from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from secateur.errors import SecateurError
from secateur.train.balance import BalanceCallback, BalanceHandle, attach_balance
from secateur.train.balance_losses import (
    BALANCE,
    SCORING,
    bias_update,
    deepseek_v3_loss,
    mixtral_loss,
    real_tokens,
    sequence_counts,
    sigmoid_affinity,
    softmax_affinity,
    target_share,
)

E, K, VOCAB = 8, 2, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
}
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E},
    "qwen3_moe": {"num_experts": E, "head_dim": 16},
    "olmoe": {"num_experts": E},
    "gpt_oss": {"num_local_experts": E, "head_dim": 16},
    "minimax_m2": {"num_local_experts": E, "head_dim": 16, "rotary_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": K, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "deepseek_v3": {
        "n_routed_experts": E,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3"]
LOSSES = ["mixtral", "deepseek_v3"]


@dataclass(frozen=True, kw_only=True)
class Block:
    layer: int
    name: str
    block: nn.Module
    experts: Any
    router: Any


def tiny(model_type: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | FIELDS[model_type] | fields))
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for block in blocks(model).values():
        nn.init.normal_(block.router.weight, std=0.3)  # uneven loads
    return model.train()


def blocks(model: Any) -> dict[int, Block]:
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "experts")]
    return {
        layer: Block(
            layer=layer,
            name=name,
            block=module,
            experts=module.experts,
            router=getattr(module, "gate", None) or module.router,
        )
        for layer, (name, module) in enumerate(found)
    }


def attach(model: Any, kind: str, **options: Any) -> BalanceHandle:
    return attach_balance(model, kind, blocks=blocks(model), **options)


def batch(rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def watch(model: Any) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """(logits, index) of every call, taken by hooks of the test's own."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in blocks(model)}
    for layer, block in blocks(model).items():
        block.router.register_forward_hook(
            lambda _m, _a, out, layer=layer: seen[layer].append((out[0].detach(), out[2].detach()))
        )
    return seen


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shrink_(model: Any, layer: int, keep: list[int]) -> None:
    block = blocks(model)[layer]
    for module, names in ((block.router, ("weight",)), (block.experts, ("gate_up_proj", "down_proj"))):
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name).detach()[keep].clone()))
        module.num_experts = len(keep)
    if hasattr(block.router, "e_score_correction_bias"):
        block.router.e_score_correction_bias = block.router.e_score_correction_bias[keep].clone()


# --- the pure functions -------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]])
INDEX = torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]])
REAL = torch.tensor([[True, True], [True, False]])  # the last token is padding


def test_mixtral_loss_golden() -> None:
    # first sequence alone: f = (1, 2, 1) / 2, P = (0.3, 0.45, 0.25): 3 * (0.15 + 0.45 + 0.125)
    assert mixtral_loss(PROBABILITIES[:2], INDEX[:2], REAL[:1]).item() == pytest.approx(2.175)
    # three real tokens: f = (2, 2, 2) / 3, so 3 * 2/3 * sum(P) = 2 whatever P is
    assert mixtral_loss(PROBABILITIES, INDEX, REAL).item() == pytest.approx(2.0)


def test_deepseek_v3_loss_golden() -> None:
    # sequence 1: f = 3/4 * (1, 2, 1), P = (0.3, 0.45, 0.25): 1.0875
    # sequence 2, one token: f = 3/2 * (1, 0, 1), P = (0.2, 0.2, 0.6): 1.2
    assert deepseek_v3_loss(PROBABILITIES, INDEX, REAL).item() == pytest.approx((1.0875 + 1.2) / 2)


def test_sequences_of_padding_only_do_not_count() -> None:
    real = torch.tensor([[True, True], [False, False]])
    assert deepseek_v3_loss(PROBABILITIES, INDEX, real).item() == pytest.approx(1.0875)
    for loss in (deepseek_v3_loss, mixtral_loss):
        assert loss(PROBABILITIES, INDEX, torch.zeros_like(real)).item() == 0.0


def test_uniform_routing_gives_the_balanced_values() -> None:
    uniform, index = torch.full((4, 4), 0.25), torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    real = torch.ones(1, 4, dtype=torch.bool)
    assert mixtral_loss(uniform, index, real).item() == pytest.approx(2.0)  # K
    assert deepseek_v3_loss(uniform, index, real).item() == pytest.approx(1.0)


def test_affinities_golden() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.log(3.0)]])  # sigmoid: 0.5, 0.5, 0.25; softmax weights: 3 : 3 : 1
    torch.testing.assert_close(sigmoid_affinity(logits), torch.tensor([[0.4, 0.4, 0.2]]))
    torch.testing.assert_close(softmax_affinity(logits), torch.tensor([[3.0, 3.0, 1.0]]) / 7)


def test_counts_and_bias_update_golden() -> None:
    assert sequence_counts(INDEX, 3, REAL).tolist() == [[1, 2, 1], [1, 0, 1]]
    torch.testing.assert_close(bias_update(torch.tensor([1, 5, 3, 3]), 0.1), torch.tensor([0.1, -0.1, 0.0, 0.0]))
    # above 2**24 a float32 could not tell these loads apart
    assert bias_update(torch.tensor([2**25 + 1, 2**25 - 1, 2**25]), 1.0).tolist() == [-1.0, 1.0, 0.0]


def test_nothing_waits_for_the_host() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises where a value would be read
        real = real_tokens(INDEX.view(2, 4), REAL.repeat(1, 2).long(), 8)
        for loss in (mixtral_loss, deepseek_v3_loss):
            loss(softmax_affinity(PROBABILITIES), INDEX, real[:, :2])
        bias_update(sequence_counts(INDEX, 3, REAL).sum(0), 0.1)
        target_share(INDEX, None, torch.tensor(3))


# --- live, loss kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(8, 8), (8, 5)])
def test_mixtral_value_equals_transformers_function_layer_by_layer(family: str, sizes: tuple[int, int]) -> None:
    model, inputs = tiny(family), batch()
    inputs["attention_mask"][1, 4:] = 0
    handle, seen = attach(model, "mixtral", coefficient=0.5), watch(model)
    shrink_(model, 1, list(range(sizes[1])))  # after the attach: the hooks hold no count
    loss = model(**inputs).loss
    mask = inputs["attention_mask"]
    expected = [torch.as_tensor(load_balancing_loss_func((seen[i][0][0],), sizes[i], K, mask)) for i in range(2)]
    assert handle.last_value is not None
    assert not handle.last_value.requires_grad
    torch.testing.assert_close(handle.last_value, torch.stack(expected).mean())
    handle.detach()
    torch.testing.assert_close(loss - model(**inputs).loss, 0.5 * handle.last_value)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_layer_model_has_the_loss_and_gradients_of_transformers(family: str) -> None:
    inputs = batch()
    theirs = tiny(family, num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.3)
    ours = tiny(family, num_hidden_layers=1)
    attach(ours, "mixtral", coefficient=0.3)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("kind", LOSSES)
def test_the_routers_real_decision_is_counted(kind: str) -> None:
    model, inputs = tiny("deepseek_v3"), batch()
    blocks(model)[0].router.e_score_correction_bias[7] = 10.0  # every token goes to expert 7
    handle, seen = attach(model, kind), watch(model)
    model(**inputs)
    real = inputs["attention_mask"].bool()

    def value(index_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        loss, affinity = {"mixtral": (mixtral_loss, softmax_affinity)}.get(kind, (deepseek_v3_loss, sigmoid_affinity))
        return torch.stack([loss(affinity(lo), index_of(lo, ix), real) for [(lo, ix)] in seen.values()]).mean()

    assert handle.last_value is not None
    torch.testing.assert_close(handle.last_value, value(lambda logits, index: index))
    assert not torch.allclose(handle.last_value, value(lambda logits, index: logits.topk(K).indices))


def test_deepseek_value_is_right_for_layers_of_different_sizes() -> None:
    model, inputs = tiny("qwen3_moe"), batch()
    shrink_(model, 0, [1, 3, 6])
    handle, seen = attach(model, "deepseek_v3", coefficient=1.0), watch(model)
    model(**inputs)
    by_hand = []
    for size, [(logits, index)] in zip((3, 8), seen.values(), strict=True):
        for row in range(2):
            chosen = index.view(2, 6, K)[row].flatten()
            load = torch.bincount(chosen, minlength=size) * size / (K * 6)
            by_hand.append((load * logits.view(2, 6, size)[row].softmax(-1).mean(0)).sum())
    assert handle.last_value is not None
    torch.testing.assert_close(handle.last_value, torch.stack(by_hand).mean())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_gradients_of_none(family: str, kind: str) -> None:
    model, inputs = tiny(family), batch(rows=2)
    inputs["attention_mask"][1, 4:] = 0
    without_loss = gradients(model, inputs)
    handle = attach(model, kind, coefficient=1.0)
    plain, value = gradients(model, inputs), handle.last_value
    model.activation_checkpointing_enable()  # transformers' default: use_reentrant=False
    checkpointed = gradients(model, inputs)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    torch.testing.assert_close(handle.last_value, value, rtol=0, atol=0)
    routers = [name for name in plain if name.endswith(("gate.weight", "router.weight"))]
    assert len(routers) == 2
    for name in routers:  # the loss really reaches them
        assert (plain[name] - without_loss[name]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", LOSSES)
def test_reentrant_gradient_checkpointing_is_refused_by_name(kind: str) -> None:
    model = tiny("mixtral")
    attach(model, kind)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SecateurError, match=r"mixtral, model\.layers\.0\.mlp.*reentrant.*'use_reentrant': False"):
        model(**batch())


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    model, inputs = tiny("deepseek_v3"), batch(rows=4)
    inputs["labels"][:, 4] = -100
    attach(model, "deepseek_v3", coefficient=1.0)
    num_items = inputs["labels"][:, 1:].ne(-100).sum()
    whole = gradients(model, {**inputs, "num_items_in_batch": num_items})
    torch.testing.assert_close(whole, gradients(model, inputs))  # one batch: the plain mean
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(**{k: v[rows] for k, v in inputs.items()}, num_items_in_batch=num_items).loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)


@pytest.mark.parametrize("shifted", [False, True])
def test_an_accumulated_step_has_the_token_weighted_mean(shifted: bool) -> None:
    model, inputs, targets = tiny("mixtral"), batch(), [5, 2]
    inputs["labels"][1, 3:] = -100  # position 0 is never a target: 5 and 2 of 6 are left
    if shifted:  # goes before the labels, as in transformers
        inputs["shift_labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        inputs["shift_labels"][0, 0], targets = -100, [4, 2]
    micro = [{k: v[row : row + 1] for k, v in inputs.items()} for row in range(2)]

    def total() -> Tensor:
        return torch.stack([model(**m, num_items_in_batch=sum(targets)).loss for m in micro]).sum()

    plain, values = total(), []
    handle = attach(model, "mixtral", coefficient=2.0)
    for m in micro:
        model(**m)
        assert handle.last_value is not None
        values.append(handle.last_value)
    expected = 2.0 * (targets[0] * values[0] + targets[1] * values[1]) / sum(targets)
    torch.testing.assert_close(total() - plain, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_equals_shorter_sequences(family: str, kind: str) -> None:
    model, inputs = tiny(family), batch(rows=1)
    handle = attach(model, kind)
    model(**{k: v[:, :4] for k, v in inputs.items()})
    short = handle.last_value
    model(**inputs)
    assert handle.last_value is not None
    assert short is not None
    assert not torch.allclose(handle.last_value, short)
    inputs["attention_mask"][:, 4:] = 0
    model(**inputs)
    torch.testing.assert_close(handle.last_value, short)


def test_evaluation_and_forwards_without_labels_or_gradients_are_untouched() -> None:
    model, inputs = tiny("mixtral"), batch()
    with torch.no_grad():
        plain = model(**inputs).loss
        attach(model, "mixtral", coefficient=10.0)
        assert torch.equal(model(**inputs).loss, plain)
    assert torch.equal(model.eval()(**inputs).loss, plain)
    assert model.train()(input_ids=inputs["input_ids"]).loss is None
    assert model(**inputs).loss > plain + 10
    for _ in range(2):  # parts of the model called alone are no forward of it
        model.model(input_ids=inputs["input_ids"])


def test_positional_arguments_and_embeddings_are_understood() -> None:
    model, inputs = tiny("mixtral"), batch()
    inputs["attention_mask"][1, 3:] = 0
    attach(model, "mixtral", coefficient=1.0)
    expected = model(**inputs).loss
    labels = inputs["labels"]
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss, expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss, expected)


def test_none_and_detach_leave_the_model_as_it_was() -> None:
    model, inputs = tiny("mixtral"), batch()
    plain = model(**inputs).loss
    handle = attach(model, "none")
    assert torch.equal(model(**inputs).loss, plain)
    assert handle.last_value is None
    handle.after_optimizer_step()
    handle = attach(model, "mixtral")
    assert not torch.equal(model(**inputs).loss, plain)
    handle.detach()
    assert torch.equal(model(**inputs).loss, plain)
    attach(model, "mixtral")


# --- live, bias kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bias_of"),
    [
        ("deepseek_v3", lambda block: block.router.e_score_correction_bias),
        ("minimax_m2", lambda block: block.block.e_score_correction_bias),
        ("ernie4_5_moe", lambda block: block.router.moe_statics.e_score_correction_bias),  # (1, E), a parameter
    ],
)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_bias_follows_the_loads_of_all_micro_batches(
    family: str, bias_of: Callable[[Block], Tensor], reentrant: bool | None
) -> None:
    model, inputs = tiny(family), batch()
    inputs["attention_mask"][1, 3:] = 0
    handle, seen = attach(model, "bias", update_rate=0.25), watch(model)
    plain = model.eval()(**inputs).loss
    assert torch.equal(model.train()(**inputs).loss, plain)  # no auxiliary loss; this forward is counted
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=inputs["input_ids"][:1], labels=inputs["labels"][:1]).loss.backward()
    handle.after_optimizer_step()
    real = inputs["attention_mask"].bool()
    for layer, block in blocks(model).items():
        _, (_, first), (_, second), *_ = seen[layer]  # the first is the evaluation, later ones recomputations
        chosen = torch.cat([first.view(2, 6, K)[real].flatten(), second.flatten()])
        counts = torch.bincount(chosen, minlength=E).float()
        assert bias_of(block).flatten().tolist() == (0.25 * (counts.mean() - counts).sign()).tolist()
        assert counts.max() > counts.min()
    with pytest.raises(SecateurError, match="found none; expected at least one training forward since"):
        handle.after_optimizer_step()


def test_counters_are_gathered_with_a_pruning_inside_a_step() -> None:
    model, inputs = tiny("deepseek_v3"), batch()
    handle, seen = attach(model, "bias", update_rate=1.0), watch(model)
    order = [6, 0, 3, 2, 5]
    model(**inputs)
    handle.gather_(1, order)
    shrink_(model, 1, order)
    model(**inputs)
    handle.after_optimizer_step()
    before, after = (index.flatten() for _, index in seen[1])
    counts = (torch.bincount(before, minlength=E)[order] + torch.bincount(after, minlength=5)).float()
    assert blocks(model)[1].router.e_score_correction_bias.tolist() == (counts.mean() - counts).sign().tolist()
    model(**inputs)
    shrink_(model, 0, order)
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp: selection bias: found 5 entries, 8 experts counted"):
        handle.after_optimizer_step()
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp: router: found 5 experts after 8"):
        model(**inputs)
    with pytest.raises(SecateurError, match="layer: found 9; expected one of the MoE layers"):
        handle.gather_(9, order)


def test_a_failed_forward_counts_nothing() -> None:
    model, inputs = tiny("deepseek_v3"), batch()
    handle = attach(model, "bias")
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:1])  # fails after all layers have run
    with pytest.raises(SecateurError, match="at least one training forward"):
        handle.after_optimizer_step()


# --- transformers' Trainer ------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.read())


def train(model: Any, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> None:
    data = [{k: v[row] for k, v in batch(rows=4).items()} for row in range(4)]
    settings: dict[str, Any] = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
    }
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    Trainer(model, TrainingArguments(**fixed, **(settings | options)), train_dataset=data, callbacks=callbacks).train()


def test_trainer_with_accumulation_trains_as_with_one_big_batch(tmp_path: Path) -> None:
    trained = []
    for size, steps in ((4, 1), (2, 2)):
        model = tiny("deepseek_v3")
        callback = BalanceCallback(attach(model, "deepseek_v3", coefficient=1.0))
        train(model, tmp_path, [callback], per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trained.append(dict(model.named_parameters()))
    torch.testing.assert_close(trained[0], trained[1])
    untouched = tiny("deepseek_v3")
    train(untouched, tmp_path, [], per_device_train_batch_size=4)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(trained[0][name], untouched.get_parameter(name), atol=1e-4)


def test_trainer_updates_the_bias_before_any_on_step_end(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    router = blocks(model)[0].router
    recorder = Recorder(lambda: router.e_score_correction_bias.abs().max().item())
    callbacks = [recorder, BalanceCallback(attach(model, "bias", update_rate=0.5))]
    train(model, tmp_path, callbacks, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert recorder.seen[0] == 0.5
    assert len(recorder.seen) == 2


def test_trainer_that_withholds_the_labels_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral")
    callback = BalanceCallback(attach(model, "mixtral"))
    with pytest.raises(SecateurError, match=r"with labels \(label smoothing"):
        train(model, tmp_path, [callback], label_smoothing_factor=0.1)


# --- tables and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FIELDS if name in SCORING])
def test_scoring_table_is_what_the_routers_do(family: str) -> None:
    model = tiny(family)
    router, outputs = blocks(model)[0].router, []
    router.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    model(**batch())
    [(logits, weights, index)] = outputs
    chosen = SCORING[family](logits).gather(1, index)
    shares = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, chosen / chosen.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "options", "message"),
    [
        ("mixtral", "switch", {}, r"found 'switch'; expected one of \['bias', 'deepseek_v3', 'mixtral', 'none'\]"),
        ("qwen3_moe", "bias", {}, "on qwen3_moe: found no selection bias.*deepseek_v3.*minimax_m2"),
        ("deepseek_v3", "bias", {"coefficient": 0.1}, "coefficient: found 0.1; expected none"),
        ("mixtral", "mixtral", {"update_rate": 0.1}, "update_rate: found 0.1; expected none"),
        ("mixtral", "none", {"coefficient": 0.1}, "coefficient: found 0.1; expected none"),
        ("mixtral", "mixtral", {"coefficient": 0.0}, "coefficient: found 0.0; expected a number > 0"),
        ("deepseek_v3", "bias", {"update_rate": math.inf}, "update_rate: found inf; expected a number > 0"),
        ("mixtral", "deepseek_v3", {"model_type": "new_moe"}, "scoring is known for .*found new_moe"),
        ("mixtral", "mixtral", {"blocks": {}}, "found no MoE layers"),
    ],
)
def test_what_cannot_be_attached_is_refused(family: str, kind: str, options: dict[str, Any], message: str) -> None:
    model = tiny(family)
    with pytest.raises(SecateurError, match=message):
        attach_balance(model, kind, **({"blocks": blocks(model)} | options))


def test_a_second_balance_on_one_model_is_refused() -> None:
    model = tiny("mixtral")
    attach(model, "mixtral")
    with pytest.raises(SecateurError, match="has a balance already"):
        attach(model, "deepseek_v3")


def test_transformers_own_loss_beside_ours_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"config\.output_router_logits: found True"):
        attach(tiny("mixtral", output_router_logits=True), "mixtral")
    model = tiny("mixtral")
    attach(model, "mixtral")
    with pytest.raises(SecateurError, match="output_router_logits: found True"):
        model(**batch(), output_router_logits=True)


def test_padding_is_left_out_by_a_mask_of_the_scripts_own_making() -> None:
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, 4:] = False
    mask = (torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, :])[:, None]
    values = []
    for given in (real.long(), mask):
        model = tiny("mixtral")
        handle = attach(model, "mixtral")
        model(**(batch() | {"attention_mask": given}))
        values.append(handle.last_value)
    assert values[0] is not None
    assert torch.equal(values[0], values[1])


def test_a_16_bit_selection_bias_is_refused() -> None:
    model = tiny("deepseek_v3")
    router = blocks(model)[1].router
    router.e_score_correction_bias = router.e_score_correction_bias.bfloat16()
    with pytest.raises(SecateurError, match=r"layers\.1\.mlp.*bfloat16 \(8,\); expected a float32"):
        attach(model, "bias")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items_in_batch": torch.tensor([5, 5])}, r"num_items_in_batch: found int64 \(2,\)"),
        ({"return_dict": False}, "model output: found tuple; expected a dict-like"),
    ],
)
def test_a_forward_that_cannot_be_weighed_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("mixtral")
    attach(model, "mixtral")
    with pytest.raises(SecateurError, match=message):
        model(**(batch() | changes))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda out: out[0], r"model\.layers\.0\.mlp: router output: found float32 \(12, 8\); expected \(logits"),
        (lambda out: (out[0].view(2, 6, 8), *out[1:]), r"router output: found \(float32 \(2, 6, 8\), "),
        (
            lambda out: (out[0], out[2], out[1]),
            r"experts arguments: found \(float32 \(12, 32\), float32 \(12, 2\), int64",
        ),
        (lambda out: (out[0][:6], *out[1:]), r"experts arguments: .* here float32 \(6, 8\)"),
    ],
)
def test_a_router_of_another_form_is_refused_by_name(broken: Callable[[Any], Any], message: str) -> None:
    model = tiny("mixtral")
    blocks(model)[0].router.register_forward_hook(lambda _m, _a, out: broken(out))
    attach(model, "mixtral")
    with pytest.raises(SecateurError, match="on mixtral, .*" + message):
        model(**batch())


def test_a_layer_that_did_not_run_is_refused() -> None:
    model = tiny("mixtral")
    attach(model, "mixtral")
    model.config.num_hidden_layers = 1  # the model's loop stops there
    with pytest.raises(SecateurError, match=r"layers\.1\.mlp: experts: found no call"):
        model(**batch())


def test_default_strengths_are_those_of_the_sources() -> None:
    assert {k: v.coefficient or v.update_rate for k, v in BALANCE.items()} == {
        "none": None,
        "mixtral": 0.001,
        "deepseek_v3": 0.0001,
        "bias": 0.001,
    }
