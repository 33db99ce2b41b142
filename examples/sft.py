"""LAEP in TRL's SFTTrainer: `callbacks=[LAEPCallback(...)]`, as in any Trainer. (pip install trl)

python examples/sft.py

SFTTrainer switches the balance loss of a MoE on by itself; after the pruning it is that of each layer's own experts.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

from secateur import LAEPCallback


def main() -> None:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [" ".join(map(str, row)) for row in torch.randint(1, 64, (240, 16)).tolist()]
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    laep = LAEPCallback(target_params=0.8, at_step=20)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 30, "max_length": 32, "report_to": "none", "bf16": False}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_config(config),
            args=SFTConfig(folder, **settings),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0"),
            callbacks=[laep],
        )
        trainer.train()
    for event in laep.events:
        print(event.describe())


if __name__ == "__main__":
    main()
