"""How much a V-MoE computes for an image, by arithmetic.

A multiplication with its addition counts as 2. Counted are products of matrices; norms, softmax, activations, biases
and the moving of tokens are not.

Legend: P patches, L tokens (P, and the class token), D model width, F expert width, M members, N router rows, S pairs
of token and expert, Q width of the layer before the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur.models.vmoe.configuration import VMoEConfig


def flops_per_image(
    config: VMoEConfig, *, router_rows: Mapping[int, int], pairs: Mapping[int, float]
) -> dict[str, float]:
    """Operations for one image, by part of the model; their sum is that of the model.

    | part | operations |
    |---|---|
    | embedding | 2 P (patch_size^2 channels) D |
    | attention, of every block | 8 L D^2 for the four projections, 4 L^2 D for scores and mixing |
    | mlp, of a block without experts | 4 L D F |
    | router, of a MoE layer | 2 M L D N |
    | experts, of a MoE layer | 4 S D F |
    | head | 2 M D Q (0 without that layer), 2 M (Q or D) classes |

    From the first MoE block on, the first two of a block count M times as well.

    Args:
        router_rows: {MoE layer: N}. pairs: {MoE layer: S}, of an image and all its members, those that found a place.
    """
    width, inner, members = config.hidden_size, config.intermediate_size, config.ensemble_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (config.classifier == "token")
    first = min(router_rows)
    rows = [tokens * (members if layer >= first else 1) for layer in range(config.num_hidden_layers)]
    before, classes = config.representation_size or 0, int(config.num_labels or 0)
    return {
        "embedding": 2 * patches * config.patch_size**2 * config.num_channels * width,
        "attention": sum(8 * row * width**2 + 4 * row * tokens * width for row in rows),
        "mlp": sum(4 * row * width * inner for layer, row in enumerate(rows) if layer not in router_rows),
        "router": sum(2 * rows[layer] * width * number for layer, number in router_rows.items()),
        "experts": sum(4 * number * width * inner for number in pairs.values()),
        "head": 2 * members * (width * before + (before or width) * classes),
    }
