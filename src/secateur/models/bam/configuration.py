"""The config of a BAM: the block of its dense parents, how many experts there are, and how they are mixed."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from transformers.configuration_utils import PreTrainedConfig

from secateur.errors import SecateurError

# field -> the values it may have
CHOICES: dict[str, tuple[str, ...]] = {
    "block": ("parallel", "parallel_two_norms", "sequential"),
    "norm_type": ("layer", "rms"),
}
AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "num_attention_experts",
    "num_experts_per_tok",
)  # fmt: skip
OPTIONAL = ("attention_top_k", "sliding_window")
NOT_NEGATIVE = (
    "norm_eps", "attention_dropout", "initializer_range", "router_init_std", "router_aux_loss_coef",
    "router_z_loss_coef",
)  # fmt: skip
FLAGS = (
    "kv_experts", "renormalise_top1", "output_router_logits", "norm_bias", "mlp_gated", "attention_bias",
    "attention_output_bias", "mlp_bias", "qk_norm", "rope_interleaved", "use_cache", "tie_word_embeddings",
)  # fmt: skip
# of the FFN experts, one or the other by what the parents have
EXPERT_TENSORS = (
    "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias",
)  # fmt: skip
MAX_ATTENTION_EXPERTS = 4096  # a number that no model has, so that a damaged config.json is refused before it is built


class AttentionSizes(NamedTuple):
    """Attention experts, sets of keys and values, and of one expert: heads, key/value heads, width of a head."""

    experts: int
    kv_sets: int
    heads: int
    kv_heads: int
    head_dim: int


class BamConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A decoder in which attention and FFN are mixtures of the attentions and FFNs of dense parents (arXiv 2408.08274).

    The defaults are the mixture of the paper's 590M parents.

    Args:
        vocab_size, hidden_size, num_hidden_layers, max_position_embeddings: of every parent.
        intermediate_size: inner width of one FFN expert. The paper's F is the fused width of gate and up: twice this.
        num_attention_heads, num_key_value_heads, head_dim: of one attention expert. None: as many key/value heads as
            heads, and hidden_size / num_attention_heads.
        num_experts: FFN experts of a layer. num_attention_experts: None for as many. With 1 a layer has plain attention
            and no attention router, as BTX (arXiv 2403.07816) has it.
        kv_experts: whether each attention expert has keys and values of its own, or all share one set.
        attention_top_k: None mixes all attention experts of a token by the softmax of its router. A number keeps the
            so many largest weights as they are and sets the others to 0; the attention router has losses then.
        num_experts_per_tok: FFN experts of a token, weighted by the softmax over all, not renormalised.
        renormalise_top1: divide the weights of the chosen FFN experts by their sum. With one chosen expert the weight
            is the constant 1, so that the loss of the labels sends the FFN router no gradient.
        router_init_std: of random routers.
        router_aux_loss_coef, router_z_loss_coef: alpha and beta of the router's losses (ours; the paper has none).
        output_router_logits: whether a forward with labels also computes the routers' losses (see `losses`); in
            training they are part of the loss.
        block: "parallel": x + attention(n(x)) + ffn(n(x)), the paper's; "parallel_two_norms": the same with a norm for
            each; "sequential": y = x + attention(n1(x)), then y + ffn(n2(y)).
        norm_type, norm_bias, norm_eps: of all norms over the model width; "rms" has no bias.
        hidden_act, mlp_gated: act(gate(u)) * up(u), or act(up(u)).
        attention_bias, attention_output_bias, mlp_bias: of queries, keys and values; of the output projection; of the
            FFN's projections.
        qk_norm: an RMS norm over each head's queries and keys, with one weight an expert (as Qwen3).
        rope_parameters: as transformers has them, with `partial_rotary_factor`. rope_interleaved: pairs of neighbours
            are rotated (Cohere), not the halves of a head.
        sliding_window: tokens that a token sees, itself included; None for all. logit_scale: times the logits.

    Raises:
        SecateurError: a value of another kind, or values that do not go together.
    """

    model_type = "bam"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers' own form
    base_model_ep_plan: ClassVar[Any] = {
        **{f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in EXPERT_TENSORS},
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 256_000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    num_experts: int = 4
    num_attention_experts: int | None = None
    kv_experts: bool = True
    attention_top_k: int | None = None
    num_experts_per_tok: int = 1
    renormalise_top1: bool = False
    router_init_std: float = 0.02
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = True
    block: str = "parallel"
    norm_type: str = "layer"
    norm_bias: bool = False
    norm_eps: float = 1e-5
    hidden_act: str = "silu"
    mlp_gated: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool = False
    sliding_window: int | None = None
    logit_scale: float | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_experts is None:
            self.num_attention_experts = self.num_experts
        check(self)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def attention_sizes(self) -> AttentionSizes:
        """Of a layer, with what the fields leave open filled in."""
        experts, kv_heads, head_dim = self.num_attention_experts, self.num_key_value_heads, self.head_dim
        assert experts is not None
        assert kv_heads is not None
        assert head_dim is not None
        kv_sets = experts if self.kv_experts else 1
        return AttentionSizes(experts, kv_sets, self.num_attention_heads, kv_heads, head_dim)


def check(config: BamConfig) -> None:
    """Raise SecateurError for values that no model can have."""
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise SecateurError(f"BamConfig: {name} is {getattr(config, name)!r:.40}, expected one of {allowed}")
    for name in (*AT_LEAST_ONE, *(name for name in OPTIONAL if getattr(config, name) is not None)):
        if type(getattr(config, name)) is not int or getattr(config, name) < 1:
            raise SecateurError(f"BamConfig: {name} is {getattr(config, name)!r:.40}, expected a whole number above 0")
    for name in FLAGS:
        if type(getattr(config, name)) is not bool:
            raise SecateurError(f"BamConfig: {name} is {getattr(config, name)!r:.40}, expected true or false")
    for name in (*NOT_NEGATIVE, *(["logit_scale"] if config.logit_scale is not None else [])):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise SecateurError(f"BamConfig: {name} is {value!r:.40}, expected a number of at least 0")
    attention = config.attention_sizes
    limits = (
        ("num_attention_experts", attention.experts, MAX_ATTENTION_EXPERTS),
        ("num_experts_per_tok", config.num_experts_per_tok, config.num_experts),
        ("attention_top_k", config.attention_top_k or 0, attention.experts),
    )
    for name, value, most in limits:
        if value > most:
            raise SecateurError(f"BamConfig: {name} is {value}, expected at most {most}")
    if attention.heads % attention.kv_heads:
        raise SecateurError(
            f"BamConfig: {attention.heads} attention heads, expected a multiple of the {attention.kv_heads} key/value "
            "heads"
        )
    if config.norm_type == "rms" and config.norm_bias:
        raise SecateurError("BamConfig: norm_bias is True, but an RMS norm has no bias")
