"""A tiny model with a tokenizer of its own, and text in two domains that it can be run on."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.data.tokenizer import train_tokenizer
from support.tiny_models import tiny_model

TEXT = {
    "code": [f"code def return x {number}" for number in range(40)],
    "prose": [f"it was the best of times {number}" for number in range(40)],
}


def model_with_text(root: Path) -> list[str]:
    """Write `source`, `code.jsonl` and `prose.jsonl` into a folder; the words of --data that name the text."""
    tokenizer = train_tokenizer([line for lines in TEXT.values() for line in lines], vocab_size=280)
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer))
    model.save_pretrained(root / "source", max_shard_size="60KB")
    tokenizer.save_pretrained(root / "source")
    for name, lines in TEXT.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return data_in(root)


def data_in(root: Path) -> list[str]:
    return [word for name in TEXT for word in ("--data", f"{name}={root / name}.jsonl")]
