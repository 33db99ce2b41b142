"""A mixture of experts small enough to see through: which experts did training need, and does the router tell?

The data model is that of arXiv 2405.16646: a sample is a set of orthonormal patterns, one of which is o_1 (label +1)
or o_2 (label -1); the rest are task-irrelevant. In pattern coordinates a token is the number of its pattern, o_1 is 0
and o_2 is 1, so that <w, x> is an entry of w. All constants and the starting point are ours.

Legend: R runs (seeds) side by side, B samples, n tokens of a sample, E experts, l tokens an expert takes, K experts a
token takes, d patterns, m neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RELEVANT = (0, 1, 4, 5)  # experts that start near o_1 (the first two) or o_2
EXPERTS = 8
SIGNS = (1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One experiment.

    Args:
        routing: "expert" (each expert takes its `tokens` best tokens; gates are a softmax over those) or "token" (each
            token takes its `experts` best experts; gates are a softmax over those).
        size: of a router row at the start. irrelevant_size: of those of experts that the task does not need.
        avoid: how much below 0 irrelevant experts start on o_1 and o_2. harmful: expert 3, whose output has the wrong
            sign for it, starts near o_2 and with neurons that already answer to it.
    """

    d: int = 64
    n: int = 16
    tokens: int = 4
    experts: int = 2
    m: int = 16
    batch: int = 64
    steps: int = 300
    rate_router: float = 0.5
    rate_expert: float = 0.1
    noise: float = 0.02
    head_start: float = 0.05
    size: float = 1.0
    irrelevant_size: float = 1.0
    avoid: float = 0.0
    harmful: bool = False
    routing: str = "expert"


VARIANTS = {
    "V0": Setting(),
    "V1": Setting(irrelevant_size=1.5),
    "V2": Setting(avoid=1.0),
    "V3": Setting(harmful=True),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """The weights of R models. router: (R, E, d). neurons: (R, E, m, d)."""

    setting: Setting
    router: Tensor
    neurons: Tensor

    def scores(self, start: Experts) -> dict[str, Tensor]:
        """(R, E) each: the signed change of the router norm, and the scores it is compared with."""
        now, then = self.router.norm(dim=2), start.router.norm(dim=2)
        return {
            "signed change": now - then,
            "absolute change": (now - then).abs(),
            "norm of difference": (self.router - start.router).norm(dim=2),
            "final norm": now,
        }


def start(setting: Setting, seeds: Sequence[int]) -> Experts:
    """The models before training."""
    routers, neurons = [], []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        others = (2 + torch.randperm(setting.d - 2, generator=draw)[:EXPERTS]).tolist()
        targets = [0 if e < 2 else 1 if e in RELEVANT else others[e] for e in range(EXPERTS)]
        if setting.harmful:
            targets[3] = 1
        router = setting.noise * torch.randn(EXPERTS, setting.d, generator=draw)
        neuron = setting.noise * torch.randn(EXPERTS, setting.m, setting.d, generator=draw)
        for expert, target in enumerate(targets):
            relevant = expert in RELEVANT
            router[expert, target] += setting.size if relevant else setting.irrelevant_size
            neuron[expert, :, target] += setting.head_start
            if not relevant and setting.avoid:
                router[expert, :2] -= setting.avoid
        if setting.harmful:
            neuron[3, :, 1] += 0.5
        routers.append(router)
        neurons.append(neuron)
    return Experts(setting=setting, router=torch.stack(routers), neurons=torch.stack(neurons))


def samples(setting: Setting, num_runs: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(R, count, n) pattern numbers and (R, count) labels."""
    tokens = 2 + torch.rand(num_runs, count, setting.d - 2, generator=draw).topk(setting.n, dim=2).indices
    labels = torch.randint(0, 2, (num_runs, count), generator=draw)
    place = torch.randint(0, setting.n, (num_runs, count, 1), generator=draw)
    tokens.scatter_(2, place, labels[..., None])
    return tokens, 1.0 - 2.0 * labels


def output(model: Experts, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """(R, B) f(x). kept: (R, E) bool, experts that take part; with token choice the others' tokens go to the next."""
    setting = model.setting
    num_runs, batch, n = tokens.shape
    index = tokens.reshape(num_runs, 1, batch * n)
    at = index.expand(-1, EXPERTS, -1)
    logits = model.router.gather(2, at).reshape(num_runs, EXPERTS, batch, n)
    answers = model.neurons.relu().sum(dim=2).gather(2, at).reshape(num_runs, EXPERTS, batch, n)
    alive = torch.ones(num_runs, EXPERTS, dtype=torch.bool) if kept is None else kept
    gates = GATES[setting.routing](setting, logits, alive[:, :, None, None])
    each = (gates * answers).sum(dim=3)  # (R, E, B)
    signs = torch.tensor(SIGNS)[None, :, None]
    return (signs * each * alive[:, :, None]).sum(dim=1)


def _expert_choice(setting: Setting, logits: Tensor, alive: Tensor) -> Tensor:
    """(R, E, B, n) gates. The choice has no gradient; the softmax over the chosen tokens has."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(3, logits.topk(setting.tokens, dim=3).indices, True)
    return logits.masked_fill(~chosen, float("-inf")).softmax(dim=3)


def _token_choice(setting: Setting, logits: Tensor, alive: Tensor) -> Tensor:
    logits = logits.masked_fill(~alive, float("-inf"))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(setting.experts, dim=1).indices, True)
    return logits.masked_fill(~chosen, float("-inf")).softmax(dim=1).nan_to_num()


GATES: dict[str, Callable[[Setting, Tensor, Tensor], Tensor]] = {"expert": _expert_choice, "token": _token_choice}


def train(model: Experts, draw: torch.Generator, *, steps: int | None = None, kept: Tensor | None = None) -> Experts:
    """Plain SGD on the hinge loss; every run has its own samples."""
    setting = model.setting
    router, neurons = (value.clone().requires_grad_() for value in (model.router, model.neurons))
    for _ in range(setting.steps if steps is None else steps):
        tokens, labels = samples(setting, len(router), setting.batch, draw)
        found = output(Experts(setting=setting, router=router, neurons=neurons), tokens, kept)
        hinge(found, labels).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for value, rate in ((router, setting.rate_router), (neurons, setting.rate_expert)):
                assert value.grad is not None
                value -= rate * value.grad
                value.grad = None
    return Experts(setting=setting, router=router.detach(), neurons=neurons.detach())


def hinge(found: Tensor, labels: Tensor) -> Tensor:
    """(R,) mean over samples."""
    return (1 - labels * found).clamp(min=0).mean(dim=1)


@torch.no_grad()
def on_new_samples(
    model: Experts, draw: torch.Generator, kept: Tensor | None = None, count: int = 2000
) -> dict[str, Tensor]:
    """(R,) accuracy and hinge loss on new samples; f = 0 counts as wrong."""
    tokens, labels = samples(model.setting, len(model.router), count, draw)
    found = output(model, tokens, kept)
    return {"accuracy": (labels * found > 0).float().mean(dim=1), "hinge": hinge(found, labels)}


def kept_by(scores: Tensor, count: int) -> Tensor:
    """(R, E) bool: the `count` experts of highest score."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)


def finds_relevant(scores: Tensor) -> Tensor:
    """(R,) whether the relevant experts are those of highest score."""
    return kept_by(scores, len(RELEVANT))[:, list(RELEVANT)].all(dim=1)
