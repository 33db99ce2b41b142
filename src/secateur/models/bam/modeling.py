"""BAM, Branch-Attend-Mix (arXiv 2408.08274): a decoder whose attention and FFN are mixtures of those of dense parents.

The tensors of a checkpoint, for N attention experts (M = N sets of keys and values, or 1 where `kv_experts` is false),
E FFN experts, model width D, H query and Hkv key/value heads of width d an expert, inner width F. Expert j has the j-th
block of equal size of an axis that has a factor N, M or E:

| name | shape | of a parent |
|---|---|---|
| model.embed_tokens.weight, lm_head.weight (unless tied) | (V, D) | averaged |
| model.norm.*, model.layers.L.input_layernorm.*, .post_attention_layernorm.* (block not "parallel") | (D) | averaged |
| model.layers.L.self_attn.q_proj.weight, .bias | (N * H * d, D), (N * H * d) | copied |
| model.layers.L.self_attn.k_proj, v_proj .weight, .bias | (M * Hkv * d, D), (M * Hkv * d) | copied; averaged if M = 1 |
| model.layers.L.self_attn.o_proj.weight | (D, N * H * d): blocks of columns | copied |
| model.layers.L.self_attn.o_bias (`attention_output_bias`) | (N, D) | copied |
| model.layers.L.self_attn.q_norm.weight, k_norm.weight (`qk_norm`) | (N, d), (M, d) | copied; averaged if M = 1 |
| model.layers.L.self_attn.router.weight (N > 1) | (N, D) | new |
| model.layers.L.mlp.gate.weight | (E, D) | new |
| model.layers.L.mlp.experts.gate_up_proj, gate_up_proj_bias | (E, 2 * F, D), (E, 2 * F): gate, then up | copied |
| model.layers.L.mlp.experts.up_proj, up_proj_bias (not `mlp_gated`) | (E, F, D), (E, F) | copied |
| model.layers.L.mlp.experts.down_proj, down_proj_bias | (E, D, F), (E, D) | copied |

Legend: B batch, L tokens of a row, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from secateur.errors import SecateurError
from secateur.models.bam.attention import BamAttention, BamRotaryEmbedding
from secateur.models.bam.configuration import BamConfig
from secateur.models.bam.decoder import BamDecoderLayer
from secateur.models.bam.experts import BamExperts
from secateur.models.bam.losses import router_losses, target_share
from secateur.models.bam.norms import norm_of
from secateur.models.bam.outputs import BamCausalLMOutput, BamModelOutput
from secateur.models.bam.routing import BamAttentionRouter, BamRouter

ROUTERS = (".self_attn.router.weight", ".mlp.gate.weight")  # how their names end
LISTED = 3


class BamPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    config: BamConfig
    config_class = BamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BamDecoderLayer"]  # noqa: RUF012  transformers' own form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(BamRouter, index=0),
        "attention_router_logits": OutputRecorder(BamAttentionRouter, index=0),
        "hidden_states": BamDecoderLayer,
        "attentions": OutputRecorder(BamAttention, index=1),
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for the call in this file, and it is in `attention`

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # likewise, in `experts`

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As every model of transformers, but a router that is missing is an error: a random one would pass unseen.

        Raises:
            SecateurError: the files lack a router; the message names it.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        lost = sorted(name for name in info["missing_keys"] if name.endswith(ROUTERS))
        if lost:
            more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
            raise SecateurError(
                f"{args[0] if args else 'the weights'}: {', '.join(lost[:LISTED])}{more} missing, expected every "
                "router of a BAM among its weights: a random one would change what the model computes"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, BamRouter | BamAttentionRouter):
            init.normal_(module.weight, std=self.config.router_init_std)
        elif isinstance(module, BamExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, BamAttention) and module.o_bias is not None:
            init.zeros_(module.o_bias)


class BamModel(BamPreTrainedModel):  # type: ignore[no-untyped-call]
    """The decoder without its head."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BamDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm_of(config)
        fields: Any = config  # it has all that the parts of Llama read
        self.rotary_emb = BamRotaryEmbedding(fields)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BamModelOutput:
        """
        Args:
            input_ids: (B, L) token ids, or inputs_embeds: (B, L, D) in their place. attention_mask: (B, all tokens so
                far), 0 for padding. position_ids: (B, L). past_key_values: what was seen before.

        Raises:
            SecateurError: both token ids and embeddings, or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise SecateurError("BamModel: expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BamModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A BAM with a language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' own form
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.model = BamModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BamCausalLMOutput:
        """
        Args:
            labels: (B, L) token ids, -100 where there is none; with them there is a loss.
            output_router_logits: whether the routers' losses are computed and their logits returned; without it, as the
                config says, for calls with labels. logits_to_keep: of the last so many tokens, or of these; 0 for all.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = labels is not None and config.output_router_logits
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_attention_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        logits: Tensor = self.lm_head(slice_logits_to_keep(found.last_hidden_state, logits_to_keep))
        if config.logit_scale is not None:
            logits = logits * config.logit_scale
        output = BamCausalLMOutput(
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            router_logits=found.router_logits,
            attention_router_logits=found.attention_router_logits or None,
        )
        if labels is None:
            return output
        output.loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            self._add_router_losses_(output, labels, attention_mask, kwargs)
        return output

    def _add_router_losses_(
        self, output: BamCausalLMOutput, labels: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Into `output`; into its loss in training only."""
        config, choices = self.config, []
        for layer, logits in zip(self.model.layers, output.router_logits or (), strict=True):
            kept = getattr(layer.mlp.experts, "kept_slots", None)  # of a layer whose removed experts left zero slots
            logits = logits if kept is None else logits[:, list(kept)]
            choices.append((logits, min(config.num_experts_per_tok, logits.shape[-1])))
        if config.attention_top_k is not None:
            choices += [(logits, config.attention_top_k) for logits in output.attention_router_logits or ()]
        trained = self.training and torch.is_grad_enabled() and self.model.layers[0].mlp.gate.weight.requires_grad
        if trained and not choices[0][0].requires_grad:
            raise SecateurError(
                "BamForCausalLM: its routers ran without gradients (reentrant gradient checkpointing), so their losses "
                "would reach no parameter; expected gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        keep = None
        if attention_mask is not None and attention_mask.ndim == 2:
            keep = attention_mask[:, -labels.shape[1] :]
        output.load_balance_loss, output.router_z_loss = router_losses(choices, keep)
        output.aux_loss = (
            config.router_aux_loss_coef * output.load_balance_loss + config.router_z_loss_coef * output.router_z_loss
        )
        if self.training and output.loss is not None:
            share = target_share(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"))
            output.loss = output.loss + (share * output.aux_loss).to(output.loss.device)


AutoModel.register(BamConfig, BamModel, exist_ok=True)
AutoModelForCausalLM.register(BamConfig, BamForCausalLM, exist_ok=True)

__all__ = ["BamForCausalLM", "BamModel", "BamPreTrainedModel"]
