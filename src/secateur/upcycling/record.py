"""What is written beside the weights: upcycle.json, which `verify` reads again, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.json import read_object
from secateur.files.records import Count, Finite, Layer, as_record
from secateur.model_folder.read.tensor_files import GROWN
from secateur.upcycling.forms import FORMS, Blueprint
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.targets import BAM
from secateur.version import __version__

RECORD, REPORT, CARD = GROWN, "report.json", "README.md"
FORMAT, VERSION = "secateur-upcycle", 1
LOADING = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"
OURS = "import secateur  # tells transformers of this model class\n"


class ParentEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """name: of its folder. files: SHA-256 of config.json, the index and the weights."""

    name: str
    files: dict[str, str]


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a tensor: see `origins`."""

    made: Literal["copied", "averaged", "router"]
    of: tuple[str, ...]
    times: Finite = 1.0


class UpcycleFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """upcycle.json. routers: SHA-256 of every router tensor's bytes. division: see `recipe.Division`."""

    format: Literal["secateur-upcycle"]
    version: Literal[1]
    secateur: str
    parents: tuple[ParentEntry, ...]
    options: dict[str, Any]
    target: str
    tensors: dict[str, Origin]
    routers: dict[str, str]
    division: dict[Layer, tuple[Count, ...]]


def holds_record(folder: Path) -> bool:
    """Whether `upcycle` made it."""
    return (folder / RECORD).is_file()


def read_record(folder: Path) -> tuple[UpcycleFile, Asked]:
    """What a folder says of its making.

    Raises:
        SecateurError: no upcycle.json, or a damaged one.
    """
    path = folder / RECORD
    found = as_record(read_object(path), UpcycleFile, str(path))
    asked = as_record(found.options, Asked, f"{path}: 'options'")
    if asked.form not in FORMS:
        raise SecateurError(f"{path}: 'options.form' is {asked.form!r:.40}, expected {', '.join(FORMS)}")
    try:
        asked.check()
    except SecateurError as error:
        raise SecateurError(f"{path}: 'options': {error}") from error
    return found, asked


def describe(parents: Parents, plan: Blueprint, num_bytes: int, num_tensors: int) -> dict[str, Any]:
    """The report, as far as it is known before anything is written."""
    from secateur.upcycling.published import bam_figures

    figures = bam_figures(layout_of(plan).config(parents, plan)) if plan.target is BAM else None
    return {
        "format": "secateur-upcycle-report",
        "version": 1,
        "secateur": __version__,
        "form": plan.form,
        "parents": [str(parent.path) for parent in parents.each],
        "parent_type": parents.model_type,
        "model_type": plan.target.model_type,
        "layers": parents.layers,
        "experts": len(plan.experts),
        "top_k": plan.top_k,
        "expert_width": plan.width,
        "shared_neurons": plan.shared,
        "renormalises": plan.renormalises,
        "down_projection_times": plan.factor,
        "router": plan.start,
        "function": plan.exact,
        "least_cosine": None if parents.far is None else {"tensor": parents.far[0], "cosine": parents.far[1]},
        "tokenizers_compared": parents.tokenizers,
        "tensors": num_tensors,
        "bytes_before": [parent.files.num_bytes for parent in parents.each],
        "bytes_after": num_bytes,
        "bam": figures,
        "comparison": None,
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report in words."""
    lines = [
        f"{report['experts']} experts of {report['expert_width']} neurons in {report['layers']} layers, top-"
        f"{report['top_k']}, as {report['model_type']}; {in_words(report['bytes_after'])}",
        f"the start computes {report['function']}",
    ]
    if report["bam"] is None:
        why = " (the chosen weights are divided by their sum)" if report["renormalises"] else ""
        lines.append(f"down projections of experts times {report['down_projection_times']:g}{why}")
    if report["shared_neurons"]:
        lines.append(f"a shared expert of the {report['shared_neurons']} busiest neurons, its down projection times 2")
    if figures := report["bam"]:
        from secateur.upcycling.published import figure_lines

        lines += figure_lines(figures)
    if found := report["comparison"]:
        lines.append(f"perplexity {found['perplexity']:.3f} on {found['tokens']} tokens of the text")
        lines += [
            f"parent {one['parent']}: perplexity {one['perplexity']:.3f}, logits differ by at most "
            f"{one['max_logit_difference']:.3g}, {one['mean_logit_difference']:.3g} on average"
            for one in found["parents"]
        ]
    return lines


def card(report: Mapping[str, Any], command: str) -> str:
    """README.md of the mixture."""
    names = [Path(parent).resolve().name for parent in report["parents"]]
    rows = "\n".join(f"| {number} | {' '.join(name.split())} |".replace("\\", "") for number, name in enumerate(names))
    ours = report["bam"] is not None
    parts = [
        f"# A mixture grown from {', '.join(names)}",
        f"A {report['model_type']} model. "
        + (
            "No server runs it." if ours else "It loads in stock transformers, without further code and without a flag."
        ),
        f"```python\n{OURS if ours else ''}{LOADING}\n```",
        "\n".join(f"* {line}" for line in report_lines(report)),
        f"| parent | folder |\n|---|---|\n{rows}",
        f"Made by Secateur {report['secateur']} with `{command}`. `upcycle.json` says which tensor came from where.",
    ]
    return "\n\n".join(parts) + "\n"
