"""How much a BAM computes for a token, by arithmetic.

A multiplication with its addition counts as 2. Counted are products of matrices; norms, softmax, activations, biases
and the weighting of experts are not.

Legend: C context, D model width, N attention experts, M sets of keys and values, H and Hkv heads of one expert, d head
width, E FFN experts, K of a token, F inner width of one.
"""

from __future__ import annotations

from secateur.models.bam.configuration import BamConfig


def flops_per_token(config: BamConfig, *, context: int) -> dict[str, float]:
    """Operations of a forward for one token, on average over a row of `context` tokens, by part of the model.

    | part | operations, of all layers |
    |---|---|
    | attention | N (4 D H d + 2 C H d) for queries, outputs, scores and mixing (half of C on average) + M 4 D Hkv d |
    | attention_router | 2 N D; 0 with one attention expert |
    | experts | K 6 D F; K 4 D F without a gate |
    | router | 2 E D |
    | head | 2 D vocabulary, once |

    All attention experts run for every token, also where `attention_top_k` sets most of their weights to 0.
    """
    layers, width = config.num_hidden_layers, config.hidden_size
    experts, kv_sets, heads, kv_heads, head = config.attention_sizes
    attention = experts * (4 * width + 2 * context) * heads * head + kv_sets * 4 * width * kv_heads * head
    matrices = 3 if config.mlp_gated else 2
    return {
        "attention": layers * attention,
        "attention_router": layers * (2 * experts * width if experts > 1 else 0),
        "experts": layers * config.num_experts_per_tok * 2 * matrices * width * config.intermediate_size,
        "router": layers * 2 * config.num_experts * width,
        "head": 2 * width * config.vocab_size,
    }


def cache_bytes_per_token(config: BamConfig, *, bytes_per_number: int = 2) -> int:
    """Bytes of the key/value cache that a token takes; 2 a number in bfloat16."""
    _, kv_sets, _, kv_heads, head = config.attention_sizes
    return config.num_hidden_layers * 2 * kv_sets * kv_heads * head * bytes_per_number
