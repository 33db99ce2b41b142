"""Tables of the documents that are made from tables of the source, between two marks. `make docs-tables` writes them:

PYTHONPATH=src:tests python tests/support/docs_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from secateur.criteria import CRITERIA, Criterion
from secateur.decide.rules import OPTIONS
from secateur.model_folder.read.config import REFUSED
from secateur.stats import DEFAULT_SUMS, SUMS
from support.works_with import WORKS_WITH

DOCS = Path(__file__).parents[2] / "docs"
FAULTS = DOCS.parent / "benchmarks" / "results" / "faults.json"
LAEP = ("`laep`", "LAEP's thresholds on the loads, which also decide how many go", "data", "2601.14327")


def criteria() -> list[str]:
    rows = [(f"`{name}`", one.help, _reads(one), one.source) for name, one in CRITERIA.items()]
    return _table(("criterion", "an expert's score (high stays)", "reads", "source"), [*rows, LAEP])


def _reads(criterion: Criterion) -> str:
    if not isinstance(criterion.needs, tuple):
        return criterion.needs
    asked = [name for name in criterion.needs if name in SUMS and name not in DEFAULT_SUMS]
    return "data" + "".join(f", `--sums {name}`" for name in asked)


def sums() -> list[str]:
    rows = [
        (f"`{name}`", f"({', '.join(one.axes)})", one.help, "yes" if one.by_default else "on request")
        for name, one in SUMS.items()
    ]
    return _table(("sum", "shape", "of what", "recorded"), rows)


def rules() -> list[str]:
    rows = [(f"`{one.flag}`", one.row.help, one.row.range.expected) for one in OPTIONS.values()]
    return _table(("option", "what goes", "accepts"), rows)


def refused() -> list[str]:
    return _table(("model type", "why"), [(f"`{name}`", reason) for name, reason in REFUSED.items()])


def works_with() -> list[str]:
    return _table(("kind", "what", "LAEP"), [(row.kind, row.what, row.answer) for row in WORKS_WITH])


def faults() -> list[str]:
    """What the stored campaign counted."""
    head, *rows = json.loads(FAULTS.read_text(encoding="utf-8"))["table"]
    return _table(head, rows)


def left() -> list[str]:
    """The trials of the stored campaign that fell, those of one command and kind in one row."""
    fell = json.loads(FAULTS.read_text(encoding="utf-8"))["fell"]
    found: dict[tuple[str, str], list[str]] = {}
    for one in fell:
        case = one["trial"].rpartition("/")[0]
        found.setdefault((case, one["outcome"]), []).append(one["detail"])
    rows = [(f"`{case}`", kind, str(len(said)), _cell(said[0])) for (case, kind), said in found.items()]
    return _table(("trials", "phase or outcome", "fell", "the first of them"), rows or [("none", "", "0", "")])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("`", "'").replace("<", "&lt;").split())[:160]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]


TABLES: dict[tuple[str, str], Callable[[], list[str]]] = {
    ("prune.md", "criteria"): criteria,
    ("prune.md", "refused families"): refused,
    ("observe.md", "sums"): sums,
    ("laep.md", "rules"): rules,
    ("laep.md", "works with"): works_with,
    ("faults.md", "faults"): faults,
    ("faults.md", "left"): left,
}


def with_table(text: str, name: str, lines: list[str]) -> str:
    """A document whose table of that name has these lines."""
    begin, end = f"<!-- table of {name}: made by `make docs-tables` -->\n", f"<!-- end of {name} -->\n"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + "".join(f"{line}\n" for line in lines) + end + after


def main() -> None:
    for (document, name), make in TABLES.items():
        path = DOCS / document
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
