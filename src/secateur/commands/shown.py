"""A result on standard output, as JSON or in words."""

from __future__ import annotations

import json

from secateur.results import Result


def show(result: Result, words: str, *, as_json: bool, quiet: bool, indent: int | None = 2) -> None:
    """Print the JSON of a result, or the words, or nothing."""
    if as_json:
        print(json.dumps(result.to_json(), indent=indent))
    elif not quiet:
        print(words)
