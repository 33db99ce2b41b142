"""What becomes of the files beside the weights: copied, rewritten, or left out. `apply` does it, `verify` expects it.

A file that no rule names is copied as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import CONFIG, FINETUNED, INDEX, STATS
from secateur.model_folder.rewrite.report import REPORT, VERIFIED
from secateur.plans import Plan, is_side_file
from secateur.surgery.config_json import MODULE

PLAN, PAGE, CARD, CODE = "plan.json", "report.html", "README.md", f"{MODULE}.py"
# What `apply` and `prune` write themselves, whatever the source has under these names.
MADE_ANEW = (CONFIG, INDEX, PLAN, REPORT, PAGE, CARD, CODE, VERIFIED, STATS)

# (source, plan that lists every layer, the file's bytes) -> its new bytes; raises SecateurError where it cannot
Rewrite = Callable[[ModelFolder, Plan, bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of files whose whole path in the folder matches `names`; the first rule that fits counts.

    why: for the report. rewrite: makes the new content; without it the file is left out.
    """

    names: str
    why: str
    rewrite: Rewrite | None = None


RULES: tuple[Rule, ...] = (
    Rule(names=re.escape(FINETUNED), why="it is about the weights of the source, and no others"),
)


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """copied: as they are. rewritten: name -> new content. left_out: name -> why, also weights in other forms.

    made_anew: names in the source of what `apply` writes itself.
    """

    copied: tuple[PurePosixPath, ...]
    rewritten: Mapping[PurePosixPath, bytes]
    left_out: Mapping[PurePosixPath, str]
    made_anew: tuple[PurePosixPath, ...]


def side_files(folder: ModelFolder, plan: Plan) -> SideFiles:
    """What becomes of every file of a source but its config.json, its index and its weights.

    Args:
        plan: lists every layer (`Plan.filled`).

    Raises:
        SecateurError: a file says something of the experts, and no rule can say it of the kept ones.
    """
    copied: list[PurePosixPath] = []
    made_anew: list[PurePosixPath] = []
    rewritten: dict[PurePosixPath, bytes] = {}
    left_out = dict.fromkeys(folder.files.left_out, "weights of the unpruned model in other forms")
    for relative in folder.files.others:
        rule = next((rule for rule in RULES if re.fullmatch(rule.names, str(relative))), None)
        if str(relative) in MADE_ANEW or is_side_file(str(relative), PLAN):
            made_anew.append(relative)
        elif rule is None:
            copied.append(relative)
        elif rule.rewrite is None:
            left_out[relative] = rule.why
        else:
            rewritten[relative] = rule.rewrite(folder, plan, (folder.files.path / relative).read_bytes())
    return SideFiles(copied=tuple(copied), rewritten=rewritten, left_out=left_out, made_anew=tuple(made_anew))
