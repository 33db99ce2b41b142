"""A small corpus that a tiny model can learn from: two domains of short made-up texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

NOUNS = ("router", "expert", "layer", "token", "loss", "window", "plan", "rank")
VERBS = ("drops", "keeps", "counts", "moves", "cuts", "reads", "fills", "finds")


def prose(draw: random.Random, sentences: int = 12) -> str:
    """Sentences of a fixed form, so that the loss falls within a few steps."""
    return " ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)}." for _ in range(sentences))


def code(draw: random.Random, functions: int = 6) -> str:
    return "\n".join(
        f"def {draw.choice(VERBS)}({draw.choice(NOUNS)}):\n    return {draw.choice(NOUNS)} + {draw.randrange(10)}\n"
        for _ in range(functions)
    )


def write_corpus(folder: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """`folder`/prose of .txt files and `folder`/code of .py files, `documents` each."""
    draw = random.Random(seed)
    for domain, suffix, make in (("prose", "txt", prose), ("code", "py", code)):
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            (folder / domain / f"{number:03}.{suffix}").write_text(make(draw) + "\n", encoding="utf-8")
    return folder


def write_jsonl(path: Path, *, documents: int = 24, key: str = "text", seed: int = 0) -> Path:
    draw = random.Random(seed)
    path.write_text("".join(json.dumps({key: prose(draw)}) + "\n" for _ in range(documents)), encoding="utf-8")
    return path
