"""The rooms of the source: the question that each answers, and which rooms it may import.

The rooms are listed from the command line down to the ground. A room imports only rooms further down, so there is no
circle. `tests/test_imports.py` compares this table with the source, and `docs/design.md` shows it. This prints the
lines for that page: PYTHONPATH=src:tests python -c "from support.rooms import *; print(*table_lines(), sep='\\n')"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import secateur

SOURCE = Path(secateur.__file__).parent
MAX_TOP_LEVEL_FILES = 12  # Python files beside the folders of src/secateur

# Numbers in, a value out: these use no model and no process group, and import only each other and the ground.
PURE = ("stats", "criteria", "decide", "plans", "placement", "train.phases", "train.load_history")
GROUND = ("errors", "files", "results", "version")


@dataclass(frozen=True, kw_only=True)
class Room:
    """question: the first line of its docstring. may_import: names of rooms, in the order of the table."""

    question: str
    may_import: tuple[str, ...]


def _rooms(names: str) -> tuple[str, ...]:
    return tuple(names.split())


# Named like their modules. Folders of model_folder are rooms of their own; the room `model_folder` is its loose files.
ROOMS: dict[str, Room] = {
    "__main__": Room(
        question="`python -m secateur` is the `secateur` command.",
        may_import=_rooms("cli commands"),
    ),
    "cli": Room(
        question="The `secateur` command: its parts are in `secateur.commands`.",
        may_import=_rooms("commands train version errors"),
    ),
    "commands": Room(
        question="What does each command of `secateur` take, call and show? One command a file.",
        may_import=_rooms(
            "replay finetuning pretraining folder_kinds upcycling model_folder model_folder.evaluation "
            "model_folder.measure model_folder.rewrite model_folder.read train reporting models placement decide "
            "criteria plans results files errors"
        ),
    ),
    "__init__": Room(
        question=(
            "Secateur prunes the experts of Mixture-of-Experts models: while they pre-train, after fine-tuning, as "
            "checkpoints."
        ),
        may_import=_rooms(
            "replay finetuning pretraining folder_kinds upcycling model_folder model_folder.evaluation "
            "model_folder.measure model_folder.read train reporting surgery auto_classes models placement decide "
            "plans stats version errors"
        ),
    ),
    "replay": Room(
        question="When would LAEP have pruned a run that was recorded, and why not earlier?",
        may_import=_rooms("train reporting surgery results files errors"),
    ),
    "finetuning": Room(
        question="How does `secateur finetune` train a model folder, of text or of images, pruned or not?",
        may_import=_rooms(
            "model_folder.rewrite model_folder.read train families models data environment version results files errors"
        ),
    ),
    "pretraining": Room(
        question="How does `secateur pretrain` run: data, model, Trainer, resume, and what it leaves on the disk?",
        may_import=_rooms(
            "train reporting surgery families modeling_secateur data environment decide plans results files errors"
        ),
    ),
    "folder_kinds": Room(
        question="Which kind of folder is this, and what treats it?",
        may_import=_rooms(
            "upcycling model_folder.checks model_folder.rewrite model_folder.read training_checkpoint plans results "
            "files errors"
        ),
    ),
    "upcycling": Room(
        question="How does a Mixture-of-Experts grow from dense models?",
        may_import=_rooms(
            "model_folder.checks model_folder.evaluation model_folder.rewrite model_folder.read models data version "
            "results files errors"
        ),
    ),
    "model_folder": Room(
        question="How does a model folder become a pruned one: from a source to a plan, and all stages in one?",
        may_import=_rooms(
            "model_folder.checks model_folder.measure model_folder.rewrite model_folder.read observation placement "
            "decide criteria plans stats results files errors"
        ),
    ),
    "model_folder.checks": Room(
        question="Is the result what the plan makes of the source?",
        may_import=_rooms(
            "model_folder.rewrite model_folder.stream model_folder.read surgery observation families "
            "modeling_secateur data plans version results files errors"
        ),
    ),
    "model_folder.evaluation": Room(
        question="How good is a model folder, on text or on images?",
        may_import=_rooms(
            "model_folder.measure model_folder.stream model_folder.read observation families models data results "
            "files errors"
        ),
    ),
    "model_folder.measure": Room(
        question="What do the experts of a model folder do on data, and what do its weights say of them?",
        may_import=_rooms(
            "model_folder.rewrite model_folder.stream model_folder.read observation families models data environment "
            "criteria stats results files errors"
        ),
    ),
    "model_folder.rewrite": Room(
        question="How does a plan change a model folder, and how does the source come back?",
        may_import=_rooms(
            "model_folder.read reporting surgery modeling_secateur expert_axis criteria plans version files errors"
        ),
    ),
    "model_folder.stream": Room(
        question="How does a model larger than memory run?",
        may_import=_rooms("model_folder.read surgery modeling_secateur data stats files errors"),
    ),
    "model_folder.read": Room(
        question="What is in a model folder, and which tensor is whose? Nothing in it is trusted.",
        may_import=_rooms("surgery families modeling_secateur expert_axis decide results files errors"),
    ),
    "train": Room(
        question="When does a training loop prune, what, and on which ranks?",
        may_import=_rooms(
            "training_checkpoint surgery observation families modeling_secateur expert_axis placement decide "
            "plans stats files errors"
        ),
    ),
    "training_checkpoint": Room(
        question="How is a plan applied to a training checkpoint, to its model and its optimizer state?",
        may_import=_rooms("surgery modeling_secateur expert_axis plans version files errors"),
    ),
    "reporting": Room(
        question="What did a pre-training run do? Figures, numbers and one HTML page, made from its folder.",
        may_import=_rooms("surgery placement plans results files errors"),
    ),
    "surgery": Room(
        question="How is a plan applied to a live model and its optimizer, and is the result right?",
        may_import=_rooms("observation families modeling_secateur expert_axis plans stats files errors"),
    ),
    "observation": Room(
        question="What did the experts of a live model do?",
        may_import=_rooms("families decide stats files errors"),
    ),
    "families": Room(
        question=(
            "Where the experts of a live model are: found by building the model class twice, then checked against the "
            "model."
        ),
        may_import=_rooms("modeling_secateur expert_axis decide errors"),
    ),
    "auto_classes": Room(
        question=(
            "Tell transformers' auto classes our models, pruned ones, V-MoE and BAM, without importing transformers "
            "ourselves."
        ),
        may_import=_rooms("models modeling_secateur"),
    ),
    "models": Room(
        question="Which transformers models are Secateur's own? One folder each, with the same file names.",
        may_import=_rooms("data results files errors"),
    ),
    "modeling_secateur": Room(
        question=(
            "Mixture-of-Experts models whose layers hold different numbers of experts, or fewer than their routers "
            "choose among."
        ),
        may_import=(),
    ),
    "expert_axis": Room(
        question="Gather a tensor along its expert axis. The only code of Secateur that indexes an expert axis.",
        may_import=_rooms("plans errors"),
    ),
    "data": Room(
        question="How do text and images become what a model takes?",
        may_import=_rooms("files errors"),
    ),
    "environment": Room(
        question="Versions and hardware, recorded with every run and every benchmark.",
        may_import=_rooms("version"),
    ),
    "placement": Room(
        question="Which expert-parallel rank holds which expert, and how even is that?",
        may_import=_rooms("plans stats results files errors"),
    ),
    "decide": Room(
        question="Which experts stay? From statistics and a goal to a plan.",
        may_import=_rooms("criteria plans stats files errors"),
    ),
    "criteria": Room(
        question="How is each expert of a layer scored? One function a criterion.",
        may_import=_rooms("stats errors"),
    ),
    "plans": Room(
        question="Plan: for each layer, which old expert each new expert is made of. One file format, composition, "
        "inversion.",
        may_import=_rooms("files errors"),
    ),
    "stats": Room(
        question=(
            "What the routers of a model did: sums over tokens only, so that ranks, micro-batches and windows add up."
        ),
        may_import=_rooms("files errors"),
    ),
    "version": Room(
        question=(
            "The version of Secateur, in the one place from which the package, its metadata and every record take it."
        ),
        may_import=(),
    ),
    "results": Room(
        question=(
            "What a public function gives back: a value with typed fields, its command's JSON, a table in a notebook."
        ),
        may_import=(),
    ),
    "files": Room(
        question=(
            "How do bytes get to the disk and back: whole or not at all, by one process at a time, read without trust?"
        ),
        may_import=_rooms("errors"),
    ),
    "errors": Room(question="The one error that bad input raises.", may_import=()),
}


def shown_name(room: str) -> str:
    """The room as docs/design.md writes it: `plans/`, `decide/`, `model_folder/read/`."""
    path = SOURCE.joinpath(*room.split("."))
    if room == "model_folder":
        return "`model_folder/*.py`"
    return f"`{room.replace('.', '/')}/`" if path.is_dir() else f"`{room}.py`"


def table_lines() -> list[str]:
    """The table of docs/design.md, line by line."""
    rows = [
        f"| {shown_name(name)} | {room.question} | "
        f"{', '.join(shown_name(other) for other in room.may_import) or 'none'} |"
        for name, room in ROOMS.items()
    ]
    return ["| room | the question it answers | may import |", "|---|---|---|", *rows]
