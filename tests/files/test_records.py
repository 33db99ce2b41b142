"""A record that does not fit its type is refused by the name of the field, what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest

from secateur.errors import SecateurError
from secateur.files.limits import MAX_COUNT, MAX_EXPERTS, MAX_LAYER
from secateur.files.records import Count, Expert, Experts, Finite, Layer, Name, Positive, as_record


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Count
    order: tuple[Expert, ...] = ()
    kind: Literal["x", "y"] = "x"


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: Name
    parts: Mapping[Layer, Part] = field(default_factory=dict)
    one: Part | None = None
    share: Finite | None = None
    pair: tuple[int, int] = (0, 0)
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise SecateurError("a name that is bad")


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    whole: Whole
    flag: bool = False


def test_a_record_becomes_its_type_and_keys_become_numbers() -> None:
    data = {"name": "a", "parts": {"10": {"count": 0, "order": [2, 1]}, "2": {"count": 1}}, "share": 1, "pair": [1, 2]}
    assert as_record(data, Whole, "a.json") == Whole(
        name="a", parts={10: Part(count=0, order=(2, 1)), 2: Part(count=1)}, share=1.0, pair=(1, 2)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (3, "found 3, expected an object"),
        ({}, "'name' is missing, found []"),
        ({"name": ""}, "'name' is '', expected a text that is not empty"),
        ({"name": "a", "nam": 1}, "'nam' is unknown, expected name, parts, one, share, pair, more"),
        ({"name": "a", "parts": []}, "'parts' is [], expected an object"),
        (
            {"name": "a", "parts": {"01": {"count": 1}}},
            "'parts' has the key '01', expected a layer id, a whole number up to 999999",
        ),
        ({"name": "a", "parts": {"1": {"count": 1}, "2": {}}}, "'parts.2.count' is missing, found []"),
        (
            {"name": "a", "parts": {"2": {"count": 1, "order": [0, -1]}}},
            "'parts.2.order[1]' is -1, expected an expert id, a whole number below 1048576",
        ),
        ({"name": "a", "one": {"count": 1, "x": 2}}, "'one.x' is unknown, expected count, order, kind"),
        ({"name": "a", "one": {"count": True}}, "'one.count' is True, expected a whole number of at least 0"),
        ({"name": "a", "one": {"count": 1, "kind": "z"}}, "'one.kind' is 'z', expected one of x, y"),
        ({"name": "a", "one": 1}, "'one' is 1, expected an object or null"),
        ({"name": "a", "share": math.inf}, "'share' is inf, expected a finite number or null"),
        ({"name": "a", "share": math.nan}, "'share' is nan, expected a finite number or null"),
        ({"name": "a", "pair": [1]}, "'pair' is [1], expected a list of 2"),
        ({"name": "a", "pair": [1, "x"]}, "'pair[1]' is 'x', expected a whole number"),
        ({"name": "a", "more": None}, "'more' is None, expected an object"),
        ({"name": "bad"}, "a name that is bad"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(change: Any, message: str) -> None:
    with pytest.raises(SecateurError) as caught:
        as_record(change, Whole, "a.json")
    assert str(caught.value) == f"a.json: {message}"


def test_a_dataclass_inside_a_record_may_have_more_keys_and_its_own_refusal_is_placed() -> None:
    assert as_record({"whole": {"name": "a", "x": 1}, "y": 2}, Outer, "a.json") == Outer(whole=Whole(name="a"))
    with pytest.raises(SecateurError, match=r"^a.json: 'whole' is refused: a name that is bad$"):
        as_record({"whole": {"name": "bad"}}, Outer, "a.json")
    with pytest.raises(SecateurError, match=r"^a.json: 'flag' is 0, expected true or false$"):
        as_record({"whole": {"name": "a"}, "flag": 0}, Outer, "a.json")


class Renamed(msgspec.Struct, frozen=True, kw_only=True):
    short: Count = msgspec.field(name="long name")


def test_a_field_is_named_as_in_the_file() -> None:
    assert as_record({"long name": 1}, Renamed, "a.json") == Renamed(short=1)
    with pytest.raises(SecateurError, match=r"^a.json: 'long name' is missing, found \['short'\]$"):
        as_record({"short": 1}, Renamed, "a.json")
    with pytest.raises(SecateurError, match=r"^a.json: 'long name' is -1, expected a whole number of at least 0$"):
        as_record({"long name": -1}, Renamed, "a.json")


def test_a_message_stays_short_and_on_one_line() -> None:
    long = {"name": "a", "more": {}, "one": {"count": "x\n" * 10_000}}
    for data in (long, {"name": "a", "\n" * 10_000: 1}, {"name": "a", "parts": {"\n" * 10_000: 1}}):
        with pytest.raises(SecateurError) as caught:
            as_record(data, Whole, "a.json")
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "lowest", "highest"),
    [
        (Count, 0, MAX_COUNT),
        (Positive, 1, MAX_COUNT),
        (Layer, 0, MAX_LAYER),
        (Expert, 0, MAX_EXPERTS - 1),
        (Experts, 1, MAX_EXPERTS),
    ],
)
def test_whole_numbers_have_ranges(kind: Any, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        assert as_record([value], list[kind], "a.json") == [value]
    for value in (lowest - 1, highest + 1, 1.0, True, "1", None):
        with pytest.raises(SecateurError, match=r"^a.json: '\[0\]' is .*, expected "):
            as_record([value], list[kind], "a.json")
