"""The folder of tiny models, text, images, checkpoints and records that the commands of the campaign read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

PRETRAIN = (
    "--data corpus/prose --data corpus/code --preset qwen3_moe --vocab-size 300 --sequence-length 32 --batch-size 4 "
    "--steps 12 --warmup-steps 2 --log-steps 2 --eval-steps 4 --save-steps 4 --window-steps 3 --threads 1 "
    "--prune-at-step 7 --target-params 0.75 --multiple-of 2 --min-experts 4 --set hidden_size=32 "
    "--set num_hidden_layers=2 --set num_attention_heads=2 --set num_key_value_heads=1 --set head_dim=16 "
    "--set num_experts=8 --set moe_intermediate_size=16 --set intermediate_size=32 --quiet"
)


def _text(root: Path) -> None:
    from support.models_with_text import model_with_text

    model_with_text(root)


def _images(root: Path) -> None:
    import numpy as np
    from PIL import Image

    from support.small_finetunes import image_folder

    made = root / "made"
    made.mkdir()
    image_folder(made)
    (made / "source").rename(root / "classifier")
    (made / "train.npz").rename(root / "images.npz")
    made.rmdir()
    for name, start in (("one", 0), ("two", 12)):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(start, start + 12):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{number}.png")


def _corpus(root: Path) -> None:
    from support.small_corpus import write_corpus

    write_corpus(root / "corpus")


def _training(root: Path) -> None:
    from support.dcp_checkpoints import PLAN, save, save_shards, trained, training_state

    model, optimizer = trained()
    save(training_state(model, optimizer), root / "training")
    save_shards(model, root / "shards")
    PLAN.save(root / "training-plan.json")


def _published(root: Path) -> None:
    from support.flax_files import params, random_arrays, write

    (root / "published").mkdir()
    write(root / "published" / "vmoe", params(random_arrays()))


def _records(root: Path) -> None:
    import torch

    from support.tuned_folders import finetuned, lora_of, write_adapter

    layers = {str(layer): [3 + layer, 9, 1, 4, 8, 2, 7, 5] for layer in range(3)}
    (root / "loads.json").write_text(json.dumps(layers))
    count = torch.arange(1, 25, dtype=torch.int32).reshape(1, 3, 8)
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, root / "counts.pt")
    finetuned("qwen3_moe").save_pretrained(root / "tuned", max_shard_size="60KB")
    from support.tiny_models import tiny_model

    model = tiny_model("qwen3_moe")
    model.save_pretrained(root / "base", max_shard_size="60KB")
    write_adapter(root / "adapter", lora_of(model)[0])


MAKERS: tuple[Callable[[Path], None], ...] = (_text, _images, _corpus, _training, _published, _records)

# The commands that make what other commands read, in this order.
COMMANDS = (
    "observe source --data code=code.jsonl --data prose=prose.jsonl --samples 12 --sequence-length 16 --batch-size 4 "
    "--out stats.safetensors --quiet",
    "plan stats.safetensors --keep 0.5 --out plan.json --quiet",
    "apply source plan.json --out pruned --undo undo --quiet",
    f"pretrain --out run {PRETRAIN}",
)


def make_inputs(root: Path, run: Callable[[str, Path], None]) -> Path:
    """Fill the new folder `root`; `run` runs a command line of `secateur` in it."""
    half = root.with_name(f"{root.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for make in MAKERS:
        run_here(make, half)
    for words in COMMANDS:
        run(words, half)
    for name in ("report.html", "report.json"):  # what the case `report` makes
        (half / "run" / name).unlink()
    shutil.rmtree(half / "run" / "figures")
    half.rename(root)
    return root


def run_here(make: Callable[[Path], None], root: Path) -> None:
    from faults_campaign.forked import call

    call(make, root)
