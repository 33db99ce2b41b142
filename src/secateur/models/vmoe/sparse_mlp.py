"""The MoE layer of V-MoE: a router, and experts with places.

Legend: B images, M members of an ensemble, L tokens of an image, T = B * M * L tokens, D model width, F expert width,
E experts, N slots of a member (one an expert, and one an expert that was removed and left a zero slot), P pools (see
`routing`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from secateur.models.vmoe.configuration import VMoEConfig
from secateur.models.vmoe.losses import importance_loss, load_loss
from secateur.models.vmoe.routing import Rules, capacity, route, wide


@use_experts_implementation(has_gate=False, has_bias=True)
class VMoEExperts(nn.Module):
    """E MLPs with biases, each `down(act(up(x)))`, stacked on axis 0."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        inner, outer = config.intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, inner, outer))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, inner))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, outer, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, outer))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the experts' outputs (T, D) for inputs (T, D), expert numbers (T, K) and their weights (T, K)."""
        result = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            token, turn = (top_k_index == expert).nonzero().unbind(dim=1)
            inner = nn.functional.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            outer = nn.functional.linear(self.act_fn(inner), self.down_proj[expert], self.down_proj_bias[expert])
            result = result.index_add(0, token, (outer * top_k_weights[token, turn, None]).to(result.dtype))
        return result


class VMoESparseMLP(nn.Module):
    """The MoE layer: a router without bias over all slots, in M equal blocks of the members, and the experts."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = VMoEExperts(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(outputs (B * M, L, D), balance loss or None) of (B * M, L, D)."""
        config = self.config
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        member = self._rows(hidden_states) % config.ensemble_size
        pool, sizes = self._pools(hidden_states)
        slots = _of_members(self.router(tokens), member, config.ensemble_size)
        logits, noise_std = slots, config.router_noise_std / slots.shape[-1]
        if self.training and noise_std:
            logits = slots + noise_std * torch.randn_like(slots)
        pairs = route(logits, _rules(config), pool=pool, places=self._places(sizes, slots))
        result = torch.zeros_like(tokens)
        if len(pairs.token):
            expert = pairs.expert + member[pairs.token] * slots.shape[-1]
            outputs = self.experts(tokens[pairs.token], expert[:, None], pairs.gate[:, None])
            result = result.index_add(0, pairs.token, outputs)
        if not self.training or config.router_type == "expert_choice":
            return result.view_as(hidden_states), None
        parts = []
        for number, own in enumerate(self._experts_of_members(slots.shape[-1])):
            if own:
                mine = member == number
                pools = pool[mine] // config.ensemble_size, len(sizes) // config.ensemble_size
                parts.append(self._balance_loss(wide(slots[mine]), wide(logits[mine]), noise_std, *pools, own))
        return result.view_as(hidden_states), torch.stack(parts).sum() / config.ensemble_size

    def _balance_loss(
        self, slots: Tensor, logits: Tensor, noise_std: float, pool: Tensor, num_pools: int, own: list[int]
    ) -> Tensor:
        """Of the tokens of one member, by their logits (T, N) without and with noise; `own` are its slots with experts.

        Zero slots have no part in it: nothing is gained by sending them tokens.
        """
        config = self.config
        loss = importance_loss(slots.softmax(dim=-1)[:, own], pool, num_pools) * config.importance_loss_coef
        if noise_std:
            order = own + sorted(set(range(slots.shape[-1])) - set(own))
            slots, logits = slots[:, order], logits[:, order]
            load = load_loss(slots, logits, config.num_experts_per_tok, noise_std, pool, num_pools, len(own))
            loss = loss + load * config.load_loss_coef
        return loss

    def _experts_of_members(self, num_slots: int) -> list[list[int]]:
        """Of every member the slots, from 0 to N - 1, whose experts are there."""
        members = self.config.ensemble_size
        kept = getattr(self.experts, "kept_slots", range(num_slots * members))  # without it no expert was removed
        return [sorted(slot % num_slots for slot in kept if slot // num_slots == number) for number in range(members)]

    def _rows(self, hidden_states: Tensor) -> Tensor:
        """(T,) the row of the batch that each token is in."""
        rows, length, _ = hidden_states.shape
        return torch.arange(rows, device=hidden_states.device).repeat_interleave(length)

    def _pools(self, hidden_states: Tensor) -> tuple[Tensor, list[int]]:
        """((T,) pool of each token, tokens of each pool): images of one group and one member."""
        rows, length, _ = hidden_states.shape
        members = self.config.ensemble_size
        images = rows // members
        together = self.config.group_images or images
        row = self._rows(hidden_states)
        pool = row // members // together * members + row % members
        groups = range(0, images, together)
        return pool, [length * min(together, images - first) for first in groups for _ in range(members)]

    def _places(self, sizes: list[int], slots: Tensor) -> Tensor | None:
        """(P,) places of an expert in pools of these sizes; None for no limit."""
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if config.expert_capacity is not None:
            places = [config.expert_capacity] * len(sizes)
        elif factor is not None:
            places = [capacity(size, slots.shape[-1], config.num_experts_per_tok, factor) for size in sizes]
        else:
            return None
        return torch.tensor(places, device=slots.device)


def _rules(config: VMoEConfig) -> Rules:
    return Rules(
        expert_choice=config.router_type == "expert_choice",
        top_k=config.num_experts_per_tok,
        renormalise=config.norm_topk_prob,
        over_tokens=config.expert_choice_gates == "tokens",
        priority=config.batch_priority,
    )


def _of_members(logits: Tensor, member: Tensor, num_members: int) -> Tensor:
    """(T, N): of all slots' logits (T, M * N) those of the token's own member (T,)."""
    if num_members == 1:
        return logits
    index = torch.arange(len(logits), device=logits.device)
    return logits.view(len(logits), num_members, -1)[index, member]
