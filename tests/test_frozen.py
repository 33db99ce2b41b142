"""What was decided, written and said at the commit of the stored reference still is (support/frozen_reference.py)."""

from __future__ import annotations

from itertools import islice

import pytest

from support.frozen_reference import HERE, KINDS, STATISTICS, differences, plans_to_make, read
from support.long_tests import ARE_RUN
from support.tiny_models import FAMILIES, families
from support.tiny_models import KINDS as FAMILY_KINDS

# Of the plans of a section one of so many is made, and others in the next one: each choice of options in two or three
# of the ten statistics files. Long tests make all of them.
PART = 4
OTHER_FOLDERS = [section for section in KINDS["folders"][0] if section not in FAMILIES]


def check(kind: str, section: str) -> None:
    stored, current = read(kind).get(section, {}), KINDS[kind][1](section)
    changed = differences(stored, current)
    assert not changed, f"{kind} of {section}, {len(changed)} entries differ:\n" + "\n".join(changed)


@pytest.mark.parametrize("section", KINDS["plans"][0])
def test_plans_are_those_of_the_reference(section: str) -> None:
    stored = read("plans").get(section, {})
    with plans_to_make(section) as found:
        assert found.keys() == stored.keys()
        first = 0 if ARE_RUN else KINDS["plans"][0].index(section) % PART
        made = {name: make() for name, make in islice(found.items(), first, None, 1 if ARE_RUN else PART)}
    changed = differences({name: stored[name] for name in made}, made)
    assert not changed, f"plans of {section}, {len(changed)} entries differ:\n" + "\n".join(changed)


@pytest.mark.parametrize("section", [*families(FAMILY_KINDS, FAMILY_KINDS), *OTHER_FOLDERS])
def test_pruned_folders_are_those_of_the_reference(section: str) -> None:
    check("folders", section)


@pytest.mark.parametrize("section", KINDS["help"][0])
def test_help_texts_are_those_of_the_reference(section: str) -> None:
    check("help", section)


@pytest.mark.parametrize("section", KINDS["signatures"][0])
def test_public_signatures_are_those_of_the_reference(section: str) -> None:
    check("signatures", section)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_about_what_there_is(kind: str) -> None:
    assert sorted(read(kind)) == sorted(KINDS[kind][0])


def test_the_statistics_of_the_reference_are_at_hand() -> None:
    assert {path.stem for path in HERE.glob("*.safetensors")} == set(STATISTICS)


def test_a_difference_names_its_entry() -> None:
    stored = {"same": "a", "changed": "a", "gone": "a", "lines": ["a", "b"], "turned": ["a", "b"]}
    current = {"same": "a", "changed": "b", "new": "a", "lines": ["a", "c"], "turned": ["b", "a"]}
    assert differences(stored, current) == [
        "gone: not there any more",
        "new: not in the reference",
        "changed: was a, is b",
        "lines: gone ['b'], new ['c']",
        "turned: the same lines in another order or number",
    ]
