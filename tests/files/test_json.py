"""What json.loads lets through, or ends in a traceback at, is one SecateurError that names the text first."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.files import json as files_json
from secateur.files.json import parse_json, read_json, read_lines, read_object
from secateur.files.limits import MAX_DEPTH


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON in UTF-8 (Expecting value: line 1 column 1 (char 0))"),
        ("[1", "not JSON in UTF-8 (Expecting ',' delimiter: line 1 column 3 (char 2))"),
        (b"\xff", "not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        ('{"a": 1, "b": 2, "a": 3}', "an object lists a key twice: 'a'"),
        ('[{"x": {"0": 1, "-0": 2}}]', "an object lists a key twice: '0' and '-0'"),
        (nested(MAX_DEPTH + 1), "not JSON that can be read (more than 100 objects and lists in each other)"),
        ("[" * 100_000, "not JSON that can be read (more than 100 objects and lists in each other)"),
        (
            '["\\ud800"]',
            "not JSON in UTF-8 ('utf-8' codec can't encode character '\\ud800' in position 2: surrogates not allowed)",
        ),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(text: bytes | str, message: str) -> None:
    with pytest.raises(SecateurError) as caught:
        parse_json(text, "a.json")
    assert str(caught.value) == f"a.json: {message}"


def test_a_number_that_python_does_not_read_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"^a.json: not JSON in UTF-8 \(Exceeds the limit \(4300 digits\)"):
        parse_json("1" * 5000, "a.json")


def test_the_deepest_value_and_whole_characters_are_read() -> None:
    assert json.dumps(parse_json(nested(MAX_DEPTH), "a.json")) == nested(MAX_DEPTH)
    assert parse_json('{"\\ud83d\\ude00": "\\ud83d\\ude00é"}', "a.json") == {"😀": "😀é"}


def test_objects_in_lists_in_objects_count_for_the_depth() -> None:
    text = '{"a": [' * (MAX_DEPTH // 2) + "1" + "]}" * (MAX_DEPTH // 2)
    parse_json(text, "a.json")
    with pytest.raises(SecateurError, match="more than 100"):
        parse_json(f"[{text}]", "a.json")


def test_constants_are_read_where_python_may_have_written_them() -> None:
    assert parse_json("[-Infinity]", "a.json") == [-math.inf]
    with pytest.raises(SecateurError, match=r"^a.json: found -Infinity, which is not JSON$"):
        parse_json("[-Infinity]", "a.json", constants=False)


def test_a_file_or_a_line_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_json, "MAX_JSON", 10)
    (tmp_path / "fits.json").write_text("123456789 ")
    assert read_json(tmp_path / "fits.json") == 123456789
    (tmp_path / "large.json").write_text("123456789  ")
    with pytest.raises(SecateurError, match=r"large.json: more than \d+ bytes"):
        read_json(tmp_path / "large.json")
    with pytest.raises(SecateurError, match=r"large.jsonl:1: more than \d+ bytes"):
        list(read_lines_of(tmp_path / "large.jsonl", "1" * 11 + "\n"))


def test_a_file_that_is_too_large_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_json, "MAX_JSON", 10_000_000)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 10_000_001)
    tracemalloc.start()
    with pytest.raises(SecateurError, match=r"large\.json: more than"):
        read_json(tmp_path / "large.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_what_has_no_size_ahead_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_json, "MAX_JSON", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text in ("123456789 ", "123456789  "):
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        if len(text) > 10:
            with pytest.raises(SecateurError, match=r"pipe: more than \d+ bytes"):
                read_json(pipe)
        else:
            assert read_json(pipe) == 123456789
        writer.join()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=rf"^{re.escape(str(tmp_path))}/none: cannot be read \(No such file or dir"):
        read_json(tmp_path / "none")
    with pytest.raises(SecateurError, match=r"^the plan: cannot be read \(it is a folder, expected a file\)$"):
        read_json(tmp_path, where="the plan")
    with pytest.raises(SecateurError, match=r"none: cannot be read"):
        list(read_lines(tmp_path / "none"))
    with pytest.raises(SecateurError, match=r"none: the file is missing$"):
        read_object(tmp_path / "none")


def test_an_object_is_asked_for_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(SecateurError, match=r"a.json: found \[1\], expected an object$"):
        read_object(tmp_path / "a.json")


def read_lines_of(path: Path, text: str, **options: Any) -> list[tuple[str, Any]]:
    path.write_text(text)
    return [(where.rpartition("/")[2], value) for where, value in read_lines(path, **options)]


def test_lines_are_named_and_only_a_last_one_without_end_may_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines_of(path, "") == []
    assert read_lines_of(path, "1\n[2]\n") == [("a.jsonl:1", 1), ("a.jsonl:2", [2])]
    assert read_lines_of(path, "1\n2") == [("a.jsonl:1", 1), ("a.jsonl:2", 2)]
    assert read_lines_of(path, '1\n{"a": ') == [("a.jsonl:1", 1)]
    for text in ('1\n{"a": \n', "1\n\n2\n", '1\n{"a": \n2'):
        with pytest.raises(SecateurError, match=r"a.jsonl:2: not JSON"):
            read_lines_of(path, text)


def test_the_lines_up_to_a_cut_are_those_before_it(tmp_path: Path) -> None:
    assert read_lines_of(tmp_path / "a.jsonl", '1\n2\n{"a": 3\n4\n', until_cut=True) == [
        ("a.jsonl:1", 1),
        ("a.jsonl:2", 2),
    ]
