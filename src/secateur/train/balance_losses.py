"""Load balancing of one MoE layer as pure functions (two auxiliary losses, one bias update) and the tables of kinds.

Common shapes: T = B * S tokens (row-major: token t of sequence b is row b * S + t), E experts of this layer, K experts
a token. Every function reads E from the tensors, so layers may have different numbers of experts.

``index`` (T, K) is always the router's own decision. It is never recomputed from scores: selection biases and group
limits would make a recomputed top-k wrong. ``token_mask`` (B, S) bool is True for real tokens and False for padding;
padding enters no count and no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.observation.real_tokens import real_by_mask

Affinity = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_affinity(logits: Tensor) -> Tensor:
    """Softmax over the experts in float32: (T, E) logits to (T, E) shares, each row sums to 1."""
    return torch.softmax(logits.float(), dim=-1)


def sigmoid_affinity(logits: Tensor) -> Tensor:
    """Normalised sigmoid scores in float32: (T, E) logits to (T, E) shares, each row sums to 1.

    ``s_it = sigmoid(logit_it)`` and ``s'_it = s_it / sum_j s_jt`` (arXiv 2412.19437, eq. 15 and 19).
    """
    scores = torch.sigmoid(logits.float())
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # 1e-20: as the routers do, against 0 / 0


def sequence_counts(index: Tensor, num_experts: int, token_mask: Tensor) -> Tensor:
    """Real tokens that chose each expert, per sequence: (T, K) decisions to (B, E) int64 counts.

    Runs on the device of ``index`` without waiting for the host.
    """
    num_sequences, length = token_mask.shape
    real = token_mask.to(index.device).reshape(-1, 1).expand(-1, index.shape[1])
    sequence = torch.arange(num_sequences, device=index.device).repeat_interleave(length).unsqueeze(1)
    counts = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, (sequence * num_experts + index).reshape(-1), real.reshape(-1).to(torch.int64))
    return counts.view(num_sequences, num_experts)


def mixtral_loss(probabilities: Tensor, index: Tensor, token_mask: Tensor) -> Tensor:
    """Switch/Mixtral auxiliary loss of one layer (arXiv 2101.03961, eq. 4-6), a float32 scalar.

    ``loss = E * sum_i f_i * P_i`` over all N real tokens of the batch, with

    * ``f_i = (1/N) * number of real tokens that chose expert i``. As in transformers the K choices of a token are
      added, so ``sum_i f_i = K`` and the balanced value is K (not 1);
    * ``P_i = (1/N) * sum_t p_it``, ``p`` = softmax of the router logits (``probabilities`` (T, E)).

    Gradient flows through P only. For one layer without a selection bias this equals transformers'
    ``load_balancing_loss_func``; for several layers transformers pools f and P over all layers first (which needs one
    E), while here each layer has its own loss. A batch of padding only gives 0.
    """
    num_experts = probabilities.shape[1]
    counts = sequence_counts(index, num_experts, token_mask).sum(dim=0).float()
    real = token_mask.to(probabilities.device).reshape(-1, 1)
    num_tokens = real.sum().clamp_min(1)
    mean_probability = (probabilities.float() * real).sum(dim=0) / num_tokens
    return num_experts * (counts / num_tokens * mean_probability).sum()


def deepseek_v3_loss(affinities: Tensor, index: Tensor, token_mask: Tensor) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss of one layer (arXiv 2412.19437, eq. 17-20), a float32 scalar.

    For each sequence with T' real tokens: ``loss = sum_i f_i * P_i`` with

    * ``f_i = E / (K * T') * number of real tokens of the sequence that chose expert i`` (eq. 18);
    * ``P_i = (1/T') * sum_t s'_it``, ``s'`` = normalised affinities (``affinities`` (T, E), rows sum to 1; eq. 19-20).

    The result is the mean over the sequences that have a real token (0 if none has); the balanced value is 1.
    Gradient flows through P only. A sequence is a row of the batch. Eq. 18 counts the top K of the affinities; here
    the router's real choice is counted, which differs where a selection bias or a group limit decides.
    """
    num_experts, top_k = affinities.shape[1], index.shape[1]
    real = token_mask.to(affinities.device)
    lengths = real.sum(dim=1)
    divisor = lengths.clamp_min(1).unsqueeze(1)
    load = sequence_counts(index, num_experts, token_mask).float() * num_experts / (top_k * divisor)
    by_sequence = affinities.float().view(*token_mask.shape, num_experts)
    mean_affinity = (by_sequence * real.unsqueeze(2)).sum(dim=1) / divisor
    return (load * mean_affinity).sum() / (lengths > 0).sum().clamp_min(1)


def bias_update(counts: Tensor, update_rate: float) -> Tensor:
    """Change of the selection bias after one optimizer step (arXiv 2408.15664, algorithm 1): (E,) float32.

    ``update_rate * sign(mean(counts) - counts_i)``: up for experts below the mean load, down for those above.
    ``counts`` (E,) int64 are the tokens of the whole step. Signs are taken in exact integer arithmetic.
    """
    return update_rate * torch.sign(counts.sum() - counts * counts.shape[0]).float()


