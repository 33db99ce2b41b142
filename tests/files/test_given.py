"""What is no path is refused by its option before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError


@pytest.mark.parametrize("path", ["", b"bytes", 5, "a\0b", {"a": 1}])
@pytest.mark.parametrize(
    "function",
    [secateur.inspect, secateur.report, secateur.evaluate, lambda path: secateur.place({0: [1, 2]}, 2, out=path)],
)
def test_what_is_no_path_is_refused_by_its_option(function: Any, path: Any) -> None:
    with pytest.raises(SecateurError, match=r"^--(model|models|run|out): found .*, expected the path"):
        function(path)


def test_paths_are_taken_alone_and_in_lists(tmp_path: Path) -> None:
    for models in (tmp_path, str(tmp_path), [tmp_path], (str(tmp_path),)):
        with pytest.raises(SecateurError, match=r"config\.json: the file is missing"):
            secateur.evaluate(models, data=["none"])
