"""What becomes of the files beside the weights: copied, rewritten, or left out. `apply` does it, `verify` expects it.

A file that no rule names is copied as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import CONFIG, FINETUNED, GROWN, INDEX, STATS
from secateur.model_folder.rewrite.report import REPORT, VERIFIED
from secateur.model_folder.rewrite.side_json import authors_params, other_config, quantisation_file
from secateur.plans import Plan, is_side_file
from secateur.surgery.config_json import MODULE

PLAN, PAGE, CARD, CODE = "plan.json", "report.html", "README.md", f"{MODULE}.py"
# What `apply` and `prune` write themselves, whatever the source has under these names.
MADE_ANEW = (CONFIG, INDEX, PLAN, REPORT, PAGE, CARD, CODE, VERIFIED, STATS)

# What a training run leaves beside a model: of transformers' Trainer, Accelerate, DeepSpeed.
TRAINING_STATE = (
    r"(.*/)?(trainer_state\.json|training_args\.bin|latest|zero_to_fp32\.py"
    r"|(optimizer|scheduler|scaler|rng_state|random_states)(_\d+)?\.(pt|pth|bin|pkl)"
    r"|(optimizer|pytorch_model_fsdp)_\d+/.*|global_step\d+/.*)"
)

# (source, plan that lists every layer, the file's name, its bytes) -> its new bytes, the same where nothing changes, or
# None where it is to be left out; raises SecateurError where it cannot
Rewrite = Callable[[ModelFolder, Plan, str, bytes], bytes | None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of files whose whole path in the folder matches `names`; the first rule that fits counts.

    why: for the report, where the file is left out. rewrite: makes the new content; without it it is left out.
    """

    names: str
    why: str
    rewrite: Rewrite | None = None


RULES: tuple[Rule, ...] = (
    Rule(
        names=f"{re.escape(FINETUNED)}|{re.escape(GROWN)}", why="it is about the weights of the source, and no others"
    ),
    # with its step and without its optimizer, training would go on as if it had one
    Rule(names=TRAINING_STATE, why="the state of a training run of the unpruned model"),
    Rule(
        names=r"(.*/)?params\.json",
        why="the authors' config.json, which has no place for these numbers of experts",
        rewrite=authors_params,
    ),
    Rule(names=r"(.*/)?adapter_config\.json", why="an adapter for the unpruned model"),
    Rule(
        names=r".+/[^/]*config[^/]*\.json",
        why="a config of the unpruned model for other code, with its number of experts",
        rewrite=other_config,
    ),
    Rule(
        names=r"(hf_quant_config|quantize_config|quant_config|quantization_config)\.json",
        why="",
        rewrite=quantisation_file,
    ),
)
OTHER_FORMS = "weights of the unpruned model in other forms"
BESIDE_OTHERS = "it lies with weights of the unpruned model in another form"


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """copied: as they are. rewritten: name -> new content. left_out: name -> why, also weights in other forms."""

    copied: tuple[PurePosixPath, ...]
    rewritten: Mapping[PurePosixPath, bytes]
    left_out: Mapping[PurePosixPath, str]


def side_files(folder: ModelFolder, plan: Plan) -> SideFiles:
    """What becomes of every file of a source but its config.json, its index and its weights.

    Args:
        plan: lists every layer (`Plan.filled`).

    Raises:
        SecateurError: a file says something of the experts, and no rule can say it of the kept ones.
    """
    copied: list[PurePosixPath] = []
    rewritten: dict[PurePosixPath, bytes] = {}
    left_out: dict[PurePosixPath, str] = {}
    for relative in folder.files.left_out:
        rule = _rule_for(relative)
        left_out[relative] = OTHER_FORMS if rule is None else rule.why
    folders = {relative.parent for relative in left_out} - {PurePosixPath()}  # such as original/ or onnx/
    for relative in folder.files.others:
        if str(relative) in MADE_ANEW or is_side_file(str(relative), PLAN):
            continue
        rule = _rule_for(relative)
        if relative.parent in folders:
            left_out[relative] = BESIDE_OTHERS
        elif rule is None:
            copied.append(relative)
        elif rule.rewrite is None:
            left_out[relative] = rule.why
        else:
            before = (folder.files.path / relative).read_bytes()
            after = rule.rewrite(folder, plan, str(relative), before)
            if after is None:
                left_out[relative] = rule.why
            elif after == before:
                copied.append(relative)
            else:
                rewritten[relative] = after
    return SideFiles(copied=tuple(copied), rewritten=rewritten, left_out=left_out)


def _rule_for(relative: PurePosixPath) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.names, str(relative))), None)
