"""What does a BAM cost beside BTX, and what was published of both (arXiv 2408.08274)?"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from secateur.models.bam.configuration import BamConfig
from secateur.models.bam.flops import cache_bytes_per_token, flops_per_token

CONTEXT = 256  # tokens, as in the paper's count
# after training with equal data, keys and values of their own; latency of 16 tokens after 256
PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {
        "gain_over_btx": {"590M": 0.095, "2B": 0.024},
        "latency_over_btx": {"experts": 1.28, "shared": 1.24},
        "cache_bytes_per_token": {
            "590M": {"experts": 98_304, "shared": 24_576},
            "2B": {"experts": 221_184, "shared": 55_296},
        },
    }
)


def bam_figures(config: Mapping[str, Any]) -> dict[str, Any]:
    """By arithmetic, of a BAM and of the BTX of the same parents, as JSON; and what was published.

    Args:
        config: config.json of the BAM.
    """
    ours = BamConfig(**config)
    btx = BamConfig(**{**config, "num_attention_experts": 1})
    flops = [sum(flops_per_token(one, context=CONTEXT).values()) for one in (ours, btx)]
    return {
        "kv": "experts" if ours.kv_experts else "shared",
        "cache_bytes_per_token": cache_bytes_per_token(ours),
        "cache_bytes_per_token_of_btx": cache_bytes_per_token(btx),
        "flops_per_token_over_btx": flops[0] / flops[1],
        "published": dict(PUBLISHED),
    }


def figure_lines(found: Mapping[str, Any]) -> list[str]:
    """The figures in words."""
    gain, latency = found["published"]["gain_over_btx"], found["published"]["latency_over_btx"]
    return [
        f"{found['cache_bytes_per_token']:,} bytes of cache a token in bfloat16, a BTX of these parents has "
        f"{found['cache_bytes_per_token_of_btx']:,}; {found['flops_per_token_over_btx']:.2f} times its operations",
        f"published, after training: perplexity {gain['590M']:.1%} below BTX at 590M and {gain['2B']:.1%} at 2B, with "
        f"{latency[found['kv']]} times its latency".replace("%", " %"),
    ]
