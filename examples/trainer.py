"""LAEP in your own Trainer: `callbacks=[LAEPCallback(...)]` is all that a usual Trainer script gets.

python examples/trainer.py
"""

from __future__ import annotations

import tempfile

from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

from secateur import LAEPCallback
from secateur.data.packing import BlockDataset
from secateur.data.prepare import prepare


def main() -> None:
    data = prepare([], vocab_size=512, sequence_length=64, max_bytes=300_000)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    laep = LAEPCallback(target_params=0.8, at_step=30)  # without at_step: as soon as the loads are stable
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_config(config),
            args=TrainingArguments(folder, max_steps=60, per_device_train_batch_size=8, report_to="none"),
            train_dataset=BlockDataset(data.train),
            callbacks=[laep],
        )
        trainer.train()
        trainer.save_model(f"{folder}/pruned")
        AutoModelForCausalLM.from_pretrained(f"{folder}/pruned")  # elsewhere: with trust_remote_code=True
    for event in laep.events:
        print(event.describe())


if __name__ == "__main__":
    main()
