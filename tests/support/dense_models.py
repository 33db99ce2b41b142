"""Tiny dense models: a seed and its children, which are the seed with noise. All with one tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from secateur.data.tokenizer import train_tokenizer
from support.models_with_text import TEXT

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
}


def dense_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """One with random weights; norms and biases differ from 1 and 0 too."""
    config, model, more = CLASSES[kind]
    torch.manual_seed(seed)
    made: PreTrainedModel = getattr(transformers, model)(
        getattr(transformers, config)(vocab_size=280, **{**SHAPE, **more, **changes})
    ).eval()
    with torch.no_grad():
        for tensor in made.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return made


def parents_in(
    root: Path, kind: str = "llama", count: int = 3, *, share: float = 0.1, dtype: torch.dtype = torch.float32,
    spoil: Callable[[int, PreTrainedModel], None] = lambda number, model: None, **changes: Any,
) -> list[Path]:  # fmt: skip
    """Folders `p0`, `p1`, ...: a seed, and children that are `share` of noise away from it."""
    tokenizer = train_tokenizer([line for lines in TEXT.values() for line in lines], vocab_size=280)
    folders = []
    for number in range(count):
        model = dense_model(kind, **changes)
        torch.manual_seed(100 + number)
        with torch.no_grad():
            for tensor in model.parameters():
                if number:
                    tensor.add_(torch.randn_like(tensor) * share * tensor.std())
        spoil(number, model)
        model.to(dtype).save_pretrained(root / f"p{number}")
        tokenizer.save_pretrained(root / f"p{number}")
        folders.append(root / f"p{number}")
    return folders


def texts_in(root: Path) -> list[str]:
    """`domain=FILE` of every domain of TEXT."""
    made = []
    for name, lines in TEXT.items():
        (root / f"{name}.txt").write_text("\n".join(lines * 20))
        made.append(f"{name}={root / name}.txt")
    return made