def real_tokens(tokens: Tensor | None, attention_mask: Any, num_rows: int) -> Tensor:
    """Which tokens of a batch are no padding: (B, S) bool.

    ``tokens``: input ids (B, S) or embeddings (B, S, H), B * S = ``num_rows`` routed tokens.
    ``attention_mask``: of a form that `real_by_mask` reads, or None for no padding.

    Raises:
        SecateurError: other shapes; a mask that does not say which tokens are padding.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[:2].numel() != num_rows:
        expected = f"input_ids (B, S) or inputs_embeds (B, S, H) with B * S = {num_rows} routed tokens"
        raise SecateurError(f"model input: found {describe(tokens)}; expected {expected}")
    real = real_by_mask(attention_mask, tokens if tokens.ndim == 2 else tokens[..., 0])
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if real is None else real


def target_share(labels: Tensor, shift_labels: Tensor | None, num_items_in_batch: Tensor | int) -> Tensor:
    """This micro-batch's share of the target tokens of a whole accumulated step, a float scalar.

    ``labels`` (B, S), -100 = no target, position 0 is never one (a causal LM shifts them); ``shift_labels`` are
    already shifted and go first, as in transformers. With it as weight, the weights of a step sum to 1 and its
    auxiliary loss is the token-weighted mean, as transformers weighs the cross-entropy (sum / num_items_in_batch).

    Raises:
        SecateurError: more than one number of items (nn.DataParallel), or labels that are not (B, S).
    """
    num_items = torch.as_tensor(num_items_in_batch)
    if num_items.numel() != 1:
        raise SecateurError(f"num_items_in_batch: found {describe(num_items)}; expected one number, no nn.DataParallel")
    if labels.ndim != 2:
        raise SecateurError(f"labels: found {describe(labels)}; expected (B, S), as a causal language model takes")
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum() / num_items.to(targets.device).reshape(())


def describe(value: object) -> str:
    """Shape and type of a tensor, or of what was found in its place, for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(describe(item) for item in value)})"
    return type(value).__name__


def is_matrix(value: object, *, floating: bool) -> bool:
    """Whether this is a 2-D tensor of floating point (or else of integer) type."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() == floating


@dataclass(frozen=True, kw_only=True)
class BalanceKind:
    """A loss (affinities (T, E), index (T, K), token_mask (B, S)) -> scalar, or a bias update, or neither.

    ``coefficient`` (weight of the loss) and ``update_rate`` (step of the bias) are defaults; None = not used.
    """

    loss: Loss | None = None
    scoring: Mapping[str, Affinity] | None = None  # by model type; None = softmax for every family
    coefficient: float | None = None
    update_rate: float | None = None


# How each family turns logits into scores, as read in its router. gpt_oss and granitemoe* take the softmax over the
# chosen K only; their affinities here are the softmax over all experts (the same up to a factor for each token).
# phimoe samples its choice; its affinities are the softmax that it samples from, without its threshold.
SCORING: dict[str, Affinity] = {
    "afmoe": sigmoid_affinity,
    "bam": softmax_affinity,
    "deepseek_v2": softmax_affinity,
    "deepseek_v3": sigmoid_affinity,
    "dots1": sigmoid_affinity,
    "ernie4_5_moe": softmax_affinity,
    "flex_olmo": softmax_affinity,
    "glm4_moe": sigmoid_affinity,
    "gpt_oss": softmax_affinity,
    "granitemoe": softmax_affinity,
    "granitemoehybrid": softmax_affinity,
    "hunyuan_v1_moe": softmax_affinity,
    "jamba": softmax_affinity,
    "lfm2_moe": sigmoid_affinity,
    "minimax": softmax_affinity,
    "minimax_m2": sigmoid_affinity,
    "mixtral": softmax_affinity,
    "nemotron_h": sigmoid_affinity,
    "olmoe": softmax_affinity,
    "phimoe": softmax_affinity,
    "qwen2_moe": softmax_affinity,
    "qwen3_5_moe_text": softmax_affinity,
    "qwen3_moe": softmax_affinity,
    "qwen3_next": softmax_affinity,
}

# Where the selection bias of a family lies: (attribute of the MoE block record, attribute path below that module).
# In all of them the bias decides which experts are chosen and does not enter the weights.
SELECTION_BIAS: dict[str, tuple[str, str]] = {
    "afmoe": ("block", "expert_bias"),
    "deepseek_v3": ("router", "e_score_correction_bias"),
    "dots1": ("router", "e_score_correction_bias"),
    "ernie4_5_moe": ("router", "moe_statics.e_score_correction_bias"),
    "glm4_moe": ("router", "e_score_correction_bias"),
    "lfm2_moe": ("block", "expert_bias"),
    "minimax_m2": ("block", "e_score_correction_bias"),
    "nemotron_h": ("router", "e_score_correction_bias"),
}

BALANCE: dict[str, BalanceKind] = {
    "none": BalanceKind(),
    "mixtral": BalanceKind(loss=mixtral_loss, coefficient=0.001),  # transformers' router_aux_loss_coef
    "deepseek_v3": BalanceKind(loss=deepseek_v3_loss, scoring=SCORING, coefficient=0.0001),  # alpha, arXiv 2412.19437
    "bias": BalanceKind(update_rate=0.001),  # gamma of arXiv 2412.19437, u of arXiv 2408.15664
}
