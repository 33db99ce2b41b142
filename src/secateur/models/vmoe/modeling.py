"""V-MoE image classifiers (arXiv 2106.05974), and E3, their efficient ensembles (arXiv 2110.03360).

A vision transformer of transformers' own parts in which the MLP of some encoder blocks is a sparse Mixture of Experts.

Legend: B images, M members of an ensemble, L tokens of an image, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP, ViTPatchEmbeddings
from transformers.utils.generic import can_return_tuple

from secateur.errors import SecateurError
from secateur.models.vmoe.configuration import VMoEConfig
from secateur.models.vmoe.routing import wide
from secateur.models.vmoe.sparse_mlp import VMoEExperts, VMoESparseMLP


@dataclass
class VMoEModelOutput(BaseModelOutputWithPooling):
    """last_hidden_state (B * M, L, D) and pooler_output (B * M, D), the members of an image after one another; the
    balance loss of all MoE layers in training.
    """

    aux_loss: Tensor | None = None


@dataclass
class VMoEImageClassifierOutput(ImageClassifierOutput):
    """logits (B, classes); of an ensemble the logarithm of the members' mean probabilities, and member_logits
    (B, M, classes). In training the loss includes aux_loss.
    """

    aux_loss: Tensor | None = None
    member_logits: Tensor | None = None


class VMoEEmbeddings(nn.Module):
    """Patches, a class token if the classifier reads one, and learned positions."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        fields: Any = config  # it has all that the parts of ViT read
        self.patch_embeddings = ViTPatchEmbeddings(fields)
        has_token = config.classifier == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if has_token else None
        length = self.patch_embeddings.num_patches + has_token
        self.position_embeddings = nn.Parameter(torch.zeros(1, length, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise SecateurError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (images, channels, {self.image_size}, "
                f"{self.image_size})"
            )
        tokens: Tensor = self.patch_embeddings(pixel_values)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        embedded: Tensor = self.dropout(tokens + self.position_embeddings)
        return embedded


class VMoELayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """An encoder block: attention, then an MLP or experts, each after a layer norm and added to its input."""

    def __init__(self, config: VMoEConfig, *, is_sparse: bool) -> None:
        super().__init__()
        fields: Any = config
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAttention(fields)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VMoESparseMLP(config) if is_sparse else ViTMLP(fields)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(outputs, balance loss or None)."""
        attended, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = hidden_states + self.dropout(attended)
        found = self.mlp(self.layernorm_after(hidden_states))
        outputs, loss = found if isinstance(found, tuple) else (found, None)
        return hidden_states + self.dropout(outputs), loss


class VMoEPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    config: VMoEConfig
    config_class = VMoEConfig
    base_model_prefix = "vmoe"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VMoEEmbeddings", "VMoELayer"]  # noqa: RUF012  transformers' own form
    _supports_sdpa = True
    _supports_attention_backend = True
    _input_embed_layer = "patch_embeddings"

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in this file, and it is in `sparse_mlp`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        std = self.config.initializer_range
        if isinstance(module, VMoEEmbeddings):
            init.normal_(module.position_embeddings, std=std)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
        elif isinstance(module, VMoEExperts):
            for weight in (module.up_proj, module.down_proj):
                init.normal_(weight, std=std)
            for bias in (module.up_proj_bias, module.down_proj_bias):
                init.zeros_(bias)


class VMoEModel(VMoEPreTrainedModel):  # type: ignore[no-untyped-call]
    """The encoder, and one vector an image and member: the class token's, or the mean of the patches'."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.embeddings = VMoEEmbeddings(config)
        assert config.moe_layers is not None
        self.layers = nn.ModuleList(
            VMoELayer(config, is_sparse=layer in config.moe_layers) for layer in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor) -> VMoEModelOutput:
        """
        Args:
            pixel_values: (B, channels, image_size, image_size).

        Raises:
            SecateurError: images of another size.
        """
        config = self.config
        assert config.moe_layers is not None
        hidden_states = self.embeddings(pixel_values.to(self.embeddings.position_embeddings.dtype))
        losses: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if number == config.moe_layers[0]:
                hidden_states = hidden_states.repeat_interleave(config.ensemble_size, dim=0)
            hidden_states, loss = layer(hidden_states)
            losses += [] if loss is None else [loss]
        hidden_states = self.layernorm(hidden_states)
        pooled = hidden_states[:, 0] if config.classifier == "token" else hidden_states.mean(dim=1)
        return VMoEModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            aux_loss=torch.stack(losses).sum() if losses else None,
        )


class VMoEForImageClassification(VMoEPreTrainedModel):  # type: ignore[no-untyped-call]
    """A V-MoE with a linear classifier; an ensemble of them answers with the mean of its members' probabilities."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.vmoe = VMoEModel(config)
        width = config.representation_size
        num_labels: Any = config.num_labels
        self.pre_logits = None if width is None else nn.Linear(config.hidden_size, width)
        self.classifier = nn.Linear(width or config.hidden_size, num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> VMoEImageClassifierOutput:
        """
        Args:
            pixel_values: (B, channels, image_size, image_size). labels: (B,) class numbers. With them there is a loss:
                in training the mean over members of their cross entropy, plus aux_loss; in evaluation the cross entropy
                of `logits`.
        """
        encoded = self.vmoe(pixel_values, return_dict=True)
        vector = encoded.pooler_output
        if self.pre_logits is not None:
            vector = self.pre_logits(vector).tanh()
        all_logits: Tensor = self.classifier(vector)
        members = self.config.ensemble_size
        by_member = all_logits.view(-1, members, all_logits.shape[-1])
        logits = all_logits
        if members > 1:
            logits = wide(by_member).log_softmax(dim=-1).logsumexp(dim=1) - math.log(members)
        loss = None
        if labels is not None and self.training:
            loss = self.loss_function(labels.repeat_interleave(members, dim=0), all_logits, self.config)
            loss = loss if encoded.aux_loss is None else loss + encoded.aux_loss
        elif labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return VMoEImageClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=encoded.aux_loss,
            member_logits=None if members == 1 else by_member,
        )


AutoModel.register(VMoEConfig, VMoEModel, exist_ok=True)
AutoModelForImageClassification.register(VMoEConfig, VMoEForImageClassification, exist_ok=True)

__all__ = ["VMoEForImageClassification", "VMoEModel", "VMoEPreTrainedModel"]
