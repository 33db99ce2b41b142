"""The unpruned runs whose load histories judge LAEP's detector: a table, and no code that runs anything.

A fractional design: every value of a column meets most values of the others. A setting is run with three seeds, which
draw the weights and the order of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEEDS = 3
SEQUENCE = 128
VOCABULARY = 2048
CHOOSING, JUDGING = "choosing", "judging"

# width, layers
SIZES = {"S": (32, 2), "M": (64, 4), "L": (96, 4)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row. tokens: of a step. half: whether constants are chosen on it, or figures come from it."""

    number: int
    half: str
    size: str
    experts: int
    top_k: int
    tokens: int
    warmup: int
    schedule: str
    learning_rate: float
    balance: str
    steps: int

    @property
    def name(self) -> str:
        return (
            f"{self.number:02d}-{self.size}-{self.experts}e-{self.tokens}t-w{self.warmup}-{self.schedule}-{self.steps}"
        )

    @property
    def window_steps(self) -> int:
        """LAEP's default, and half of it in runs of a few hundred steps."""
        return 20 if self.steps > 1000 else 10

    @property
    def preset(self) -> str:
        """Selection biases are DeepSeek's."""
        return "deepseek_v3" if self.balance == "bias" else "qwen3_moe"

    def model(self) -> dict[str, Any]:
        """Fields over those of the preset."""
        width, layers = SIZES[self.size]
        fields = {"hidden_size": width, "num_hidden_layers": layers, "moe_intermediate_size": width}
        fields |= {"num_experts_per_tok": self.top_k, "vocab_size": VOCABULARY}
        if self.preset == "deepseek_v3":
            return fields | {"n_routed_experts": self.experts, "intermediate_size": 2 * width}
        return fields | {"num_experts": self.experts, "head_dim": width // 4}


# half, size, experts, top-k, tokens a step, warm-up, schedule, learning rate, balance, steps
_ROWS = [
    (CHOOSING, "S", 16, 2, 1024, 20, "constant", 2e-3, "none", 3000),
    (JUDGING, "S", 64, 4, 1024, 200, "cosine", 2e-3, "none", 3000),
    (CHOOSING, "S", 32, 2, 1024, 2000, "wsd", 1e-3, "none", 8000),
    (JUDGING, "S", 16, 2, 4096, 200, "constant", 5e-4, "none", 4000),
    (CHOOSING, "S", 64, 4, 4096, 20, "wsd", 2e-3, "bias", 3000),
    (JUDGING, "S", 128, 8, 4096, 200, "cosine", 2e-3, "none", 2500),
    (CHOOSING, "S", 32, 2, 16384, 20, "cosine", 2e-3, "none", 1000),
    (JUDGING, "M", 16, 2, 1024, 2000, "constant", 1e-3, "none", 8000),
    (CHOOSING, "M", 64, 4, 1024, 20, "cosine", 2e-3, "none", 3000),
    (JUDGING, "M", 32, 2, 1024, 200, "wsd", 2e-3, "mixtral", 3000),
    (CHOOSING, "M", 16, 2, 4096, 200, "cosine", 1e-3, "none", 2000),
    (JUDGING, "M", 128, 4, 4096, 20, "constant", 1e-3, "none", 1500),
    (CHOOSING, "M", 64, 4, 4096, 200, "wsd", 1e-3, "none", 2000),
    (JUDGING, "M", 16, 2, 16384, 20, "wsd", 2e-3, "none", 800),
    (CHOOSING, "M", 32, 4, 4096, 200, "cosine", 2e-3, "mixtral", 1000),
    (JUDGING, "L", 32, 2, 1024, 200, "constant", 5e-4, "none", 3000),
    (CHOOSING, "L", 16, 2, 1024, 2000, "cosine", 2e-3, "none", 7000),
    (JUDGING, "L", 64, 2, 4096, 20, "cosine", 1e-3, "bias", 1200),
    (CHOOSING, "L", 16, 2, 4096, 200, "wsd", 5e-4, "none", 1500),
    (JUDGING, "S", 16, 2, 16384, 2000, "cosine", 3e-4, "none", 3000),  # as the fault was seen; the longest runs
]
_COLUMNS = ("half", "size", "experts", "top_k", "tokens", "warmup", "schedule", "learning_rate", "balance", "steps")

SETTINGS = [
    Setting(number=number, **dict(zip(_COLUMNS, row, strict=True)))  # type: ignore[arg-type]
    for number, row in enumerate(_ROWS)
]
