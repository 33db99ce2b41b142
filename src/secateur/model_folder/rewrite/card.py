"""The model card of a pruned model: the recipe on top, the original card below."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from secateur.files.bytes_in_words import in_words
from secateur.model_folder.rewrite.recipe import recipe
from secateur.plans import ZERO_SLOT
from secateur.version import __version__

LOADS_EVERYWHERE = "Every layer keeps the same number of experts, so the model loads wherever the original did."
NEEDS_OUR_CODE = (
    "The layers keep different numbers of experts. The model loads in transformers with `trust_remote_code=True`, or "
    "where `secateur` is imported. Servers that read one number of experts for all layers cannot serve it: vLLM, "
    "SGLang, llama.cpp and other readers of GGUF files."
)
WITH_ZERO_SLOTS = (
    "The routers are those of the original, with a slot for every expert that was removed: what they send there is not "
    "computed and contributes nothing, and all other weights stay as they were. The model loads in transformers with "
    "`trust_remote_code=True`, or where `secateur` is imported. Servers with code of their own cannot serve it: vLLM, "
    "SGLang, llama.cpp and other readers of GGUF files."
)
MTP = {
    "whole": (
        "Its multi-token-prediction layers are those of the original, with all their experts. A server that builds "
        "them from the number of experts in config.json cannot load them; it must run without them."
    ),
    "drop": "Its multi-token-prediction layers were taken out; it decodes one token at a time.",
}


def who_loads(counts: Set[int], removed: str | None) -> str:
    """Where a pruned model can be loaded: counts of its layers, and the plan's meaning of a removed expert."""
    if removed == ZERO_SLOT:
        return WITH_ZERO_SLOTS
    return LOADS_EVERYWHERE if len(counts) == 1 else NEEDS_OUR_CODE


def card(report: dict[str, Any], original: str | None, loading: Sequence[str]) -> str:
    """README.md of the pruned model.

    Args:
        report: see `checkpoint.report`. original: README.md of the source, whose head stays in front of all.
        loading: the lines of Python that load the model.
    """
    head, body = _split_head(original or "")
    parts = [head, _recipe(report, loading), body and f"# Original model card\n\n{body}"]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _recipe(report: dict[str, Any], loading: Sequence[str]) -> str:
    layers = report["layers"]
    before, after = (sum(layer[f"experts_{when}"] for layer in layers.values()) for when in ("before", "after"))
    counts = {layer["experts_after"] for layer in layers.values()}
    rows = "\n".join(
        f"| {name} | {layer['experts_before']} | {layer['experts_after']} |" for name, layer in layers.items()
    )
    how = "\n".join(f"| {name} | {_cell(value)} |" for name, value in recipe(report["plan"]))
    lines = [
        f"# {report['name']}, pruned",
        f"{after} of {before} experts were kept by the criterion `{report['criterion']}` "
        f"(Secateur {__version__}): {in_words(report['bytes_before'])} became "
        f"{in_words(report['bytes_after'])}. No weight was changed: every tensor is a copy of the original's bytes.",
        who_loads(counts, report["removed"]),
        "\n".join(["```python", *loading, "```"]),
        MTP.get(report["mtp"] or "", ""),
        f"| how the experts were chosen | |\n|---|---|\n{how}",
        f"| layer | experts before | experts kept |\n|---|---|---|\n{rows}",
        "`plan.json` says which experts they are; made with `secateur apply MODEL plan.json --out DIR`.",
    ]
    return "\n\n".join(line for line in lines if line)


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _split_head(text: str) -> tuple[str, str]:
    """The metadata between two lines of dashes at the very top, and what follows."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return "", text
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    return ("", text) if end is None else ("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]))
