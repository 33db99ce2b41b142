"""The config of a V-MoE image classifier: what is built, and how images, tokens and experts find each other."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from secateur.errors import SecateurError

# field -> the values it may have
CHOICES: dict[str, tuple[str | None, ...]] = {
    "router_type": ("token_choice", "expert_choice"),
    "expert_choice_gates": ("experts", "tokens"),
    "batch_priority": (None, "max", "sum"),
    "classifier": ("token", "gap"),
}
AT_LEAST_ONE = (
    "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "num_experts", "num_experts_per_tok", "ensemble_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "router_noise_std",
    "importance_loss_coef", "load_loss_coef",
)  # fmt: skip


class VMoEConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A vision transformer with sparse Mixture-of-Experts layers (V-MoE, arXiv 2106.05974).

    The defaults are those of the authors' V-MoE-B/16 with 8 experts.

    Args:
        image_size, patch_size: pixels of a side. moe_layers: encoder blocks whose MLP is a MoE, from 0; every second
            one, from block 1, without it.
        num_experts: of every MoE layer, those of all members of an ensemble together.
        num_experts_per_tok: K of top-k; of an expert-choice router, the experts that a token gets on average.
        router_type: "token_choice", or "expert_choice" (arXiv 2202.09368): each expert takes its best tokens.
        norm_topk_prob: whether the K weights of a token are divided by their sum. V-MoE: no.
        expert_choice_gates: the weight is the softmax over the "experts" of a token, or over the "tokens" that an
            expert took (the theory model of arXiv 2405.16646).
        capacity_factor, eval_capacity_factor: C in `places = round(K * tokens * C / experts)`, halves up and at least
            1, of an expert in a group; in training and in evaluation. None: no limit (token choice only).
        expert_capacity: this many places instead, whatever the number of experts.
        group_images: images that are routed together, in the order of the batch; the last group may be smaller. None:
            the whole batch. With 1 an image's logits do not depend on the others. The authors' models use 8.
        batch_priority: in what order tokens take places: by their position (None), or by the "max" or the "sum" of
            their K weights, largest first.
        router_noise_std: times 1 / experts, the standard deviation of the noise on router logits in training.
        importance_loss_coef, load_loss_coef: weights of the balance losses, in training, token choice only.
        classifier: "token", a class token; or "gap", the mean over patches.
        representation_size: width of a tanh layer before the classifier; None for none.
        ensemble_size: M members of an efficient ensemble (E3, arXiv 2110.03360). Experts are M blocks of equal size,
            the representation is tiled M times before the first MoE block, and probabilities are averaged.

    Raises:
        SecateurError: a value of another kind, or values that do not go together.
    """

    model_type = "vmoe"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    qkv_bias: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    moe_layers: list[int] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    router_type: str = "token_choice"
    norm_topk_prob: bool = False
    expert_choice_gates: str = "experts"
    capacity_factor: float | None = 1.05
    eval_capacity_factor: float | None = 1.05
    expert_capacity: int | None = None
    group_images: int | None = 8
    batch_priority: str | None = None
    router_noise_std: float = 1.0
    importance_loss_coef: float = 0.005
    load_loss_coef: float = 0.005
    classifier: str = "token"
    representation_size: int | None = None
    ensemble_size: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.moe_layers is None:
            self.moe_layers = list(range(1, self.num_hidden_layers, 2))
        check(self)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def check(config: VMoEConfig) -> None:
    """Raise SecateurError for values that no model can have."""
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise SecateurError(f"VMoEConfig: {name} is {getattr(config, name)!r}, expected one of {allowed}")
    optional = [name for name in ("expert_capacity", "group_images") if getattr(config, name) is not None]
    for name in (*AT_LEAST_ONE, *optional):
        if type(getattr(config, name)) is not int or getattr(config, name) < 1:
            raise SecateurError(f"VMoEConfig: {name} is {getattr(config, name)!r}, expected a whole number above 0")
    layers = config.moe_layers
    inside = range(config.num_hidden_layers)
    if not isinstance(layers, list) or not layers or sorted(set(layers)) != layers or not set(layers) <= set(inside):
        raise SecateurError(
            f"VMoEConfig: moe_layers is {layers!r}, expected some of the blocks 0 to {len(inside) - 1}, ascending"
        )
    if config.image_size < config.patch_size:
        raise SecateurError(f"VMoEConfig: images of {config.image_size} pixels hold no patch of {config.patch_size}")
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(config, name)
        if factor is not None and not 0 < factor < float("inf"):
            raise SecateurError(f"VMoEConfig: {name} is {factor!r}, expected a number above 0, or None")
        if factor is None and config.router_type == "expert_choice" and config.expert_capacity is None:
            raise SecateurError(f"VMoEConfig: {name} is None, but experts that choose tokens need a number of places")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise SecateurError(f"VMoEConfig: {name} is {value!r:.40}, expected a number of at least 0")
    _check_members(config)


def _check_members(config: VMoEConfig) -> None:
    members, experts = config.ensemble_size, config.num_experts
    if experts % members:
        raise SecateurError(f"VMoEConfig: {experts} experts, expected a multiple of ensemble_size {members}")
    own = experts // members
    if config.num_experts_per_tok > own:
        raise SecateurError(f"VMoEConfig: num_experts_per_tok is {config.num_experts_per_tok}, but a token has {own}")
