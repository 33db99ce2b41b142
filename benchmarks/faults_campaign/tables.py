"""The rows of a campaign as one table, and those that fell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from faults_campaign.cases import CASES
from faults_campaign.readers import READERS
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row, Rows

COLUMNS = ["fault", "command, or file read", "counted", "passed", "fell", "of these"]
PARTS = ("kill", "pair", "signal", "fill", "change", "damage")
MOST_FALLEN = 200  # in the result
WORK = re.compile(r"/\S*/secateur-faults-[^/]+/trial/")  # where a run lay says nothing about it


def table_of(rows: Rows) -> list[list[str]]:
    """One row a command, or a damaged file: how many trials counted in each phase, or ended in each outcome."""
    found: list[list[str]] = []
    for part, mine in _by_part(rows).items():
        for case in dict.fromkeys(row.case for row in mine):
            of_case = [row for row in mine if row.case == case]
            found.append([part, case, *_numbers(of_case), _phases(of_case)])
        found.append([part, "all", *_numbers(mine), ""])
    return found


def _phases(rows: Sequence[Row]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(row.phase for row in rows).items()))


def totals(rows: Rows) -> dict[str, dict[str, float]]:
    """{part: counted, passed, fell, undamaged ones, seconds of all trials}."""
    return {
        part: {
            "counted": len(mine),
            "passed": sum(row.outcome == PASSED for row in mine),
            "fell": sum(row.outcome == FELL for row in mine),
            "undamaged": sum(row.point == "undamaged" for row in mine),
            "seconds": round(sum(row.seconds for row in rows.of(part)), 1),
        }
        for part, mine in _by_part(rows).items()
    }


def fallen(rows: Rows) -> list[dict[str, Any]]:
    """The trials that fell: the name that makes each again, where it was, and what was wrong."""
    fell = [row for mine in _by_part(rows).values() for row in mine if row.outcome == FELL]
    return [
        {"trial": row.name, "outcome": row.phase, "point": row.point, "detail": WORK.sub("", row.detail)}
        for row in fell[:MOST_FALLEN]
    ]


def _by_part(rows: Rows) -> dict[str, list[Row]]:
    """The rows that count, those of a command beside each other."""
    order = [case.name for case in CASES] + [reader.name for reader in READERS]
    found: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows.rows if row.outcome != NOT_COUNTED), key=lambda row: order.index(row.case)):
        found.setdefault(row.part, []).append(row)
    return {part: found[part] for part in PARTS if part in found}


def _numbers(rows: Sequence[Row]) -> list[str]:
    return [
        f"{number:,}" for number in (len(rows), *(sum(row.outcome == one for row in rows) for one in (PASSED, FELL)))
    ]
